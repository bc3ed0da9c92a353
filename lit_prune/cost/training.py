"""What a training run would take: FLOPs, seconds, and bytes on each GPU, from sizes alone; nothing runs.

An estimate, and as good as its assumptions. FLOPs are those that `lit_prune.cost.step` counts in a real step, weights
are counted to the last one, activations are what autograd keeps of a frozen layer. Seconds rest on the share of the
peak that is assumed; memory leaves out what is free again when backward begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.cost.flops import CARRIER, ModelSize, decoder_layer
from lit_prune.cost.plan import Training
from lit_prune.cost.step import step_flops
from lit_prune.cost.trace import Trace, plan

STAGES = {"ddp": 0, "deepspeed_1": 1, "deepspeed_2": 2, "deepspeed_3": 3}  # of ZeRO: what is split over the ranks
PASSES = 3  # in which ZeRO-3 gathers the frozen weights: teacher, student, backward
ADAM = 8  # bytes of its two moments


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters: of the frozen model, of its largest decoder layer, and of what trains."""

    frozen: int
    layer: int
    trained: int


@dataclass(frozen=True)
class Estimate:
    """What one rank does and holds. `flops` and seconds are of a batch, forward and backward, but for `step` and `run`.

    `memory`: bytes at the moment when backward begins, by what holds them.
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
    visual: int,
    text: int,
    answers: int,
    depth: int,
    pruner,
    repair=None,
    mode: str = "soft",
) -> tuple[Trace, Trace]:
    """Traces that teacher and student of one sample would leave in a training step, as `PruneModule` runs it.

    The student starts where the first stage is, from the teacher's states; the teacher stops behind the last repaired
    layer. `text` tokens stand before the answer of `answers`, which train.
    """
    teacher = plan({}, visual, text + answers, depth)
    student = plan(schedule, visual, text + answers, depth, pruner, repair, question=text)
    feeds = {} if repair is None else repair.feeds(sorted(schedule), depth)
    if feeds:
        student.repaired = torch.tensor([answers])
    start = pruner.walk(depth)[0]
    reads = start.pruner.reads(start.index)
    first = min(schedule) - int(reads is not None and reads.layer == "previous")
    learned = min(schedule) if any(True for _ in pruner.parameters()) else min(feeds, default=depth) + 1
    stop = max(feeds, default=depth - 1) + 1
    full = pruner.arriving(schedule, visual) + text + answers
    lengths = student.queries if mode == "drop" else [torch.tensor([full])] * depth
    nothing = torch.tensor([0])
    teacher.ran = [nothing if i >= stop else length for i, length in enumerate(teacher.queries)]
    student.ran = [nothing if i < first else length for i, length in enumerate(lengths)]
    teacher.learns, student.learns = [False] * depth, [i >= learned for i in range(depth)]
    return teacher, student


def kept_bytes(size: ModelSize, tokens: Tensor, bytes_per_value: int, soft: bool) -> Tensor:
    """Bytes that autograd keeps of one frozen decoder layer with SwiGLU and RMSNorm over so many tokens.

    Weights that don't train keep no inputs alive: what is left is both norms' input in float32, what attention was
    given and gave, with a log of sums for each head, and the three factors of the MLP's product.
    """
    head = size.head_dim + (CARRIER if soft else 0)
    attention = (2 * size.heads + 2 * size.key_heads) * head * bytes_per_value + 4 * size.heads
    return tokens.double() * (2 * 4 * size.width + attention + 3 * size.mlp * bytes_per_value)


def activation_bytes(student: Trace, size: ModelSize, bytes_per_value: int, soft: bool, checkpointing: bool) -> float:
    """Bytes that a student's decoder keeps for backward, summed over the trace's samples."""
    reached = [tokens.sum() for tokens, learns in zip(student.ran, student.learns, strict=True) if learns]
    if not reached:
        return 0.0
    tokens = torch.stack(reached)
    layers = kept_bytes(size, tokens, bytes_per_value, soft)
    if checkpointing:
        return (tokens.sum() * size.width * bytes_per_value + layers.max()).item()
    return layers.sum().item()


def repeated_flops(student: Trace, size: ModelSize) -> float:
    """FLOPs of running a student's layers again in backward, up to the MLP's last product, which nothing asks for."""
    reached = [tokens for tokens, learns in zip(student.ran, student.learns, strict=True) if learns]
    layers = (decoder_layer(size, tokens, tokens) - 2 * tokens.double() * size.width * size.mlp for tokens in reached)
    return sum(layer.sum().item() for layer in layers)


def estimate(
    training: Training,
    teacher: Trace,
    student: Trace,
    size: ModelSize,
    weights: Weights,
    pruner,
    repair=None,
    answers: int = 1,
    bytes_per_value: int = 2,
) -> Estimate:
    """Price a run whose every sample leaves these traces; `bytes_per_value` are those of the frozen weights."""
    batch, stage, ranks = training.batch_size, STAGES[training.strategy], training.gpus
    flops = batch * step_flops(teacher, student, size, pruner, repair, answers).item()
    repeated = batch * repeated_flops(student, size) if training.checkpointing else 0.0
    soft = training.mode == "soft"
    kept = activation_bytes(student, size, bytes_per_value, soft, training.checkpointing)
    frozen = weights.frozen * bytes_per_value
    share = [1 / ranks if stage >= split else 1.0 for split in (1, 2, 3)]  # of Adam's moments, gradients, weights
    memory = {
        "frozen model": frozen * share[2],
        "layers gathered": 2 * weights.layer * bytes_per_value if stage == 3 else 0.0,
        "plug-in": weights.trained * 4 * share[2],
        "gradients": weights.trained * 4 * share[1],
        "Adam": weights.trained * ADAM * share[0],
        "activations": batch * kept,
        "logits": batch * answers * size.vocab * (bytes_per_value + 8),
        "reserve": training.reserve * 1e9,
    }
    others = (ranks - 1) / ranks
    compute = (flops + repeated) / (training.peak * 1e12 * training.utilisation)
    transfer = PASSES * frozen * others / (training.bandwidth * 1e9) if stage == 3 else 0.0
    reduced = 2 * weights.trained * 4 * others / (training.bandwidth * 1e9)
    step = training.accumulate * max(compute, transfer) + reduced
    rate = ranks * batch * training.accumulate / step
    return Estimate(flops, repeated, compute, transfer, step, training.samples / rate, rate, memory)
