"""Losses of RCP, and the schedules of temperature, noise and budget target (arXiv 2604.04972).

Values marked [R] were read in drafts of the method; all are arguments.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_prune.errors import check_number
from lit_prune.host import Record
from lit_prune.ops.budget import Budget, Share, asked, spans
from lit_prune.ops.moments import Moments, joined, moment_loss, moments


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses.

    Args:
        task: cross entropy of the answers [R: 1.5].
        repair: moment matching on answer states [R: 3.0].
        budget: |actual - target| share of visual tokens; only `select: threshold` needs it [R: 200].
        variance: weight `a` of the variances inside the repair loss [R: 3.0]; 0 matches means only.
        stagewise: that loss holds every stage to its own count, as `stage_ratios` share the budget out, in each sample:
            some can meet the average at the others' cost [ours; the paper's loss is of the average].
        relative: divide the states by the teacher's root mean square in that layer before matching moments, so that one
            weight suits models whose states differ in scale [ours; the paper's loss is absolute].
        distill: KL to the teacher's answer distribution; not in the paper, off by default.
        attention: KL of each stage's scores from the attention in the teacher's later layers (`model.watch`), a direct
            training signal for every token; not in the paper, off by default [ours].
        sharpen: exponent applied to that attention, most of which is spread thinly over irrelevant tokens [ours].
        saliency: KL of each stage's scores from the teacher's saliency there, how much the margin of its answer depends
            on each visual token: the norm of the gradient by the token's state at the stage's layer. Like `attention` a
            signal for every token, but nothing has to be known of the layers. Costs a backward pass of the teacher; not
            in the paper, off by default [ours].

    Raises:
        LitPruneError: a weight is negative or not finite.
    """

    task: float = 1.5
    repair: float = 3.0
    budget: float = 200.0
    variance: float = 3.0
    stagewise: bool = False
    relative: bool = False
    distill: float = 0.0
    attention: float = 0.0
    sharpen: float = 3.0
    saliency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("task", "repair", "budget", "variance", "distill", "attention", "saliency"):
            check_number(f"model.loss.{name}", getattr(self, name), least=0)
        check_number("model.loss.sharpen", self.sharpen, above=0)


@dataclass(frozen=True)
class Anneal:
    """Schedules over the share of completed steps, in [0, 1].

    Args:
        tau_start: temperature of the straight-through gate at the start [R: 1.5].
        tau_end: temperature at the end [R: 0.2].
        tau_share: share of the steps over which it decreases linearly [R: 0.6].
        noise: scale of the logistic noise; 0 turns it off.
        quiet_share: final share of the steps without noise, so that training matches the inference rule [R: 0.2].
        target_share: share of the steps over which the budget's target decreases from 1, along a cosine [R: 0.1]. The
            counts of `select: topk` follow it in training [ours]; 0: the budget holds from the first step on.

    Raises:
        LitPruneError: a temperature is not above 0, a share is outside [0, 1], or the noise is negative.
    """

    tau_start: float = 1.5
    tau_end: float = 0.2
    tau_share: float = 0.6
    noise: float = 1.0
    quiet_share: float = 0.2
    target_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("tau_start", "tau_end"):
            check_number(f"model.anneal.{name}", getattr(self, name), above=0)
        for name in ("tau_share", "quiet_share", "target_share"):
            check_number(f"model.anneal.{name}", getattr(self, name), least=0, most=1)
        check_number("model.anneal.noise", self.noise, least=0)

    def tau(self, done: float) -> float:
        """Temperature after a share `done` of the steps."""
        return self.tau_end + (self.tau_start - self.tau_end) * max(0.0, 1.0 - done / max(self.tau_share, 1e-9))

    def noise_scale(self, done: float) -> float:
        """Scale of the logistic noise after a share `done` of the steps."""
        return self.noise if done < 1.0 - self.quiet_share else 0.0

    def target(self, final: float | Tensor, done: float) -> float | Tensor:
        """Target share of visual tokens, from 1 to `final`."""
        return final + (1.0 - final) * surplus if (surplus := self.surplus(done)) else final

    def surplus(self, done: float) -> float:
        """Share of the tokens above the final target that are still wanted, from 1 to 0."""
        if done >= self.target_share:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * done / self.target_share))


