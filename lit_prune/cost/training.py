"""Estimate a training run from sizes alone: FLOPs, seconds, and bytes on each GPU; nothing runs.

The estimate is as good as its assumptions. FLOPs are those that `lit_prune.cost.step` counts in a real step, weights
are counted exactly, activations are those that autograd saves in a frozen layer. Seconds depend on the assumed share of
the peak; memory leaves out what is freed before backward begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.cost.flops import CARRIER, ModelSize, decoder_layer
from lit_prune.cost.plan import Training
from lit_prune.cost.step import step_flops, visual_of
from lit_prune.cost.trace import WORTH, Trace, left_out, plan
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter

STAGES = {"ddp": 0, "deepspeed_1": 1, "deepspeed_2": 2, "deepspeed_3": 3}  # ZeRO stage
PASSES = 3  # in which ZeRO-3 gathers the frozen weights: teacher, student, backward
USUAL = Training()
ADAM = 8  # bytes per parameter of its two moments


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters: of the frozen model, of one of its decoder layers, and of the plug-in.

    `bytes_per_value`: of the frozen weights.
    """

    frozen: int
    layer: int
    trained: int
    bytes_per_value: int = 2


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a training sample: visual, text before the answer, and the trained answer."""

    visual: int
    text: int
    answers: int


@dataclass(frozen=True)
class PlannedStep:
    """Traces that teacher and student of one sample would leave in a training step, and its number of answer tokens."""

    teacher: Trace
    student: Trace
    answers: int


@dataclass(frozen=True)
class Estimate:
    """Work and memory of one rank. FLOPs and seconds are per batch, forward and backward, except `step` and `run`.

    `memory`: bytes at the start of backward, by use.
    """

    flops: float
    repeated: float  # FLOPs that checkpointing repeats
    compute: float
    transfer: float
    step: float
    run: float
    rate: float  # samples a second, on all ranks
    memory: dict[str, float]


def plan_step(
    schedule: Mapping[int, int],
    tokens: TokenCounts,
    depth: int,
    pruner: PruningMethod,
    repair: RepairAdapter | None = None,
    training: Training = USUAL,
) -> PlannedStep:
    """Plan a training step of one sample, as `PruneModule` runs it.

    The student starts at the first stage from the teacher's states; the teacher stops after the last repaired layer, or
    has a backward pass where its saliency is read, and doesn't run at all where a cache knows the sample.
    """
    visual, text = tokens.visual, tokens.text + tokens.answers
    teacher = plan({}, visual, text, depth)
    student = plan(schedule, visual, text, depth, pruner, repair, question=tokens.text)
    feeds = {} if repair is None else repair.feeds(sorted(schedule), depth)
    if feeds:
        student.repaired = torch.tensor([tokens.answers])
    start = pruner.walk(depth)[0]
    reads = start.pruner.reads(start.index)
    first = min(schedule) - int(reads is not None and reads.layer == "previous")
    learned = min(schedule) if any(True for _ in pruner.parameters()) else min(feeds, default=depth) + 1
    stop = max(feeds, default=depth - 1) + 1
    full = pruner.arriving(schedule, visual) + text
    lengths = student.queries if training.mode == "drop" else [torch.tensor([full])] * depth
    nothing = torch.tensor([0])
    teacher.ran = [nothing if i >= stop and not training.saliency else n for i, n in enumerate(teacher.queries)]
    student.ran = [nothing if i < first else length for i, length in enumerate(lengths)]
    teacher.learning, student.learning = teacher.ran, student.ran
    teacher.learns = [training.saliency and i >= min(schedule) for i in range(depth)]
    student.learns = [i >= learned for i in range(depth)]
    if training.backward == "kept" and training.mode == "soft":
        alone = [i >= min(schedule) and full - int(left) >= WORTH * full for i, left in enumerate(student.queries)]
        student.learning = [
            left if kept else ran for kept, left, ran in zip(alone, student.queries, student.ran, strict=True)
        ]
    if training.teacher_cache:
        student.ran = lengths
        teacher = left_out(student)
    return PlannedStep(teacher, student, tokens.answers)


def _carried(size: ModelSize, soft: bool) -> int:
    """Channels of a head, with those that carry a bias per key under soft masks."""
    return size.head_dim + (CARRIER if soft else 0)


def kept_bytes(size: ModelSize, tokens: Tensor, bytes_per_value: int, soft: bool) -> Tensor:
    """Bytes that autograd saves in one frozen decoder layer with SwiGLU and RMSNorm, for each number of tokens.

    Frozen weights need no saved inputs. What remains are the inputs of both norms in float32, inputs and output of
    attention with one log-sum-exp per head, and the three factors of the MLP's product.
    """
    head = _carried(size, soft)
    attention = (2 * size.heads + 2 * size.key_heads) * head * bytes_per_value + 4 * size.heads
    return tokens.double() * (2 * 4 * size.width + attention + 3 * size.mlp * bytes_per_value)


def activation_bytes(student: Trace, size: ModelSize, bytes_per_value: int, soft: bool, checkpointing: bool) -> float:
    """Bytes that a student's decoder saves for backward, summed over the trace's samples.

    Of rows that run beside those that learn, their keys and values.
    """
    reached = [layer for layer, learns in enumerate(student.learns) if learns]
    if not reached:
        return 0.0
    tokens, ran = (torch.stack(lengths)[reached].sum(1) for lengths in (student.learning, student.ran))
    beside = (ran - tokens).double() * 2 * size.key_heads * _carried(size, soft) * bytes_per_value
    layers = kept_bytes(size, tokens, bytes_per_value, soft) + beside
    if checkpointing:
        return (ran.sum() * size.width * bytes_per_value + layers.max()).item()
    return layers.sum().item()


def repeated_flops(student: Trace, size: ModelSize) -> float:
    """FLOPs of recomputing a student's layers in backward, except the MLP's last product, whose output isn't needed."""
    visual = visual_of(student, student.ran)
    return sum(
        (decoder_layer(size, ran, ran, [layer], visual[layer]) - 2 * ran.double() * size.width * size.mlp).sum().item()
        for layer, (ran, learns) in enumerate(zip(student.ran, student.learns, strict=True))
        if learns
    )


