"""What RCP trains for: the losses and how temperature, noise and target move during a run (arXiv 2604.04972).

Values marked [R] were read in drafts of the method; all are arguments.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_prune.errors import check_number
from lit_prune.host import Record
from lit_prune.ops.budget import Budget, Share, asked
from lit_prune.ops.moments import Moments, moment_loss, moments


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses.

    Args:
        task: cross entropy of the answers [R: 1.5].
        repair: moment repair loss [R: 3.0].
        budget: |actual - target| share of visual tokens; only `select: threshold` needs it [R: 200].
        variance: weight `a` of the variances inside the repair loss [R: 3.0]; 0 matches means only.
        relative: measure the repair loss in units of the teacher's root mean square of that layer, so that one weight
            suits models whose states differ in scale [ours; the paper's loss is absolute].
        distill: KL to the teacher's answer distribution; not in the paper, off by default.
        attention: KL of each stage's scores from the attention that the teacher's later layers pay (`model.watch`):
            tells every token at once whether it will be looked at; not in the paper, off by default [ours].
        sharpen: power of that attention, since most of it lies thinly on tokens that nobody needs [ours].

    Raises:
        LitPruneError: a weight below 0, or one that is not finite.
    """

    task: float = 1.5
    repair: float = 3.0
    budget: float = 200.0
    variance: float = 3.0
    relative: bool = False
    distill: float = 0.0
    attention: float = 0.0
    sharpen: float = 3.0

    def __post_init__(self) -> None:
        for name in ("task", "repair", "budget", "variance", "distill", "attention"):
            check_number(f"model.loss.{name}", getattr(self, name), least=0)
        check_number("model.loss.sharpen", self.sharpen, above=0)


@dataclass(frozen=True)
class Anneal:
    """Schedules over the share of steps done, in [0, 1].

    Args:
        tau_start: temperature of the straight-through gate at the start [R: 1.5].
        tau_end: temperature at the end [R: 0.2].
        tau_share: share of the steps over which it falls, linearly [R: 0.6].
        noise: scale of the logistic noise; 0 turns it off.
        quiet_share: last share of the steps without noise, so that training equals the inference rule [R: 0.2].
        target_share: share of the steps over which the budget's target falls from 1, along a cosine [R: 0.1].

    Raises:
        LitPruneError: a temperature that is not above 0, a share outside of [0, 1], a negative noise.
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
        """Scale of the logistic noise."""
        return self.noise if done < 1.0 - self.quiet_share else 0.0

    def target(self, final: float | Tensor, done: float) -> float | Tensor:
        """Target share of visual tokens, from 1 to `final`."""
        if done >= self.target_share:
            return final
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done / self.target_share))


def answer_loss(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Cross entropy per answer token, in float32; 0 where nothing is to be answered."""
    if not len(targets):
        return logits.float().sum()
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def repair_loss(student: Record, teacher: Record, layers: list[int], weights: LossWeights) -> Float[Tensor, ""]:
    """Mean over the repair layers of the moment distance between student and teacher on answer positions."""
    parts = []
    for layer in layers:
        with torch.no_grad():
            target = moments(teacher.hidden[layer])
            power = (target.mean.square() + target.var).mean() if weights.relative else torch.ones_like(target.var[0])
        found = moments(student.hidden[layer])
        found, target = (Moments(m.mean / power.sqrt(), m.var / power) for m in (found, target))
        parts.append(moment_loss(found, target, weights.variance))
    return torch.stack(parts).mean()


def budget_share(keep: Budget, total: Int[Tensor, " batch"], depth: int = 1) -> float:
    """Share of its own visual tokens that a budget leaves a sample: the mean over the samples with an image.

    1 where no sample has one: there is nothing to drop. `depth`: decoder layers, over which a schedule is averaged.
    """
    shares = [asked(keep, n, depth) / n for n in total.tolist() if n]
    return mean(shares) if shares else 1.0


def tokens_asked(
    keep: Budget, total: Int[Tensor, " batch"], anneal: Anneal, done: float, depth: int = 1
) -> Float[Tensor, " batch"]:
    """Visual tokens that a budget asks of each sample after a share `done` of the steps, float64; to log, not to train.

    `total` are its own; 0 where it has no image. `depth`: see `budget_share`. The device is asked nothing.
    """
    own = total.double()
    if isinstance(keep, Share):
        final = (keep.percent / 100 * own).round().clamp(min=1).minimum(own)
    elif isinstance(keep, dict):
        starts = [0, *keep, depth]
        most = [None, *keep.values()]
        ruled = [end - start for start, end in pairwise(starts)]
        final = sum(n * (own if k is None else own.clamp(max=k)) for n, k in zip(ruled, most, strict=True)) / depth
    else:
        final = own.clamp(max=keep)
    return anneal.target(final / own.clamp(min=1), done) * own


def visual_share(record: Record, depth: int) -> Float[Tensor, ""]:
    """Share of visual tokens over the decoder layers: (n_0 + sum_i n_i mean(c_i)) / depth, with gradients.

    The mean of a sample's cumulative gate is over its own visual tokens, then over the samples with an image; 1
    where no sample has one.
    """
    layers = [stage.layer for stage in record.stages]
    total = record.trace.total_visual
    if not layers:
        return torch.ones((), device=total.device)
    pictured = (total > 0).float()
    share = torch.tensor(float(layers[0]), device=total.device)
    for stage, end in zip(record.stages, [*layers[1:], depth], strict=True):
        kept = stage.gate.sum(1) / total.clamp(min=1)
        share = share + (end - stage.layer) * (kept * pictured).sum() / pictured.sum().clamp(min=1.0)
    return share / depth


def distillation(student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
    """KL(teacher || student) per answer token."""
    return torch.nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def attention_loss(student: Record, teacher: Record, sharpen: float) -> Float[Tensor, ""]:
    """KL of each stage's scores, as a distribution over the tokens then alive, from the teacher's watched attention.

    The target is the mean over the watched layers to the power `sharpen`, renormalised over those tokens; samples
    without an image count 0. Stages whose scores don't train are left out.
    """
    if not student.stages:
        return torch.zeros((), device=student.trace.total_visual.device)
    watched = torch.stack(list(teacher.attention.values())).mean(0)
    watched = (watched / watched.amax(1, keepdim=True).clamp(min=1e-9)).pow(sharpen)
    parts = []
    for stage in student.stages:
        if stage.scores is None or not stage.scores.requires_grad:
            continue
        alive = stage.scores.isfinite()
        target = watched.masked_fill(~alive, 0.0)
        target = target / target.sum(1, keepdim=True).clamp(min=1e-9)
        scores = stage.scores.masked_fill(~alive, torch.finfo(stage.scores.dtype).min).log_softmax(1)
        parts.append(
            torch.nn.functional.kl_div(scores, target, reduction="none").masked_fill(~alive, 0.0).sum(1).mean()
        )
    return torch.stack(parts).mean() if parts else watched.new_zeros(())
