"""One pass-through wrapper around transformers' registered attention functions.

It acts only on a layer that was handed a `Request`: to read attention rows from the queries and keys that are there
anyway, and to add a bias per key. It is registered once per process, never removed, and holds no state: everything
arrives by keyword, so a layer replayed by activation checkpointing sees the same request.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.ops import selection

REQUEST = "lit_prune_attention"
BACKENDS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass
class Tap:
    """Ask a layer for attention rows: columns of the querying tokens, which keys are real, cached columns before.

    `limited`: the layer's mask hides more than padding and what comes later, so that it counts.
    """

    rows: Int[Tensor, "batch rows"]
    row_mask: Bool[Tensor, "batch rows"]
    valid: Bool[Tensor, "batch seq"]
    past: int = 0
    limited: bool = False
    scores: Float[Tensor, "batch seq"] | None = None


@dataclass
class Capture:
    """Arguments of a layer's call of its attention function: rotated queries and keys, mask, scale of the logits."""

    query: Float[Tensor, "batch heads rows head"] | None = None
    key: Float[Tensor, "batch key_heads seq head"] | None = None
    mask: Any = None
    scaling: float = 1.0


class Captured(Exception):
    """Ends the run of a layer whose queries and keys are all that is wanted."""


@dataclass(frozen=True)
class Request:
    """Request to one layer's attention call: a bias per key of this forward, a stage's tap, a bias per cached key.

    `watch` is the tap of a caller. With `capture` the layer stops there. `layout`: the rows that samples share inside
    the layer, if they do, see `lit_prune.host.packing`; biases and taps are sample by sample. `beside`: what makes this
    call the attention of some rows alone, see `lit_prune.host.beside`.
    """

    key_bias: Float[Tensor, "batch seq"] | None = None
    tap: Tap | None = None
    past_bias: Float[Tensor, "batch past"] | None = None
    watch: Tap | None = None
    capture: Capture | None = None
    layout: Any = None
    beside: Any = None

    def bias(self, keys: int) -> Tensor | None:
        """Bias of all `keys`: cached ones in front, zeros for what follows those that have one."""
        if self.layout is not None:
            return None if self.key_bias is None else self.layout.fold(self.key_bias)
        parts = [part for part in (self.past_bias, self.key_bias) if part is not None]
        if not parts:
            return None
        bias = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return bias if bias.shape[1] == keys else torch.nn.functional.pad(bias, (0, keys - bias.shape[1]))


def row_attention(
    query: Float[Tensor, "batch heads rows head"],
    key: Float[Tensor, "batch key_heads seq head"],
    rows: Int[Tensor, "batch rows"],
    valid: Bool[Tensor, "batch seq"],
    scaling: float,
    key_bias: Float[Tensor, "batch seq"] | None = None,
    limits: Bool[Tensor, "batch rows seq"] | None = None,
) -> Float[Tensor, "batch rows seq"]:
    """Causal softmax attention of a few rows, averaged over heads: O(rows x seq), never seq x seq.

    `limits`: what each row may see, by a mask that is more than causal.
    """
    batch, heads, count, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1] * count, dim)
    exact = torch.promote_types(query.dtype, torch.float32)  # half precision is too coarse to rank by
    logits = (grouped @ key.transpose(2, 3)).view(batch, heads, count, key.shape[2]).to(exact).mul_(scaling)
    if key_bias is not None:
        logits = logits + key_bias[:, None, None].to(exact)
    columns = torch.arange(key.shape[2], device=key.device)
    allowed = ((columns <= rows[..., None]) if limits is None else limits) & valid[:, None]
    # A filler row may be allowed nothing: a large negative number instead of -inf keeps it finite, the mask drops it.
    return logits.masked_fill_(~allowed[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1)


def wrap_attention() -> None:
    """Register the wrapper around every installed attention function that this project supports."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow to import

    for name in BACKENDS:
        try:
            function = ALL_ATTENTION_FUNCTIONS[name]
        except KeyError:
            continue
        if not getattr(function, "lit_prune", False):
            ALL_ATTENTION_FUNCTIONS[name] = _wrap(name, function)


def wrapped(implementation: str) -> bool:
    """True if a model's attention implementation can be read and biased."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow to import

    return getattr(ALL_ATTENTION_FUNCTIONS.get(implementation), "lit_prune", False)


def _wrap(name: str, function: Callable) -> Callable:
    @wraps(function)
    def attention(module, query, key, value, attention_mask, **kwargs):
        request: Request | None = kwargs.pop(REQUEST, None)
        if request is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        if request.beside is not None:
            again = partial(attention, module)
            return request.beside.attend(again, (query, key, value), attention_mask, request, kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if (capture := request.capture) is not None:
            capture.query, capture.key, capture.mask, capture.scaling = query, key, attention_mask, scaling
            raise Captured
        layout = request.layout
        for tap in (request.tap, request.watch):
            if tap is not None:
                states = (query, key) if layout is None else map(layout.unfold_heads, (query, key))
                _read(tap, request.key_bias, *states, scaling, attention_mask)
        bias = request.bias(key.shape[2])
        if bias is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        if name == "sdpa" and query.shape[2] == 1 and not bias.requires_grad:
            # A decoding step: a mask of one row is cheaper than a copy of all cached keys with a channel more.
            return function(module, query, key, value, _added(attention_mask, bias.to(query.dtype)), **kwargs)
        dim = value.shape[-1]
        query, key, value = _biased(query, key, value, bias, scaling)
        output, weights = function(module, query, key, value, attention_mask, **{**kwargs, "scaling": scaling})
        return output[..., :dim], weights

    attention.lit_prune = True
    return attention


def _read(tap: Tap, key_bias: Tensor | None, query: Tensor, key: Tensor, scaling: float, mask: Any) -> None:
    """Fill a tap from this forward's own keys."""
    limits = mask_rows(mask, tap.rows, tap.past, query.shape[2]) if tap.limited else None
    with torch.no_grad():
        index = tap.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        keys = key[:, :, tap.past : tap.past + query.shape[2]]
        each = row_attention(query.gather(2, index), keys, tap.rows, tap.valid, scaling, key_bias, limits)
        tap.scores = selection.row_mean(each, tap.row_mask)


def mask_rows(mask: Any, rows: Tensor, past: int, keys: int) -> Tensor | None:
    """Keys visible to some rows (batch, rows, keys), of `keys` keys after `past`, read off a 4-D mask."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    allowed = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
    allowed = allowed[..., past : past + keys].expand(rows.shape[0], -1, -1)
    return allowed.gather(1, rows[..., None].expand(-1, -1, allowed.shape[2]))


def _added(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A bias per key (batch, keys) as a float mask of one row, on top of the mask that there is."""
    bias = bias[:, None, None]
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a per-key bias in one extra channel: q' = [q, 1 / scaling], k' = [k, bias].

    Keeps the fused kernels (forward and backward) and no seq x seq mask; eight channels, for their alignment.
    """
    pad = 8
    ones = query.new_zeros(*query.shape[:-1], pad)
    ones[..., 0] = 1.0 / scaling
    carrier = torch.nn.functional.pad(bias.to(key.dtype)[:, None, :, None], (0, pad - 1))
    carrier = carrier.expand(-1, key.shape[1], -1, -1)
    key = torch.cat([key, carrier], dim=-1)
    return torch.cat([query, ones], dim=-1), key, torch.nn.functional.pad(value, (0, pad))