def estimate(
    training: Training,
    step: PlannedStep,
    size: ModelSize,
    weights: Weights,
    pruner: PruningMethod,
    repair: RepairAdapter | None = None,
) -> Estimate:
    """Estimate a run in which every sample is like the planned one."""
    batch, stage, ranks = training.batch_size, STAGES[training.strategy], training.gpus
    flops = batch * step_flops(step.teacher, step.student, size, pruner, repair, step.answers).item()
    both = sum(repeated_flops(trace, size) for trace in (step.student, step.teacher))
    repeated = batch * both if training.checkpointing else 0.0
    bytes_per_value, soft = weights.bytes_per_value, training.mode == "soft"
    each = ((step.student, soft), (step.teacher, False))  # one after the other: the teacher's are freed by then
    kept = max(activation_bytes(trace, size, bytes_per_value, masks, training.checkpointing) for trace, masks in each)
    frozen = weights.frozen * bytes_per_value
    # Share that each rank holds of Adam's moments, gradients and weights.
    share = [1 / ranks if stage >= split else 1.0 for split in (1, 2, 3)]
    memory = {
        "frozen model": frozen * share[2],
        "layers gathered": 2 * weights.layer * bytes_per_value if stage == 3 else 0.0,
        "plug-in": weights.trained * 4 * share[2],
        "gradients": weights.trained * 4 * share[1],
        "Adam": weights.trained * ADAM * share[0],
        "activations": batch * kept,
        "logits": batch * step.answers * size.vocab * (bytes_per_value + 8),
        "reserve": training.reserve * 1e9,
    }
    others = (ranks - 1) / ranks
    compute = (flops + repeated) / (training.peak * 1e12 * training.utilisation)
    transfer = PASSES * frozen * others / (training.bandwidth * 1e9) if stage == 3 else 0.0
    reduced = 2 * weights.trained * 4 * others / (training.bandwidth * 1e9)
    seconds = training.accumulate * max(compute, transfer) + reduced
    rate = ranks * batch * training.accumulate / seconds
    return Estimate(flops, repeated, compute, transfer, seconds, training.samples / rate, rate, memory)
