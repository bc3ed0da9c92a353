"""Queries and keys of a frozen layer, as its own attention will compute them, ahead of its run.

Where both are projections of their own, the rows that are asked for are projected alone. Any other attention (latent,
gated, fused, normed in its own way, without rotation in some layers) is called as it stands, under an attention
function that takes what it is given and stops there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host.attention import REQUEST, Capture, Captured, Request
from lit_prune.host.compat import CACHE_NAMES, plain_forward, projects, rotation
from lit_prune.ops import selection


@dataclass(frozen=True)
class Handed:
    """A layer that is read, and what gives what it is handed beside its states, at the columns that are left."""

    layer: nn.Module
    make: Callable[[], dict[str, Any]]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """By name."""
        return self.make()

    @property
    def rope(self) -> Any:
        """Its rotary embeddings, in whatever form."""
        return self.arguments.get("position_embeddings")


@torch.no_grad()
def own_keys(
    handed: Handed, hidden: Tensor, normed: Float[Tensor, "batch columns width"]
) -> Float[Tensor, "batch columns inner"]:
    """The layer's own keys before their rotation, heads side by side."""
    layer = handed.layer
    if projects(layer):
        attention = layer.self_attn
        keys = attention.k_proj(normed)
        norm = getattr(attention, "k_norm", None)
        return keys if norm is None else norm(keys.unflatten(2, (-1, attention.head_dim))).flatten(2)
    unrotated = {**handed.arguments, "position_embeddings": _no_rotation(layer, handed.rope)}
    return capture(layer, hidden, unrotated).key.transpose(1, 2).flatten(2)


def own_rows(
    handed: Handed,
    hidden: Tensor,
    normed: Float[Tensor, "batch columns width"],
    rows: Int[Tensor, "batch rows"],
) -> Capture:
    """The layer's own rotated queries of some rows, and keys of all columns."""
    layer = handed.layer
    if not projects(layer):
        found = capture(layer, hidden, handed.arguments)
        query = found.query
        index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        return Capture(query.gather(2, index), found.key, found.mask, found.scaling)
    cos, sin = (part.expand(normed.shape[0], -1, -1) for part in handed.rope)
    row_rope = (selection.gather_rows(cos, rows), selection.gather_rows(sin, rows))
    query, key = query_key(layer, selection.gather_rows(normed, rows), normed, row_rope, (cos, sin))
    return Capture(query, key, None, layer.self_attn.scaling)


def query_key(
    layer: nn.Module, queries: Tensor, keys: Tensor, query_rope: tuple[Tensor, Tensor], key_rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys of normed states, by the layer's projections.

    `queries` (batch, rows, width) and `keys` (batch, seq, width); returns (batch, heads, rows, head) and
    (batch, key heads, seq, head). Projections are called as modules, so sharded weights are gathered by their hooks.
    """
    attention = layer.self_attn
    rotate, out = rotation(attention), []
    for states, (cos, sin), name in ((queries, query_rope, "q"), (keys, key_rope, "k")):
        heads = getattr(attention, f"{name}_proj")(states).unflatten(2, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        heads = (heads if norm is None else norm(heads)).transpose(1, 2)
        out.append(rotate(heads, heads[:, :0], cos, sin)[0])  # the library rotates two at once; here one is empty
    return out[0], out[1]


def capture(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Capture:
    """Arguments that a layer passes to its attention function, its cache left alone.

    Raises:
        LitPruneError: it hands its keywords to none that is registered.
    """
    found = Capture()
    given = {name: dict(value) if type(value) is dict else value for name, value in arguments.items()}
    given |= {name: None for name in CACHE_NAMES if name in given}
    try:
        plain_forward(layer)(hidden, **{**given, REQUEST: Request(capture=found)})
    except Captured:
        return found
    raise LitPruneError(
        f"the attention of {type(layer).__name__} can't be read: it hands its keywords to no attention function that "
        f"is registered in transformers; use a method that reads no attention, such as DivPrune"
    )


def _no_rotation(layer: nn.Module, rope: Any) -> Any:
    """Rotary embeddings that turn nothing."""
    if isinstance(rope, Tensor) and rope.is_complex():
        return torch.ones_like(rope)
    if isinstance(rope, tuple | list) and len(rope) == 2:
        return torch.ones_like(rope[0]), torch.zeros_like(rope[1])
    if rope is None:
        return None
    raise LitPruneError(f"{type(layer).__name__} has keys whose rotation can't be left out; use a method without keys")
