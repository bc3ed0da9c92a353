"""RCP's cross-attention pruner (Representation Consistency Pruner, arXiv 2604.04972).

Values marked [R] were read in drafts of the method, [ours] are this project's choice; all are arguments.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops import selection
from lit_prune.pruners.base import AttentionRows, Context, Dims, Kept, Pruner


class CrossAttentionScorer(nn.Module):
    """Correction of one pruning layer's intrinsic attention: S_a + S_t + bias.

    S_a: learnable queries, shifted by the projected mean of the question, attend to the visual tokens kept so far; a
    linear layer, initialised as the mean, combines their weights. S_t: a score per token, whose last layer is
    initialised to zero.
    """

    def __init__(
        self, width: int, inner: int, queries: int, heads: int, dropout: float, bias: float, relative: bool
    ) -> None:
        super().__init__()
        self.heads, self.relative = heads, relative
        self.queries = nn.Parameter(torch.randn(queries, inner) * inner**-0.5)
        self.question = nn.Linear(width, inner)
        self.question_norm = nn.LayerNorm(inner)
        self.key = nn.Linear(width, inner)
        self.fold = nn.Linear(queries, 1, bias=False)
        self.token = nn.Linear(width, inner)
        self.token_score = nn.Sequential(
            nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, inner // 2), nn.GELU(), nn.Linear(inner // 2, 1)
        )
        self.bias = nn.Parameter(torch.full((1,), float(bias)))  # DeepSpeed doesn't support 0-d parameters
        nn.init.constant_(self.fold.weight, 1.0 / queries)
        nn.init.zeros_(self.token_score[-1].weight)
        nn.init.zeros_(self.token_score[-1].bias)

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        alive: Bool[Tensor, "batch visual"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"],
    ) -> Float[Tensor, "batch visual"]:
        """Correction to the log attention of every visual token."""
        return self._attention_score(visual, alive, text, text_mask) + self._token_score(visual)

    def _question(self, text: Tensor, text_mask: Tensor) -> Tensor:
        weight = text_mask.to(text.dtype)[..., None]
        mean = (text * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return self.question_norm(self.question(mean))

    def _attention_score(self, visual: Tensor, alive: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        batch, tokens, _ = visual.shape
        queries = self.queries + self._question(text, text_mask)[:, None]
        queries = queries.view(batch, -1, self.heads, queries.shape[-1] // self.heads).transpose(1, 2)
        keys = self.key(visual).view(batch, tokens, self.heads, -1).transpose(1, 2)
        logits = queries @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
        lowest = torch.finfo(logits.dtype).min  # not -inf, which gives NaN for a sample without an image
        weights = logits.masked_fill(~alive[:, None, None], lowest).softmax(-1).mean(1)
        score = self.fold(weights.transpose(1, 2)).squeeze(-1)
        return score * alive.sum(1, keepdim=True) if self.relative else score

    def _token_score(self, visual: Tensor) -> Tensor:
        return self.token_score(self.token(visual)).squeeze(-1) + self.bias


class RCP(Pruner):
    """Cross-attention pruners that correct the model's own attention, with cumulative masks over several layers.

    logits = log att - mean_kept(log att) + S_a + S_t + bias. Training selects with `select` and passes straight-through
    gradients with logistic noise and temperature; a token pruned at one stage never returns (the host multiplies the
    gates).

    Args:
        layers: pruning layers [R]: 4/14/24 of 32 for 192 or 128 tokens on average, 1/13/25 for 64.
        stage_ratios: relative counts of the stages for `select: topk` [R, kept shares at 64: 16.7/4.6/1.4 %].
        depth: depth of the decoder that `layers` is written for; `None`: as written.
        select: `threshold` (paper: sigmoid > 0.5, counts per sample, reached by the budget loss), `topk` [ours], or
            `mass` [ours]: the fewest tokens that hold the share `keep_mass` of softmax(logits), so that images with
            confident logits keep fewer; `jobs/adapt.py` finds the share for an average budget.
        inner: width of the pruner [R: 512 for 7B]. queries: learnable queries [R: 16]. heads: [R: 4].
        dropout: [R: 0.2]. bias: initial value of the learnable bias [R: +2, which keeps more tokens at the start].
        baseline: `attention` (paper) or `none`, without intrinsic attention, for the ablation.
        attention_floor: lower clamp of attention before the log [R: 1e-6].
        attention_layer: layer of the baseline's attention: the pruning layer's `own` (paper), whose keys are projected
            in advance for all tokens, or the `previous` layer's, which is computed anyway [ours].
        attention_score: `weight`, S_a is the aggregated attention weight (paper), or `relative`, the same in units of
            the uniform weight 1 / tokens, so that a short training run can change it [ours].
    """

    repairs = True

    def __init__(
        self,
        layers: Sequence[int] = (1, 13, 25),
        stage_ratios: Sequence[float] | None = (16.7, 4.6, 1.4),
        depth: int | None = None,
        select: Literal["threshold", "topk", "mass"] = "threshold",
        inner: int = 512,
        queries: int = 16,
        heads: int = 4,
        dropout: float = 0.2,
        bias: float = 2.0,
        baseline: Literal["attention", "none"] = "attention",
        attention_floor: float = 1e-6,
        attention_score: Literal["weight", "relative"] = "weight",
        attention_layer: Literal["own", "previous"] = "own",
        keep_mass: float = 0.9,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_number("pruner.inner", inner, least=2, whole=True)
        check_number("pruner.queries", queries, least=1, whole=True)
        check_number("pruner.heads", heads, least=1, whole=True)
        check_number("pruner.dropout", dropout, least=0, below=1)
        check_number("pruner.bias", bias)
        check_number("pruner.attention_floor", attention_floor, above=0, below=1)
        check_number("pruner.keep_mass", keep_mass, above=0, most=1)
        if inner % heads:
            raise LitPruneError(f"inner={inner} must be a multiple of heads={heads}")
        self.select, self.inner, self.queries, self.heads = select, inner, queries, heads
        self.dropout, self.bias, self.baseline, self.attention_floor = dropout, bias, baseline, attention_floor
        self.attention_score, self.attention_layer, self.keep_mass = attention_score, attention_layer, keep_mass
        self.attention = AttentionRows(attention_layer, "question")
        # Set by `anneal` between steps, never in forward.
        self.tau, self.noise = 1.0, 0.0
        self.scorers = nn.ModuleList()

    @property
    def title(self) -> str:
        """Published name, marked if the budget is adaptive."""
        return "RCP, adaptive" if self.select == "mass" else "RCP"

    @property
    def free(self) -> bool:
        """True for `threshold` and `mass`, whose counts vary."""
        return self.select != "topk"

    def exact(self, stage: int) -> bool:
        """True for `topk`."""
        return not self.free

    def anneal(self, tau: float, noise: float) -> None:
        """Set temperature and noise of the straight-through gate."""
        self.tau, self.noise = tau, noise

    def build(self, dims: Dims) -> None:
        """Create one scorer per pruning layer for the host's hidden size."""
        if not self.scorers:
            make = (
                dims.width,
                self.inner,
                self.queries,
                self.heads,
                self.dropout,
                self.bias,
                self.attention_score == "relative",
            )
            self.scorers.extend(CrossAttentionScorer(*make) for _ in self.layers)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Logits: the centred log attention plus the learned correction."""
        scorer = self.scorers[context.stage]
        dtype = next(scorer.parameters()).dtype
        correction = scorer(context.visual.to(dtype), context.alive, context.text.to(dtype), context.text_mask).float()
        return correction if self.baseline == "none" else correction + self._baseline(context)

    def _baseline(self, context: Context) -> Tensor:
        log_attention = context.attention.float().clamp(min=self.attention_floor).log()
        kept = context.alive.float()
        centre = (log_attention * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1.0)
        return (log_attention - centre).detach()

    def prune(self, context: Context) -> Kept:
        """Keep mask from the logits; the training gate has the gradient of sigmoid((logits - cut + noise) / tau)."""
        logits = self.score(context)
        noise = selection.logistic_noise(logits) * self.noise if self.training and self.noise > 0 else 0.0
        noisy = logits + noise
        if self.select == "threshold":
            mask, cut = selection.threshold(noisy, context.alive, images=context.images), 0.0
        else:
            if self.select == "mass":
                mask = selection.top_mass(noisy.detach(), context.alive, self.keep_mass)
            else:
                mask = selection.top_k(noisy, context.alive, context.count, context.images)
            cut = self._cut(noisy, mask, context.alive, context.images)
        if not self.training:
            return Kept(mask, scores=logits)
        # Forward is the hard mask; backward is that of the sigmoid around the decision's cut.
        soft = torch.sigmoid((noisy - cut) / self.tau)
        return Kept(mask, selection.straight_through(mask, soft), logits)

    @staticmethod
    def _cut(logits: Tensor, mask: Tensor, alive: Tensor, images: selection.Images | None) -> Tensor:
        """Cut of top-k: midway between the lowest kept and the highest dropped logit, without gradient [ours]."""
        logits = logits.detach()
        worst = logits.masked_fill(~mask, float("inf"))
        best = logits.masked_fill(mask | ~alive, float("-inf"))
        if images is None:
            worst, best = worst.amin(1, keepdim=True), best.amax(1, keepdim=True)
        else:
            worst, best = images.spread(images.amin(worst)), images.spread(-images.amin(-best))
        return torch.where(best.isfinite() & worst.isfinite(), (worst + best) / 2, torch.zeros_like(worst))

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """FLOPs of one scorer over V visual tokens: key and token projections, queries, MLP."""
        visual = visual.to(torch.float64)
        per_token = 2 * width * self.inner * 2 + 2 * self.queries * self.inner + 2 * self.queries
        per_token += 2 * self.inner * (self.inner // 2) + 2 * (self.inner // 2)
        return visual * per_token + 2 * width * self.inner
