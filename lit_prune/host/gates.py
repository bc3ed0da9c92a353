"""Gates: the bias by which a stage's gate acts on the layers after it, and the gradients that return through it."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from lit_prune.host.state import Forward, Selected
from lit_prune.ops import selection
from lit_prune.pruners.base import Kept


def add_bias(selected: Selected, leaving: Bool[Tensor, "batch columns"] | None, forward: Forward) -> None:
    """Log of the gate per key: hides dropped tokens in soft mode, and carries gradients in both.

    `leaving`: columns that are about to be removed, so that no gradient returns for them.
    """
    soft, kept = forward.session.soft, selected.kept
    if kept.gate is None and not soft:
        return
    if not soft and not kept.gate.requires_grad:
        return
    gate = kept.mask.float() if kept.gate is None else kept.gate.float()
    if forward.session.gate_clip is not None:
        gate = selection.clip_gradient(gate, forward.session.gate_clip)
    if forward.session.gate_centre:  # after the clipping, so in backward before it
        staying = selected.alive if leaving is None else selected.alive & ~leaving.gather(1, selected.columns)
        gate = selection.centre_gradient(gate, staying, kept.slope)
    bias = selection.log_gate(gate, forward.session.eps) * selected.alive
    zeros = torch.zeros(forward.packed.valid.shape, dtype=bias.dtype, device=bias.device)
    bias = zeros.scatter_add(1, selected.columns, bias * selected.real)
    forward.packed.key_bias = bias if forward.packed.key_bias is None else forward.packed.key_bias + bias


def hopeless(selected: Selected, forward: Forward) -> Bool[Tensor, "batch columns"] | None:
    """Soft mode: columns ranked so far behind the kept ones that they are dropped for good, if that is asked."""
    kept, alive = selected.kept, selected.alive
    if forward.session.contenders is None or kept.scores is None:
        return None
    images, kept_here = forward.images(selected.columns, alive), kept.mask.sum(1, keepdim=True)
    if images is not None:
        kept_here = images.spread(images.sum(kept.mask.long()))
    most = (kept_here * forward.session.contenders).ceil()
    far = alive & ~kept.mask & (selection.rank(kept.scores.detach(), alive, images) >= most)
    return torch.zeros_like(forward.packed.valid).scatter(1, selected.columns, far)


def for_repair(kept: Kept, alive: Bool[Tensor, "batch visual"], forward: Forward) -> Kept:
    """The decision as the repair adapter sees it: with `gate_centre`, its gate centres what returns through it."""
    if kept.gate is None or not forward.session.gate_centre:
        return kept
    return replace(kept, gate=selection.centre_gradient(kept.gate, alive, kept.slope))
