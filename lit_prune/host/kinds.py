"""Kinds of decoder layers (attention, window, recurrent, ...), read off a configuration."""

from dataclasses import dataclass
from typing import Any

# Names of layers in a configuration by a part of them, in this order; any other attends to all that came before.
WITHOUT_ATTENTION = ("linear", "conv", "mamba", "recurrent", "moe", "mlp")
RECURRENT = ("linear", "conv", "mamba", "recurrent")
CHUNKED = ("chunked",)
WINDOWED = ("sliding", "window")
INDEXED = ("indexed",)  # each token chooses its keys among those that a mask shows it


@dataclass(frozen=True)
class Kind:
    """One layer's reach.

    Args:
        attends: it has attention; else tokens are mixed by a recurrence or a convolution, or not at all.
        recurrent: it carries a state from token to token.
        window: how many positions back a token sees, itself included. None: all.
        prompt: the window is one of the answer's tokens; the whole prompt is seen by all.
        chunk: tokens see their own chunk of so many positions only.
        given: it needs the model's own mask, which is more than causal, or asked for more than attention.
    """

    attends: bool = True
    recurrent: bool = False
    window: int | None = None
    prompt: bool = False
    chunk: int | None = None
    given: bool = False

    @property
    def plain(self) -> bool:
        """True if its attention is causal over the whole context."""
        return self.attends and self.window is None and self.chunk is None and not self.given


def kinds(text: Any, given: bool = False) -> tuple[Kind, ...]:
    """The kind of every layer of a decoder, by its configuration.

    `given`: the model builds masks of its own, such as those of images whose tokens see each other in both directions.
    A window as long as the context is none.
    """
    names = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    window = _first(text, "sliding_window", "sliding_window_size")
    if window is not None and window >= getattr(text, "max_position_embeddings", float("inf")):
        window = None
    chunk = _first(text, "attention_chunk_size")
    if not names:
        names = ["full_attention" if window is None else "sliding_attention"] * text.num_hidden_layers
    return tuple(_kind(name, window, chunk, given) for name in names)


def keys_chosen(text: Any) -> int | None:
    """Keys that each token attends to in layers that choose them (sparse attention); None: no layer does."""
    if (blocks := _first(text, "index_topk_blocks")) is not None:
        return blocks * (_first(text, "index_block_size") or 1)
    return _first(text, "index_topk", "indexer_budget")


def _kind(name: str, window: int | None, chunk: int | None, given: bool) -> Kind:
    if _has(name, WITHOUT_ATTENTION):
        return Kind(attends=False, recurrent=_has(name, RECURRENT))
    if _has(name, CHUNKED):
        return Kind(chunk=chunk, given=given)
    given = given or _has(name, INDEXED)
    return Kind(window=window if _has(name, WINDOWED) else None, prompt="reference" in name, given=given)


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def _first(text: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(text, name, None)) is not None), None)
