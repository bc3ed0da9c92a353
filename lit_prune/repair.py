"""Delayed repair adapter (DRA) of RCP (arXiv 2604.04972): FiLM on answer states, conditioned on the pruned tokens.

Values marked [R] were read in drafts of the method, [ours] are this project's choice, [inferred] fits the source's
published numbers; all are arguments.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_choice, check_number, check_numbers
from lit_prune.ops import selection
from lit_prune.ops.budget import scale_layers
from lit_prune.pruners.base import Dims, init_args

Essence = tuple[Tensor, Tensor]  # (e_mask, e_pruned), each (batch, condition): what repair layers get from a stage
FORMS = ("published", "first")


class Lost(NamedTuple):
    """Sum and number of the pruned tokens' states."""

    sum: Float[Tensor, "batch width"]
    count: Float[Tensor, "batch 1"]


class Adapter(nn.Module):
    """h = x + alpha Up(gamma GELU(Down(x)) + beta), with gamma = 1 + W_g cond and beta = W_b cond."""

    def __init__(self, width: int, bottleneck: int, condition: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.query = nn.Linear(width, condition)
        self.gamma = nn.Linear(condition, bottleneck)
        self.beta = nn.Linear(condition, bottleneck)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))  # DeepSpeed doesn't support 0-d parameters
        for film in (self.gamma, self.beta):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def forward(
        self, states: Float[Tensor, "batch seq width"], essence: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch seq width"]:
        """Correction to add to a decoder layer's output."""
        condition = essence[:, None] + self.query(states)
        inner = nn.functional.gelu(self.down(states))
        inner = (1.0 + self.gamma(condition)) * inner + self.beta(condition)
        return self.alpha * self.up(inner)


class RepairAdapter(nn.Module):
    """Adapters on the outputs of late decoder layers, fed by two vectors cached at each pruning stage.

    e_mask encodes *where* tokens were kept: attention of a learnable query over position codes times the cumulative
    mask. e_pruned encodes *what* was lost: the mean over all tokens pruned so far of their states at the stage that
    pruned them, after the layer's input norm [ours: the paper doesn't specify which states; later ones don't exist in
    inference]. All stages share one context encoder; each repair layer has its own adapter.

    Args:
        layers: decoder layers whose output is repaired, after the stages that feed them [R: 22 and 29 of 32].
        stages: pruning stage that feeds each repair layer, counted from 0 [R: the second and the third].
        depth: depth of the decoder that `layers` is written for; `None`: as written.
        bottleneck: inner width [R: 512]. condition: width of the conditioning vector [R: 512].
        code: width of the position codes [R: 64]. alpha: initial value of the learnable strength [R: 0.1].
        form: `published`, or `first`, which plug-ins from before this argument have [ours]: e_pruned is the mean over
            the tokens that the stage itself prunes, e_mask's scores are not divided by sqrt(code), position codes start
            with unit length, and projections as PyTorch's do, so that an untrained adapter moves states by 2 % of their
            norm instead of 0.16 %.
        detach_context: keep gradients of e_mask and e_pruned from the pruner [R: a switch; off].
    """

    def __init__(
        self,
        layers: Sequence[int] = (22, 29),
        stages: Sequence[int] = (1, 2),
        depth: int | None = None,
        bottleneck: int = 512,
        condition: int = 512,
        code: int = 64,
        alpha: float = 0.1,
        form: Literal["published", "first"] = "published",
        detach_context: bool = False,
    ) -> None:
        super().__init__()
        check_choice("repair.form", form, FORMS)
        if len(layers) != len(stages):
            raise LitPruneError(f"repair layers {list(layers)} need one feeding stage each, got stages {list(stages)}")
        check_numbers("repair.layers", layers, least=0, whole=True)
        check_numbers("repair.stages", stages, least=0, whole=True)
        check_number("repair.depth", depth, least=1, whole=True)
        for name, size in (("bottleneck", bottleneck), ("condition", condition), ("code", code)):
            check_number(f"repair.{name}", size, least=1, whole=True)
        check_number("repair.alpha", alpha)
        self.layers, self.stages = [int(x) for x in layers], [int(x) for x in stages]
        self.depth, self.bottleneck, self.condition, self.code, self.alpha = depth, bottleneck, condition, code, alpha
        self.form, self.detach_context = form, detach_context
        self.adapters = nn.ModuleList()

    def build(self, dims: Dims) -> None:
        """Create context encoder and adapters for the host's hidden size and number of visual tokens."""
        if self.adapters:
            return
        scale = 0.02 if self.form == "published" else self.code**-0.5
        self.codes = nn.Parameter(torch.randn(dims.visual, self.code) * scale)
        self.code_query = nn.Parameter(torch.randn(self.code) * scale)
        self.where = nn.Linear(self.code, self.condition)
        self.what = nn.Linear(dims.width, self.condition)
        self.adapters.extend(Adapter(dims.width, self.bottleneck, self.condition, self.alpha) for _ in self.layers)
        if self.form == "published":
            # Xavier [R]; uniform, and no bias at the start, give the source's 0.16 % [inferred].
            late = [linear for adapter in self.adapters for linear in (adapter.up, adapter.query)]
            for linear in (self.where, self.what, *late):
                nn.init.xavier_uniform_(linear.weight, gain=0.1)
                nn.init.zeros_(linear.bias)

    def take_form(self, form: str, dims: Dims) -> None:
        """Compute in another form; both have the same parameters, which a checkpoint sets."""
        self.form = form

    @property
    def cumulative(self) -> bool:
        """True if the context covers all stages so far, by their cumulative gates, not one stage."""
        return self.form == "published"

    def feeds(self, pruning_layers: Sequence[int], depth: int) -> dict[int, tuple[int, int]]:
        """{decoder layer: (adapter, stage that feeds it)}.

        Raises:
            LitPruneError: a stage is missing or comes too late, or two adapters are on one layer.
        """
        layers = scale_layers(tuple(self.layers), self.depth, depth)
        if len(set(layers)) < len(layers):
            raise LitPruneError(
                f"repair layers {self.layers} are {list(layers)} in a decoder of {depth} layers: give each adapter a "
                "layer of its own"
            )
        for layer, stage in zip(layers, self.stages, strict=True):
            if not 0 <= layer < depth:
                raise LitPruneError(f"repair layer {layer} is outside the model: its decoder has {depth} layers")
            if not 0 <= stage < len(pruning_layers):
                raise LitPruneError(
                    f"repair layer {layer} reads pruning stage {stage}, but there are {len(pruning_layers)} stages"
                )
            if pruning_layers[stage] > layer:
                raise LitPruneError(
                    f"repair layer {layer} is fed by pruning layer {pruning_layers[stage]}, which comes later; "
                    f"move the repair after the pruning or feed it by an earlier stage"
                )
        return {layer: (i, stage) for i, (layer, stage) in enumerate(zip(layers, self.stages, strict=True))}

    def lost(
        self,
        states: Float[Tensor, "batch visual width"],
        alive: Bool[Tensor, "batch visual"] | Float[Tensor, "batch visual"],
        gate: Float[Tensor, "batch visual"],
        earlier: Lost | None = None,
    ) -> Lost:
        """Sum and number of the states that a stage prunes, added to those that `earlier` stages pruned.

        Arguments as in `essence`.
        """
        if self.detach_context:
            states, alive, gate = states.detach(), alive.detach(), gate.detach()
        present = alive.to(self.codes.dtype)
        return _add_lost(states, present, gate.to(present.dtype) * present, earlier)

    def essence(
        self,
        states: Float[Tensor, "batch visual width"],
        ordinal: Int[Tensor, "batch visual"],
        alive: Bool[Tensor, "batch visual"] | Float[Tensor, "batch visual"],
        gate: Float[Tensor, "batch visual"],
        total: Int[Tensor, " batch"] | None = None,
        lost: Lost | None = None,
    ) -> Essence:
        """(e_mask, e_pruned) of one stage.

        `gate` is 1 for kept tokens; `alive` marks those present before the stage, or is their cumulative gate.
        `lost` is what was pruned so far, by `lost`; None: what this stage prunes alone.

        `total` is the number of the sample's visual tokens before pruning (`None`: one per position code). If it
        differs from the number of codes, a token has the code at its relative position [ours]: tokens that share a code
        average their gates, and a code between two tokens has the gate of the one before.
        """
        if self.detach_context:
            states, alive, gate = states.detach(), alive.detach(), gate.detach()
        dtype, count = self.codes.dtype, self.codes.shape[0]
        kept = gate.to(dtype) * alive.to(dtype)
        total = ordinal.new_full(ordinal.shape[:1], count) if total is None else total.clamp(min=1)
        total, places = total[:, None], torch.arange(count, device=ordinal.device)
        # Filler rows point at ordinal 0 with alive False: adding (not setting) leaves the real token's value.
        mask = torch.zeros(ordinal.shape[0], count, dtype=dtype, device=ordinal.device)
        mask = mask.scatter_add(1, (ordinal * count // total).clamp(max=count - 1), kept)
        # Code c covers the tokens from ceil(c * total / count) up to that of c + 1: several, one or none.
        edges = (torch.arange(count + 1, device=ordinal.device) * total + count - 1) // count
        sharing = edges[:, 1:] - edges[:, :-1]
        mask = mask / sharing.clamp(min=1)
        # A code that covers no token takes the value of the code of the token before it.
        mask = mask.gather(1, torch.where(sharing > 0, places, places * total // count * count // total))
        codes = mask[..., None] * self.codes
        scores = codes @ self.code_query
        weights = (scores * self.code**-0.5 if self.form == "published" else scores).softmax(-1)
        where = self.where((weights[:, None] @ codes).squeeze(1))
        lost = _add_lost(states, alive.to(dtype), kept, None) if lost is None else lost
        return where, self.what(lost.sum / lost.count.clamp(min=1.0))

    def forward(
        self,
        states: Float[Tensor, "batch seq width"],
        essence: Essence,
        answer_mask: Bool[Tensor, "batch seq"],
        adapter: int,
        most: int | None = None,
    ) -> Float[Tensor, "batch seq width"]:
        """States of one repair layer, corrected where `answer_mask` is set (positions that predict answer tokens).

        `most`: upper bound on such positions in a sample, if known.
        """
        where, what = essence
        if states.shape[1] == 1:  # decoding
            change = self.adapters[adapter](states.to(where.dtype), where + what)
            return states + change.to(states.dtype) * answer_mask[..., None].to(states.dtype)
        # Run the adapter on answer positions only, then add the result back at their columns.
        columns, real = selection.compact(answer_mask, most)
        rows = selection.gather_rows(states, columns)
        change = self.adapters[adapter](rows.to(where.dtype), where + what)
        change = change.to(states.dtype) * real[..., None].to(states.dtype)
        return states.scatter_add(1, columns[..., None].expand_as(change), change)

    def context_flops(self, visual: Tensor, total: Tensor, width: int, feeds: bool = True) -> Tensor:
        """FLOPs of one stage's context: `visual` tokens present at the stage, of `total` in the sample.

        Before the adapter is built, one position code per token of `total` is assumed. A stage that doesn't feed a
        repair layer (`feeds`) only adds its tokens to the sum of those pruned, and only if that is cumulative.
        """
        summed = 2 * visual.double() * width
        if not feeds:
            return summed if self.cumulative else torch.zeros_like(summed)
        codes = torch.full_like(total, self.codes.shape[0]) if self.adapters else total
        return 4 * codes.double() * self.code + summed + 2 * (self.code + width) * self.condition

    def adapter_flops(self, rows: Tensor, width: int) -> Tensor:
        """FLOPs of all adapters over `rows` repaired positions."""
        films = 4 * self.condition * self.bottleneck
        return rows.double() * len(self.layers) * (4 * width * self.bottleneck + 2 * width * self.condition + films)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as in a YAML file."""
        return init_args(self)


def _add_lost(states: Tensor, present: Tensor, kept: Tensor, earlier: Lost | None) -> Lost:
    gone = present - kept
    lost = Lost((gone[:, None] @ states.to(gone.dtype)).squeeze(1), gone.sum(1, keepdim=True))
    return lost if earlier is None else Lost(lost.sum + earlier.sum, lost.count + earlier.count)
