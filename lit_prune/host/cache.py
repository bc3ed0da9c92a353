"""State that outlives a forward, kept on the KV cache itself, and what `generate()` does with caches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from lit_prune.errors import LitPruneError
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.session import Session
from lit_prune.repair import Essence

CACHE = "lit_prune"  # attribute of the KV cache that holds a CacheState
STORED = ("keys", "values", "prefill_keys", "prefill_values", "indexer_keys", "conv_states", "recurrent_states")


@dataclass
class CacheState:
    """State that must outlive a forward, as an attribute of the cache, so that it lives and dies with the sequence.

    `valid[layer]`: which cached columns of a stage's layers are real; `columns[layer]`: where each stood in the prompt
    or behind it; `first[layer]`: how many the first forward left. `start`: where each sample's first token stands.
    `counted`: the stage whose layers the library counts cached columns by, if any. `pictured`: samples with an image,
    the only ones that are repaired. `seen`: original columns so far. `lag`: how much M-RoPE's positions are ahead of
    `seen` (an image takes fewer positions than columns), known where layer 0 is pruned. `removed[layer]`: where tokens
    are renumbered, how many of each sample's have left before a stage's layers. `bias[layer]`: with proportional
    attention, what is added to the attention logits of the cached keys of a stage's layers; those behind have none.
    `soft`: pruned tokens are among the keys.
    """

    valid: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    start: Tensor | None = None
    counted: int | None = None
    padded: dict[int, bool | None] = field(default_factory=dict)  # whether any isn't real, if known
    essence: dict[int, Essence] = field(default_factory=dict)
    pictured: Tensor | None = None
    seen: int = 0
    lag: int | Tensor = 0
    removed: dict[int, Tensor] = field(default_factory=dict)
    bias: dict[int, Tensor] = field(default_factory=dict)
    soft: bool = False

    @classmethod
    def of(
        cls, cache: Cache, real: Tensor | None, rows: Tensor, stages: Sequence[int], counted: int | None
    ) -> "CacheState":
        """The state of a cache that no stage has touched: empty, or filled by text or by the plain model.

        `real`: see `real_columns`; `rows`: any tensor with a row for each sample.
        """
        state = cls(seen=int(cache.get_seq_length()), counted=counted)
        if state.seen:
            earlier = rows.new_ones(rows.shape[0], state.seen, dtype=torch.bool)
            earlier = earlier if real is None else real[:, : state.seen].bool()
            padded = False if real is None else None  # None: only the device knows
            state.valid, state.padded = dict.fromkeys(stages, earlier), dict.fromkeys(stages, padded)
            columns = torch.arange(state.seen, device=rows.device).expand_as(earlier)
            state.columns, state.first = dict.fromkeys(stages, columns), dict.fromkeys(stages, state.seen)
            state.start = None if real is None else padding(real)
        return state

    def follow(self, cache) -> None:
        """Forget the columns that were cropped from the cache, such as rejected candidates of assisted decoding."""
        cropped = 0
        for layer, valid in self.valid.items():
            cropped = valid.shape[1] - cached(cache, layer)
            if not cropped:
                continue
            self.valid[layer] = valid[:, : valid.shape[1] - cropped]
            self.columns[layer] = self.columns[layer][:, : valid.shape[1] - cropped]
            if layer in self.bias:
                self.bias[layer] = self.bias[layer][:, : valid.shape[1] - cropped]
        self.seen -= cropped


def cached(cache: Cache, layer: int) -> int:
    """Columns that a layer's cache holds; of a layer without attention those of the next one that has it."""
    found = (place for place in range(layer, len(cache.layers)) if isinstance(cache.layers[place], CacheLayerMixin))
    return int(cache.get_seq_length(next(found, layer)))


def padding(real: Tensor) -> Tensor:
    """Columns of padding to the left of each sample (batch,)."""
    return (real.long().cumsum(1) == 0).sum(1)


