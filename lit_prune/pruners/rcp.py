"""RCP's cross-attention pruner (Representation Consistency Pruner, arXiv 2604.04972).

Values marked [R] were read in drafts of the method, [ours] are this project's choice; all are arguments.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_choice, check_number, check_numbers
from lit_prune.ops import selection
from lit_prune.pruners.base import AttentionRows, Context, Dims, Kept, Pruner
from lit_prune.pruners.rcp_scorers import SCORERS


class RCP(Pruner):
    """Cross-attention pruners that correct the model's own attention, with cumulative masks over several layers.

    logits = log att - mean_kept(log att) + S_a + S_t + bias. Training selects with `select` and passes straight-through
    gradients with logistic noise and temperature; a token pruned at one stage never returns (the host multiplies the
    gates).

    Args:
        layers: pruning layers [R]: 4/14/24 of 32 for 192 or 128 tokens on average, 1/13/25 for 64.
        stage_ratios: relative counts of the stages for `select: topk` [R, kept shares at 64: 16.7/4.6/1.4 %].
        depth: depth of the decoder that `layers` is written for; `None`: as written.
        select: `threshold` (paper: sigmoid > 0.5, counts per sample, reached by the budget loss; a stage to which the
            budget leaves all tokens keeps them), `topk` [ours], or `mass` [ours]: the fewest tokens that hold the share
            `keep_mass` of softmax(logits), one share or one for each stage, so that images with confident logits keep
            fewer; `jobs/adapt.py` finds the shares for an average budget.
        inner: width of the pruner [R: 512 for 7B]. queries: learnable queries [R: 16]. heads: [R: 4].
        dropout: [R: 0.2]. bias: initial value of the learnable bias [R: +2, which keeps more tokens at the start].
        baseline: `attention` (paper) or `none`, without intrinsic attention, for the ablation.
        attention_floor: lower clamp of attention before the log [R: 1e-6].
        attention_layer: layer of the baseline's attention: the pruning layer's `own` (paper), whose keys are projected
            in advance for all tokens, or the `previous` layer's, which is computed anyway [ours].
        attention_score: `weight`, S_a is the aggregated attention weight (paper), or `relative`, the same in units of
            the uniform weight 1 / tokens, so that a short training run can change it [ours].
        form: of the scorers, `published`, or `first`, which plug-ins from before this argument have [ours]; see
            `rcp_scorers`.
        inference_threshold: `select: threshold` keeps a token if sigmoid(logit) is above it, in inference [R: 0.5;
            development runs also 0.3 and 0.4]. Training always decides at 0.5.
        baseline_gradient: pass gradients through the log attention to the gates of earlier stages [ours: off, the
            baseline is a constant; the paper doesn't say]. Needs `attention_layer: own`.
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
        keep_mass: float | Sequence[float] = 0.9,
        form: Literal["published", "first"] = "published",
        inference_threshold: float = 0.5,
        baseline_gradient: bool = False,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_choice("pruner.form", form, SCORERS)
        check_number("pruner.inference_threshold", inference_threshold, above=0, below=1)
        check_number("pruner.inner", inner, least=2, whole=True)
        check_number("pruner.queries", queries, least=1, whole=True)
        check_number("pruner.heads", heads, least=1, whole=True)
        check_number("pruner.dropout", dropout, least=0, below=1)
        check_number("pruner.bias", bias)
        check_number("pruner.attention_floor", attention_floor, above=0, below=1)
        if not isinstance(keep_mass, Sequence):
            check_number("pruner.keep_mass", keep_mass, above=0, most=1)
        elif len(keep_mass) != len(self.layers):
            raise LitPruneError(f"pruner.keep_mass has {len(keep_mass)} shares for {len(self.layers)} stages")
        else:
            check_numbers("pruner.keep_mass", keep_mass, above=0, most=1)
        if inner % heads:
            raise LitPruneError(f"inner={inner} must be a multiple of heads={heads}")
        if baseline_gradient and attention_layer != "own":
            raise LitPruneError("pruner.baseline_gradient needs attention_layer: own; others are read without gradient")
        self.select, self.inner, self.queries, self.heads = select, inner, queries, heads
        self.dropout, self.bias, self.baseline, self.attention_floor = dropout, bias, baseline, attention_floor
        self.attention_score, self.attention_layer, self.keep_mass = attention_score, attention_layer, keep_mass
        self.form, self.inference_threshold, self.baseline_gradient = form, inference_threshold, baseline_gradient
        self.attention = AttentionRows(attention_layer, "question", gradient=baseline_gradient)
        # Set by `anneal` and `relax` between steps, never in forward.
        self.tau, self.noise, self.surplus = 1.0, 0.0, 0.0
        self.scorers = nn.ModuleList()

    @property
    def title(self) -> str:
        """Published name, marked if the budget is adaptive or no layer sees all tokens."""
        first = " from layer 0" if 0 in self.layers else ""
        return f"RCP{first}, adaptive" if self.select == "mass" else f"RCP{first}"

    @property
    def free(self) -> bool:
        """True for `threshold` and `mass`, whose counts vary."""
        return self.select != "topk"

    def exact(self, stage: int) -> bool:
        """True for `topk`, unless the counts of a training step are raised."""
        return not self.free and not (self.training and self.surplus)

    def anneal(self, tau: float, noise: float) -> None:
        """Set temperature and noise of the straight-through gate."""
        self.tau, self.noise = tau, noise

    def relax(self, surplus: float) -> None:
        """Set the share of the tokens above the scheduled counts that `topk` keeps in training."""
        self.surplus = surplus

    def build(self, dims: Dims) -> None:
        """Create one scorer per pruning layer for the host's hidden size."""
        if not self.scorers:
            relative = self.attention_score == "relative"
            sizes = (dims.width, self.inner, self.queries, self.heads, self.dropout, self.bias, relative)
            self.scorers.extend(SCORERS[self.form](*sizes) for _ in self.layers)

    def take_form(self, form: str, dims: Dims) -> None:
        """Rebuild the scorers in another form, on the same device."""
        device = next(self.parameters()).device
        self.form, self.scorers = form, nn.ModuleList()
        self.build(dims)
        self.to(device)

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
        baseline = log_attention - centre
        return baseline if self.baseline_gradient else baseline.detach()

    def prune(self, context: Context) -> Kept:
        """Keep mask from the logits; the training gate has the gradient of sigmoid((logits - cut + noise) / tau)."""
        logits = self.score(context)
        noise = selection.logistic_noise(logits) * self.noise if self.training and self.noise > 0 else 0.0
        noisy = logits + noise
        cut = 0.0
        if self.select == "threshold":
            lowest = 0.0 if self.training else math.log(self.inference_threshold / (1 - self.inference_threshold))
            mask = selection.threshold(noisy - lowest, context.alive, images=context.images)
            mask = mask | ((context.count >= context.total)[:, None] & context.alive)
        else:
            if self.select == "mass":
                mass = self.keep_mass[context.stage] if isinstance(self.keep_mass, Sequence) else self.keep_mass
                mask = selection.top_mass(noisy.detach(), context.alive, mass)
            else:
                mask = selection.top_k(noisy, context.alive, self._count(context), context.images)
            cut = self._cut(noisy, mask, context.alive, context.images) if self.training else cut
        if not self.training:
            return Kept(mask, scores=logits)
        # Forward is the hard mask; backward is that of the sigmoid around the decision's cut.
        soft = torch.sigmoid((noisy - cut) / self.tau)
        share = soft.detach()
        return Kept(mask, selection.straight_through(mask, soft), logits, slope=share * (1 - share) / self.tau)

    def _count(self, context: Context) -> Tensor:
        """Tokens that `topk` keeps of each sample: as scheduled, or in training more, as far as they are `relax`ed."""
        if not (self.training and self.surplus):
            return context.count
        surplus = (context.total - context.count).clamp(min=0)
        return context.count + (surplus * self.surplus).ceil().long()

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
        """FLOPs of one scorer."""
        sizes = (width, self.inner, self.queries)
        scorer = SCORERS[self.form]
        return visual.to(torch.float64) * scorer.flops_per_token(*sizes) + scorer.flops_per_sample(*sizes)
