"""FLOPs of one training step, of what ran: teacher, student, and the gradients through frozen layers.

Model FLOPs, as shares of a device's peak are counted: what is computed twice to save memory counts once, padding not at
all, and attention's backward is twice its forward.
"""

from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_prune.cost.flops import ModelSize, attention, decoder_layer, price
from lit_prune.cost.trace import Trace


def step_flops(teacher: Trace, student: Trace, size: ModelSize, pruner=None, repair=None, answers: int = 0) -> Tensor:
    """FLOPs of a training step, summed over its batch.

    The teacher has a backward pass too where a loss reads its saliency.

    Both traces are those of the very step: a layer that idled ran over no tokens, one that masks softly over all. A
    frozen layer has a backward pass where gradients reach it, for its input only: as much as its forward, but twice as
    much in attention. The plug-in's own parameters have one for their weights too. A vision tower whose price isn't
    known is left out.

    Args:
        teacher: trace of its forward. student: likewise, with the plug-in attached.
        size: of the model.
        pruner: asked what its own arithmetic costs. repair: likewise.
        answers: positions of the whole batch whose logits were made, by both.
    """
    plain, pruned = price(teacher, size, lm_rows=0), price(student, size, pruner, repair, lm_rows=0)
    total = sum(_ran(trace, size) + _backward(trace, size) for trace in (teacher, student))
    total = total + _tower(plain) + pruned["scoring"] + 3 * (pruned["pruner"] + pruned["repair"])
    if student.tower is not None:  # pruned in the tower: the images went through it a second time
        total = total + _tower(pruned)
    return total.sum() + 3 * 2 * answers * size.width * size.vocab


def structure(trace: Any) -> Hashable:
    """Fields that traces must have in common to be joined: all but the lengths of their samples."""
    if isinstance(trace, Tensor):
        return Tensor
    if isinstance(trace, list):
        return tuple(structure(part) for part in trace)
    if is_dataclass(trace):
        return tuple(structure(getattr(trace, field.name)) for field in fields(trace))
    return trace


def joined(traces: Sequence[Any]) -> Any:
    """One trace of the samples of several, which have one `structure`: pricing it once is as good, and quicker."""
    first = traces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(traces))
    if isinstance(first, list):
        return [joined(parts) for parts in zip(*traces, strict=True)]
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        return replace(first, **{name: joined([getattr(trace, name) for trace in traces]) for name in names})
    return first


def _tower(parts: dict[str, Tensor]) -> Tensor | float:
    """Tower and projector; nothing where their price isn't known."""
    return parts.get("vision", 0.0) + parts.get("projector", 0.0)


def _ran(trace: Trace, size: ModelSize) -> Tensor:
    tokens = torch.stack(trace.ran)
    return decoder_layer(size, tokens, tokens, visual=visual_of(trace, trace.ran)).sum(0)


def _backward(trace: Trace, size: ModelSize) -> Tensor:
    reached = [layer for layer, learns in enumerate(trace.learns) if learns]
    if not reached:
        return torch.zeros_like(trace.ran[0], dtype=torch.float64)
    keys = torch.stack([trace.ran[layer] for layer in reached])
    tokens = torch.stack([trace.learning[layer] for layer in reached])
    layers = decoder_layer(size, tokens, keys, reached, visual_of(trace, trace.learning)[reached])
    return (layers + attention(size, tokens, keys, reached)).sum(0)


def visual_of(trace: Trace, computed: Sequence[Tensor]) -> Tensor:
    """Visual tokens (layers, batch) among those `computed` in each layer, softly masked ones included."""
    ran = torch.stack(list(computed))
    masked = (ran - torch.stack(trace.queries)).clamp(min=0)
    return torch.where(ran > 0, torch.stack(trace.visual) + masked, 0)