def answer_loss(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Cross entropy per answer token, in float32; 0 without answer tokens."""
    if not len(targets):  # an empty sum keeps the graph, so that backward runs on every rank
        return logits.float().sum()
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def repair_loss(student: Record, teacher: Record, layers: list[int], weights: LossWeights) -> Float[Tensor, ""]:
    """Mean over the repair layers of the moment distance between student and teacher on answer positions."""
    parts = []
    for layer in layers:
        with torch.no_grad():
            target = target_moments(teacher, layer)
            power = (target.mean.square() + target.var).mean() if weights.relative else torch.ones_like(target.var[0])
            power = power.clamp(min=torch.finfo(power.dtype).tiny)  # without an answer token it is 0
        own = moments(student.hidden[layer])
        own, target = (Moments(m.mean / power.sqrt(), m.var / power) for m in (own, target))
        parts.append(moment_loss(own, target, weights.variance))
    return torch.stack(parts).mean()


def target_moments(teacher: Record, layer: int) -> Moments:
    """Moments of the teacher's answer states after a layer, over the global batch."""
    return joined(teacher.per_sample[layer]) if layer in teacher.per_sample else moments(teacher.hidden[layer])


def budget_share(keep: Budget, total: Int[Tensor, " batch"], depth: int = 1) -> float:
    """Share of a sample's visual tokens that a budget keeps, averaged over the samples with an image; 1 without any.

    `depth`: number of decoder layers, over which a schedule is averaged.
    """
    shares = [asked(keep, n, depth) / n for n in total.tolist() if n]
    return mean(shares) if shares else 1.0


def tokens_asked(
    keep: Budget, total: Int[Tensor, " batch"], anneal: Anneal, done: float, depth: int = 1
) -> Float[Tensor, " batch"]:
    """Visual tokens requested of each sample after a share `done` of the steps, float64; for logging, not training.

    `total`: the sample's visual tokens, 0 without an image. `depth`: see `budget_share`. The device isn't synchronised.
    """
    own = total.double()
    if isinstance(keep, Share):
        final = (keep.percent / 100 * own).round().clamp(min=1).minimum(own)
    elif isinstance(keep, dict):
        most, ruled = [None, *keep.values()], spans((0, *keep), depth)
        final = sum(n * (own if k is None else own.clamp(max=k)) for n, k in zip(ruled, most, strict=True)) / depth
    else:
        final = own.clamp(max=keep)
    return anneal.target(final / own.clamp(min=1), done) * own


def visual_share(record: Record, depth: int) -> Float[Tensor, ""]:
    """Share of visual tokens over the decoder layers: (n_0 + sum_i n_i mean(c_i)) / depth, with gradients.

    The cumulative gate is averaged over each sample's visual tokens, then over the samples with an image; 1 if none
    has one.
    """
    layers = tuple(stage.layer for stage in record.stages)
    total = record.trace.total_visual
    if not layers:
        return torch.ones((), device=total.device)
    pictured = (total > 0).float()
    share = torch.tensor(float(layers[0]), device=total.device)
    for stage, ruled in zip(record.stages, spans(layers, depth), strict=True):
        kept = stage.gate.sum(1) / total.clamp(min=1)
        share = share + ruled * (kept * pictured).sum() / pictured.sum().clamp(min=1.0)
    return share / depth


def stagewise_distance(record: Record, depth: int, anneal: Anneal, done: float) -> Float[Tensor, ""]:
    """Mean over the samples with an image of how far each stage's share is from its schedule's, over the layers."""
    total = record.trace.total_visual
    pictured, distance = (total > 0).float(), torch.zeros(len(total), device=total.device)
    layers = tuple(stage.layer for stage in record.stages)
    for stage, ruled in zip(record.stages, spans(layers, depth), strict=True):
        counts = stage.count.minimum(total)
        final, share = (part / total.clamp(min=1) for part in (counts, stage.gate.sum(1)))
        distance = distance + ruled * (share - anneal.target(final, done)).abs()
    return (distance * pictured).sum() / pictured.sum().clamp(min=1.0) / depth


def distillation(student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
    """KL(teacher || student) per answer token."""
    return torch.nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def attention_loss(student: Record, teacher: Record, sharpen: float) -> Float[Tensor, ""]:
    """KL of each stage's scores, a distribution over the tokens present there, from the teacher's watched attention.

    The target is the mean over the watched layers to the power `sharpen`, renormalised over those tokens; samples
    without an image contribute 0. Stages whose scores have no gradient are left out.
    """
    if not student.stages:
        return torch.zeros((), device=student.trace.total_visual.device)
    watched = torch.stack(list(teacher.attention.values())).mean(0)
    # Divide by the maximum first, so that the power doesn't underflow.
    watched = (watched / watched.amax(1, keepdim=True).clamp(min=1e-9)).pow(sharpen)
    return _from_targets(student, {stage.layer: watched for stage in student.stages})


def saliency_loss(student: Record, teacher: Record) -> Float[Tensor, ""]:
    """KL of each stage's scores from the teacher's saliency at that stage, likewise."""
    if not student.stages:
        return torch.zeros((), device=student.trace.total_visual.device)
    return _from_targets(student, teacher.saliency)


def _from_targets(student: Record, targets: Mapping[int, Float[Tensor, "batch grid"]]) -> Float[Tensor, ""]:
    """Mean over the stages of the KL of their scores from unnormalised targets, over the tokens present."""
    parts = []
    for stage in student.stages:
        if stage.scores is None or not stage.scores.requires_grad:
            continue
        alive = stage.scores.isfinite()
        target = targets[stage.layer].masked_fill(~alive, 0.0)
        target = target / target.sum(1, keepdim=True).clamp(min=1e-9)
        # The lowest finite value, not -inf: a sample without an image has no other entry, and softmax would give NaN.
        scores = stage.scores.masked_fill(~alive, torch.finfo(stage.scores.dtype).min).log_softmax(1)
        parts.append(
            torch.nn.functional.kl_div(scores, target, reduction="none").masked_fill(~alive, 0.0).sum(1).mean()
        )
    return torch.stack(parts).mean() if parts else student.stages[0].gate.new_zeros(())


def saliency(logits: Float[Tensor, "tokens vocab"], record: Record) -> dict[int, Float[Tensor, "batch grid"]]:
    """Compute how strongly a model's answer depends on each visual token, at each layer in its session's `derive`.

    The norm of the gradient of the answer's margin, the best logit less the second at each answer position, by the
    token's state at the layer's input; a sample's sum to 1, since their scale depends on how sure the model is.
    """
    best = logits.float().topk(2, dim=-1).values
    margin = (best[:, 0] - best[:, 1]).sum()
    gradients = torch.autograd.grad(margin, [entering.states for entering in record.entering.values()])
    found = {}
    for (layer, entering), gradient in zip(record.entering.items(), gradients, strict=True):
        strength = gradient.float().flatten(2).norm(dim=2).gather(1, entering.columns)
        strength = strength.masked_fill(~entering.real, 0.0)
        found[layer] = strength / strength.sum(1, keepdim=True).clamp(min=1e-20)
    return found
