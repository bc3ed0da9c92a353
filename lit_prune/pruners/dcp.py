"""DCP-Prune: recover dropped patches in the vision tower, and choose by clusters where that isn't enough."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops import coverage, graphs, selection
from lit_prune.ops.moments import kappa
from lit_prune.pruners.base import Context, Kept, Pruner, VisionContext, VisionPruner
from lit_prune.pruners.by_image import image_by_image


class DCPPrune(VisionPruner):
    """Anchor-context graph recovery and text-aware token cluster selection (DCP-Prune, arXiv 2606.16633).

    The paper's parts are ACGR inside the tower and TATCS after it where the consistency metric kappa requires it,
    without training. The paper's formulas are not known to us; those below are ours, as is every default, chosen on
    training scenes of the micro world (`jobs/tune_dcp.py`).

    ACGR, at each stage: a token's score is the class token's attention in the layer just run times the norm of its
    value, mixed with its `contrast` (one minus its cosine to the mean token, less the minimum), each normalised to sum
    1, accumulated over the stages so far. Anchors are picked by score, each pick lowering the scores of similar tokens
    nearby. Every anchor becomes the weighted mean of itself, with weight 1, and its context, with weights `strength` *
    exp((cosine of the centred states - 1) / `temperature` - distance^2 / (2 `width`^2)), so that one without similar
    tokens nearby stays unchanged. The context is then dropped. Memory is context x anchors.

    TATCS: if kappa of the top-k selection by score, against all tokens at the last stage, exceeds `threshold`, that
    stage keeps `candidates` times the budget, and the stage before decoder layer 0, where the question is known,
    selects the budget from them. The number of tokens that arrive thus carries the trigger. Greedy facility location
    gives cluster centres; a token joins the centre with the largest text-aware similarity, a mix of the cosine of
    tokens and, with weight `text`, the cosine of their similarities to the question's words; each cluster keeps one
    token, the best by the same mix of similarity to its centre and largest cosine with a word. Several images of a
    prompt are pruned one by one, with a share of the budget each [ours]; the FLOPs are then an upper bound.

    Args:
        vision_layers: tower layers at whose input ACGR acts; not the first, before which there is no attention.
        vision_stage_ratios: patches after each stage in multiples of the budget; the last is 1.
        vision_depth: see `VisionPruner`.
        acgr: if False, stages keep the best tokens by score and recover nothing.
        tatcs: if False, the tower itself prunes to the budget.
        contrast: share of contrast in the score, 0 to 1.
        temperature: of the weights, as a function of the cosine.
        width: reach of anchors, in patches.
        strength: weight of a context token with the same state and position as its anchor.
        threshold: of kappa.
        candidates: tokens that TATCS chooses from, in multiples of the budget.
        text: weight of the question in TATCS, 0 to 1.
        sample: see `TextAwareClusters`.
    """

    title = "DCP-Prune"
    needs_values = True

    def __init__(
        self,
        vision_layers: Sequence[int] = (2, -1),
        vision_stage_ratios: Sequence[float] = (8.0, 1.0),
        vision_depth: int | None = 4,
        acgr: bool = True,
        tatcs: bool = True,
        contrast: float = 1.0,
        temperature: float = 0.3,
        width: float = 1.0,
        strength: float = 1.0,
        threshold: float = 0.5,
        candidates: float = 2.0,
        text: float = 0.5,
        sample: int | None = graphs.DENSE,
    ) -> None:
        super().__init__(vision_layers, vision_stage_ratios, vision_depth, TextAwareClusters(text, sample))
        if 0 in self.vision_layers:
            raise LitPruneError("vision_layers: DCP-Prune scores by the layer before a stage, and layer 0 has none")
        check_number("pruner.temperature", temperature, above=0)
        check_number("pruner.width", width, above=0)
        check_number("pruner.candidates", candidates, least=1)
        for name, value in (("contrast", contrast), ("strength", strength), ("threshold", threshold), ("text", text)):
            check_number(f"pruner.{name}", value)
        self.acgr, self.tatcs, self.contrast = acgr, tatcs, contrast
        self.temperature, self.width, self.strength = temperature, width, strength
        self.threshold, self.candidates, self.text, self.sample = threshold, candidates, text, sample

    @property
    def measured(self) -> str | None:
        """Kappa of plain top-k, if TATCS is on."""
        return "kappa" if self.tatcs else None

    def prune_vision(self, context: VisionContext) -> Kept:
        """One stage of ACGR; the last one also keeps more tokens than the budget if kappa requires it."""
        unit = graphs.centred(context.states, context.alive)
        scores = self._scores(context)
        count = context.count
        if self.tatcs and context.stage == len(self.vision_layers) - 1:
            plain = selection.top_k(scores, context.alive, count)
            context.memory["kappa"] = kappa(context.states, plain, context.alive)
            # The question isn't known in the tower: keep candidates, of which TATCS selects later.
            triggered = context.memory["kappa"] > self.threshold
            count = torch.where(triggered, (count * self.candidates).round().long(), count)
        if not self.acgr:
            return Kept(selection.top_k(scores, context.alive, count), scores=scores)
        anchors = graphs.spread(scores, unit, context.ordinal, context.side, self.width, context.alive, count)
        return Kept(anchors, scores=scores, states=self._recover(context, unit, anchors))

    def _scores(self, context: VisionContext) -> Float[Tensor, "tiles visual"]:
        """Score accumulated over this and earlier stages, stored for the next over all positions of the tile."""
        mean = context.states.float().masked_fill(~context.alive[..., None], 0.0).sum(1, keepdim=True)
        away = 1 - torch.nn.functional.cosine_similarity(context.states.float(), mean, dim=-1)
        away = _share(away - away.masked_fill(~context.alive, 2.0).amin(1, keepdim=True), context.alive)
        attended = _share(context.attention.float() * context.values.float().norm(dim=-1), context.alive)
        now = (1 - self.contrast) * attended + self.contrast * away
        before = context.memory.get("score", now.new_zeros(len(now), context.side**2))
        context.memory["score"] = before.scatter_add(1, context.ordinal, now * context.alive)
        return context.memory["score"].gather(1, context.ordinal)

    def _recover(
        self, context: VisionContext, unit: Tensor, anchors: Bool[Tensor, "tiles visual"]
    ) -> Float[Tensor, "tiles visual width"]:
        """States, with each anchor moved towards its context."""
        columns, _ = selection.compact(anchors)
        places = context.ordinal.gather(1, columns)
        likeness = selection.gather_rows(unit, columns) @ unit.transpose(1, 2) - 1
        edges = likeness / self.temperature - graphs.squared_distance(places, context.ordinal, context.side) / (
            2 * self.width**2
        )
        weights = self.strength * edges.exp() * (context.alive & ~anchors)[:, None]
        states = context.states.float()
        moved = selection.gather_rows(states, columns) + weights @ states
        moved = moved / (1 + weights.sum(-1, keepdim=True))
        # Filler columns point at tokens that are no anchors, whose states are not used.
        return states.scatter(1, columns[..., None].expand_as(moved), moved)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """ACGR: cosines of anchors with all tokens, and the weighted sums."""
        visual, kept = visual.double(), kept.double()
        return 4.0 * visual * kept * width * self.acgr


class TextAwareClusters(Pruner):
    """TATCS: the stage of `DCPPrune` before decoder layer 0, where the question is known.

    Args:
        text: weight of the question, 0 to 1.
        sample: with more than 1,024 candidates, number of those whose coverage counts for the centres, a fixed
            pseudo-random sample; None: all, in a time that grows with their square.
    """

    needs_embeds = True

    def __init__(self, text: float = 0.5, sample: int | None = graphs.DENSE) -> None:
        super().__init__([0])
        check_number("pruner.text", text)
        check_number("pruner.sample", sample, least=1, whole=True)
        self.text, self.sample = text, sample

    @image_by_image
    def prune(self, context: Context) -> Kept:
        """Apply TATCS to samples for which the tower kept more than the budget; the others keep all."""
        if not bool((context.alive.sum(1) > context.count).any()):
            return Kept(context.alive)
        columns, real = selection.compact(context.alive)
        visual = normalize(selection.gather_rows(context.visual_embeds, columns).float(), dim=-1)
        words = normalize(context.text_embeds.float(), dim=-1) * context.text_mask[..., None]
        to_words = visual @ words.transpose(1, 2)
        alike = coverage.Cosines(visual)
        centres = coverage.facility_location(alike, real.float(), real, context.count, self.sample)
        at, true = selection.compact(centres)
        profile = normalize(to_words, dim=-1)
        mixed = torch.lerp(alike.to(at), profile @ selection.gather_rows(profile, at).transpose(1, 2), self.text)
        # Padded by one dummy word, since `amax` fails if no prompt has a question.
        relevance = pad(to_words.masked_fill(~context.text_mask[:, None], -1.0), (0, 1), value=-1.0).amax(-1)
        best = self._one_each(mixed.masked_fill(~true[:, None], -2.0), relevance, at, true, real)
        chosen = torch.zeros_like(columns).scatter_add(1, best, true.long()) > 0
        return Kept(torch.zeros_like(context.alive).scatter(1, columns, chosen & real) & context.alive)

    def _one_each(
        self, alike: Tensor, relevance: Tensor, at: Tensor, true: Tensor, real: Tensor
    ) -> Int[Tensor, "batch centres"]:
        """Best token of each cluster, by similarity to the centre `at` its column, where `true`, and by relevance."""
        own = torch.where(true, 3.0, -2.0)[:, None]
        home = alike.scatter(1, at[:, None], own).argmax(2)  # a centre joins its own cluster
        worth = torch.lerp(alike.gather(2, home[..., None])[..., 0], relevance, self.text)
        member = (home[:, None] == torch.arange(at.shape[1], device=at.device)[:, None]) & real[:, None]
        return worth[:, None].masked_fill(~member, -5.0).argmax(2)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """FLOPs of TATCS where it selected: cosines with words and between tokens, and the greedy gains."""
        visual, text, kept = visual.double(), text.double(), kept.double()
        seen = coverage.covered(visual, self.sample)
        products = 2 * visual * (seen + text) * width + 2 * visual * kept * text
        return torch.where(visual > kept, products + 2 * kept * visual * seen, 0.0)


def _share(values: Tensor, alive: Tensor) -> Tensor:
    """Normalise non-negative values to sum 1 over the alive tokens."""
    values = values * alive
    return values / values.sum(1, keepdim=True).clamp(min=1e-12)
