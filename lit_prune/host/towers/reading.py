"""Keys, values and attention of a tower layer, taken from its own projections while it runs.

A layer's projections may be three matrices or a fused one. Keys and queries are taken before their norm and rotation,
so that likeness and attention don't hang on the place [ours].
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_prune.host.towers.state import TowerPass
from lit_prune.pruners.base import VisionPruner

NAMES = {"q": re.compile(r"w?q(_proj|uery)?"), "k": re.compile(r"w?k(_proj|ey)?"), "v": re.compile(r"w?v(_proj|alue)?")}
FUSED = re.compile(r"w?qkv(_proj)?")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_head")
KEY_HEADS = ("num_key_value_heads", "num_key_heads")


@dataclass(frozen=True)
class Read:
    """Keys and values of each unit in the layer just run, heads side by side, and the attention that it gets."""

    keys: Float[Tensor, "tiles units inner"] | None = None
    values: Float[Tensor, "tiles units inner"] | None = None
    attention: Float[Tensor, "tiles units"] | None = None
    heads: int = 1


def attention_of(layer: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]] | None:
    """A layer's attention module and its projections; None where there is none of a known form."""
    for module in layer.children():
        named = dict(module.named_children())
        fused = next((part for name, part in named.items() if FUSED.fullmatch(name)), None)
        if fused is not None:
            return module, {"qkv": fused}
        found = {
            kind: next((part for name, part in named.items() if pattern.fullmatch(name)), None)
            for kind, pattern in NAMES.items()
        }
        if all(part is not None for part in found.values()):
            return module, found
    return None


def heads_of(attention: nn.Module) -> tuple[int, int]:
    """Query and key heads of an attention module."""
    owners = (attention, getattr(attention, "config", None))
    found = (getattr(owner, name, None) for owner in owners for name in HEADS)
    heads = next((value for value in found if isinstance(value, int)), 1)
    groups = (getattr(owner, name, None) for owner in owners for name in KEY_HEADS)
    return heads, next((value for value in groups if isinstance(value, int)), heads)


def projected(seen: dict[str, Tensor], heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (rows, heads, channels) out of what a layer's projections gave, flat over samples."""
    flat = {name: part.reshape(-1, part.shape[-1]) for name, part in seen.items()}
    if "qkv" in flat:
        channels = flat["qkv"].shape[1] // (heads + 2 * key_heads)
        parts = flat["qkv"].split([heads * channels, key_heads * channels, key_heads * channels], 1)
    else:
        parts = (flat["q"], flat["k"], flat["v"])
    return tuple(
        part.unflatten(1, (count, -1)) for part, count in zip(parts, (heads, key_heads, key_heads), strict=True)
    )


def clip_like(layer: nn.Module) -> bool:
    """True for CLIP's and SigLIP's layout, whose queries and keys are computed once more from the layer's input."""
    own = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "v_proj", "num_heads", "scale")
    return isinstance(getattr(layer, "layer_norm1", None), nn.Module) and all(hasattr(own, name) for name in names)


def read_again(layer: nn.Module, hidden: Tensor, state: TowerPass, prefix: int, asked: VisionPruner) -> Read:
    """Keys, values and attention of a layer in CLIP's layout, projected once more from its input `hidden`.

    Not every family hands keywords down to its attention function, where queries and keys could be read for free.
    """
    own, normed = layer.self_attn, layer.layer_norm1(hidden)
    there = state.there if prefix else state.patches(normed.shape[:2])
    there = torch.ones(normed.shape[:2], dtype=torch.bool, device=normed.device) if there is None else there
    keys = own.k_proj(normed)
    query = own.q_proj(normed[:, :1] if prefix else normed)
    if not prefix and not bool(there.all()):
        query = (query * there[..., None]).sum(1) / there.sum(1, keepdim=True)
    else:
        query = query.mean(1)
    split = keys.unflatten(2, (own.num_heads, -1))
    logits = torch.einsum("bhd,bnhd->bhn", query.unflatten(1, (own.num_heads, -1)), split).float() * own.scale
    logits = _one_head(logits) if asked.one_head else logits
    if state.sizes is not None:
        units = state.rows[state.real]
        bias = torch.zeros(logits.shape[0] * logits.shape[2], device=logits.device)
        bias[units.flatten()] = state.sizes.log()[state.real][:, None].expand(units.shape).flatten()
        logits = logits + bias.view(logits.shape[0], 1, -1)
    attention = logits.masked_fill(~there[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1)
    return Read(
        keys=_side_by_side(keys.flatten(0, 1).unflatten(1, (own.num_heads, -1)), state),
        values=_values(own.v_proj(normed[:, prefix:]), prefix, state) if asked.needs_values else None,
        attention=state.units(attention.flatten()).sum(2),
        heads=own.num_heads,
    )


def _values(values: Tensor, prefix: int, state: TowerPass) -> Tensor:
    """Values (samples, patches, inner) of each unit."""
    return _side_by_side(torch.nn.functional.pad(values, (0, 0, prefix, 0)).flatten(0, 1)[:, None], state)


def _one_head(logits: Float[Tensor, "samples heads ..."]) -> Float[Tensor, "samples 1 ..."]:
    """Logits of one head as wide as all: their sum, scaled by the root of the whole width instead of a head's."""
    return logits.sum(1, keepdim=True) * logits.shape[1] ** -0.5


def read_seen(layer: nn.Module, state: TowerPass, asked: VisionPruner) -> Read:
    """Keys, values and attention out of what a layer's projections gave.

    Attention is the class token's to all patches of its tile, or, without one, the mean query's, also where the layer
    itself attends inside windows.
    """
    attention, _ = attention_of(layer)
    heads, key_heads = heads_of(attention)
    query, key, value = projected(state.seen, heads, key_heads)
    members = state.real[..., None].expand_as(state.rows)
    if state.prefix:
        rows = state.extent[1] if state.columns is None else state.columns.shape[1]
        rating = query[torch.arange(len(state.rows), device=query.device) * rows]
    else:
        own = state.units(query) * members[..., None, None]
        rating = own.sum((1, 2)) / members.sum((1, 2))[:, None, None]
    keys = state.units(key)
    repeated = keys.repeat_interleave(heads // key_heads, 3)
    logits = torch.einsum("thd,tumhd->thum", rating, repeated).float() * key.shape[-1] ** -0.5
    logits = _one_head(logits) if asked.one_head else logits
    logits = logits.masked_fill(~members[:, None], torch.finfo(logits.dtype).min)
    weights = logits.flatten(2).softmax(-1).view_as(logits).mean(1)
    return Read(
        keys=keys.transpose(2, 3).flatten(2),
        values=state.units(value).transpose(2, 3).flatten(2),
        attention=weights.sum(2),
        heads=key_heads,
    )


def _side_by_side(values: Tensor, state: TowerPass) -> Tensor:
    """Values (rows, heads, channels) of each unit, its patches side by side in each head."""
    return state.units(values).transpose(2, 3).flatten(2)