def chosen_cache(module: nn.Module, session: Session, kwargs: dict) -> Cache | None:
    """The cache that this forward fills; by default none in training, nor where layers are left out."""
    cache = cache_of(kwargs)
    if kwargs.get("use_cache") is None and cache is None:
        kwargs["use_cache"] = (
            getattr(module.config, "use_cache", True) and not module.training and not session.leaves_out
        )
    if cache is None and kwargs["use_cache"]:
        cache = kwargs[cache_keyword(module)] = DynamicCache(config=module.config)
    if cache is not None and session.leaves_out:
        raise LitPruneError("layers that a session leaves out have no keys to cache: call with use_cache=False")
    return cache


def refuse_chunks(config: Any) -> None:
    """Raise `LitPruneError` if `generate()` is to feed the prompt in chunks, by its generation configuration."""
    if getattr(config, "prefill_chunk_size", None) is not None:
        raise LitPruneError(
            "prefill_chunk_size feeds the prompt in chunks, which would be pruned one by one and without the question; "
            "generate without it: the pruned prefill needs less memory anyway"
        )


def only_new(kwargs: dict, state: CacheState, real: Tensor | None) -> dict:
    """Inputs without the columns that the cache has seen: `generate()` counts those by one layer, which may be pruned.

    `real`: see `real_columns`.
    """
    ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if state.counted not in state.valid or ids is None or ids.shape[1] == 1 or (real is None and positions is None):
        return kwargs
    new = (_columns(positions, state) if real is None else real.shape[1]) - state.seen
    if not 0 < new < ids.shape[1]:
        return kwargs
    trimmed = {name: kwargs[name][..., -new:] for name in ("input_ids", "position_ids") if kwargs.get(name) is not None}
    return {**kwargs, **trimmed}


def _columns(positions: Tensor, state: CacheState) -> int:
    """Columns so far by their position ids. Without a mask, when this is asked, there is no padding."""
    if positions.ndim == 2:
        return int(positions[0, -1]) + 1
    # M-RoPE: text positions stand first where there are four rows; else images have made the others lag behind.
    return int(positions[0, 0, -1]) + 1 if positions.shape[0] == 4 else int(positions[-1, 0, -1] + 1 - state.lag)


def refuse_paged(cache: Any) -> None:
    """Raise `LitPruneError` for the paged cache of continuous batching (`generate_batch`)."""
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise LitPruneError(
            "continuous batching can't be pruned: its paged KV cache holds the same tokens in every decoder layer, and "
            "its requests take no images; use generate(), or detach the plug-in"
        )


def real_columns(kwargs: dict, cache: Cache | None) -> Tensor | None:
    """Mask of the real columns so far (batch, columns), by the mask that a model is called with; None: all are.

    `generate()` with a static cache passes a mask of every query by every slot of the cache, for each kind of layer or
    for all. Some query sees each real column: those of the cache's layer 0 and as many as there are ids.
    """
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or len(mask.shape) == 2:
        return mask
    if ids is None or ids.shape[1] == 1:  # a decoding step: what it feeds is real, and nobody asks for the rest
        return None
    length = ids.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
    if isinstance(mask, BlockMask):
        rows, columns = torch.arange(ids.shape[0], device=ids.device), torch.arange(length, device=ids.device)
        return mask.mask_mod(rows[:, None], torch.zeros_like(rows)[:, None], columns[-1:], columns)
    seen = mask[:, 0, :, :length]
    return (seen if seen.dtype == torch.bool else seen >= 0).any(1)


def stored_bytes(layer: Any) -> int:
    """Bytes that one layer's cache holds, whatever it keeps."""
    kept = [value for name in STORED if (value := getattr(layer, name, None)) is not None]
    each = [part for value in kept for part in (value.values() if isinstance(value, dict) else [value])]
    return sum(part.nbytes for part in each if isinstance(part, Tensor))
