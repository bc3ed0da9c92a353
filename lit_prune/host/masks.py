"""The attention masks of the layers that follow a stage.

A layer whose attention is causal over all that came before gets a mask of the library, over the columns that are left.
Any other layer gets the model's own mask at those columns: a window, a chunk, or an image whose tokens see each other
in both directions, stays what the model made of it. Once a cache holds columns of before, masks go by position: each
cached key has its original column on the cache's state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig

from lit_prune.host.compat import causal_mask
from lit_prune.host.kinds import Kind, keys_chosen


@dataclass
class Span:
    """The keys of the layers from one stage to the next: cached ones, then those of this forward.

    `columns`: where each stood in the prompt or behind it. `first`: keys of the first forward. `start`: where each
    sample's first token stands, padding being to its left. `padded`: whether any isn't real; None: only the device
    knows. `whole`: this forward's are all that it began with.
    """

    valid: Bool[Tensor, "batch keys"]
    columns: Int[Tensor, "batch keys"]
    first: int
    start: Int[Tensor, " batch"] | None
    padded: bool | None
    whole: bool = False


class Masks:
    """Masks of one decoder's layers.

    Args:
        config: the decoder's.
        kinds: of its layers.
        own: whether the model builds masks of its own.
    """

    def __init__(self, config: PreTrainedConfig, kinds: tuple[Kind, ...], own: bool = False) -> None:
        self.config, self.kinds, self.own = config, kinds, own
        self.groups = tuple(kinds.index(kind) for kind in kinds)  # the first layer of the same kind, for each layer
        self.always = keys_chosen(config) is not None  # what chooses keys reads the mask, also where none is hidden

    def of(
        self, index: int, hidden: Tensor, span: Span, handed: Any, cache: Cache | None, hidden_by_bias: bool = False
    ) -> Any:
        """The mask of one layer, in the form that its attention takes; None where none is needed.

        `handed`: what the decoder gave it. `hidden_by_bias`: padding and filler carry a bias that hides them.
        """
        kind = self.kinds[index]
        if kind.plain:
            padded = False if hidden_by_bias else span.padded
            return causal_mask(
                self.config,
                hidden,
                None if padded is False else span.valid,
                cache,
                index,
                skip=not padded and not self.always,
            )
        if not kind.attends:
            return self._filler(hidden, span, handed)
        if isinstance(handed, Tensor) and handed.ndim == 2:
            return span.valid[:, -hidden.shape[1] :].to(handed.dtype)
        past = span.valid.shape[1] - hidden.shape[1]
        if past == 0 and span.whole:
            return handed
        allowed = None
        if past == 0 and isinstance(handed, Tensor) and handed.ndim == 4:
            allowed = self._sliced(handed, span)
        if allowed is None:
            allowed = self._by_position(kind, hidden.shape[1], span)
        if cache is not None:
            keys = cache.get_mask_sizes(hidden.shape[1], index)[0]
            allowed = _presented(allowed, keys, span.first if kind.prompt else 0)
        return self._in_form(allowed, hidden)

    @staticmethod
    def _filler(hidden: Tensor, span: Span, handed: Any) -> Any:
        """A mask of two dimensions for a recurrence or a convolution; cached states need none for what follows."""
        if span.valid.shape[1] > hidden.shape[1] or span.padded is False:
            return None if span.padded is False else handed
        like = handed.dtype if isinstance(handed, Tensor) else torch.long
        return span.valid.to(like)

    @staticmethod
    def _sliced(handed: Tensor, span: Span) -> Tensor:
        """The model's mask at the columns that are left, as booleans (batch, heads or 1, queries, keys)."""
        batch, count = span.columns.shape
        allowed = handed if handed.dtype == torch.bool else handed >= 0
        allowed = allowed.expand(batch, -1, -1, -1)
        heads, keys = allowed.shape[1], allowed.shape[3]
        rows = span.columns[:, None, :, None].expand(-1, heads, -1, keys)
        allowed = allowed.gather(2, rows)
        return allowed.gather(3, span.columns[:, None, None].expand(-1, heads, count, -1)) & span.valid[:, None, None]

    @staticmethod
    def _by_position(kind: Kind, queries: int, span: Span) -> Tensor:
        """Visibility of keys to the layer's queries, the last of the span (batch, 1, queries, keys)."""
        key = span.columns[:, None, None]
        query = span.columns[:, -queries:][:, None, :, None]
        allowed = (key <= query) & span.valid[:, None, None]
        if kind.window is not None:
            near = query - key < kind.window
            if kind.prompt:
                near = near | (torch.arange(key.shape[3], device=key.device) < span.first)
            allowed = allowed & near
        if kind.chunk is not None:
            start = 0 if span.start is None else span.start[:, None, None, None]
            allowed = allowed & ((query - start) // kind.chunk == (key - start) // kind.chunk)
        return allowed

    def _in_form(self, allowed: Tensor, hidden: Tensor) -> Tensor:
        """As booleans, or as what eager attention adds to its logits."""
        if self.config._attn_implementation != "eager":
            return allowed
        added = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return added.masked_fill(~allowed, torch.finfo(hidden.dtype).min)


def _presented(allowed: Tensor, keys: int, prompt: int) -> Tensor:
    """A mask at the keys that a cache presents: a window's has forgotten some, a static one isn't filled yet."""
    if keys >= allowed.shape[3]:
        return pad(allowed, (0, keys - allowed.shape[3]))
    return torch.cat([allowed[..., :prompt], allowed[..., prompt - keys :]], 3) if prompt else allowed[..., -keys:]
