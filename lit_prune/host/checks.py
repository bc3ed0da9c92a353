"""Checks, when a plug-in attaches, of what the hooks rely on in transformers and in a model's classes.

What only a forward can show is checked by `check_layer_call`, before any token is dropped.
"""

import inspect
from collections.abc import Iterable
from functools import cache as memoize
from typing import Any

from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host.compat import (
    CACHE_NAMES,
    ENCODED,
    all_parameters,
    cache_name,
    need,
    parameters,
    pre_norm,
    projects,
    returns_several,
    rotation,
    unsupported,
)

PREFILL = ("generation_config", "model_kwargs", "input_ids")  # arguments of generate()'s prefill


def check_decoder(model: nn.Module, decoder: nn.Module, layers: Iterable[nn.Module], own: Iterable[int] = ()) -> None:
    """Raise `LitPruneError` unless the library and the model's classes have what the hooks of the decoder rely on.

    Args:
        model: a `*ForConditionalGeneration`. decoder: its decoder. layers: the decoder's.
        own: layers whose attention, or keys, a method computes itself from the layer's projections.
    """
    _check_library()
    if not any(name in all_parameters(type(model)) for name in CACHE_NAMES):
        raise LitPruneError(
            f"{type(model).__name__} takes no KV cache: its generate() runs the language model alone, on embeddings "
            f"that don't say which tokens are visual, so that no answer would be pruned"
        )
    _check_forward(type(model), ("input_ids", "attention_mask"))
    _check_forward(type(decoder), ("attention_mask", "position_ids", "inputs_embeds"))
    layers = list(layers)
    for kind in {type(layer) for layer in layers}:
        _check_forward(kind, ("attention_mask",))
    for layer in layers:
        pre_norm(layer)
    for index in own:
        _check_attention(layers[index])


def check_tower() -> None:
    """Raise `LitPruneError` unless the library has what stages inside a vision tower rely on."""
    _check_bidirectional()


def check_layer_call(
    layer: nn.Module, args: tuple, kwargs: dict, columns: int, lengths: tuple[int, ...], rope: bool
) -> None:
    """Raise `LitPruneError` unless a decoder layer is called as the hooks expect.

    Args:
        layer: the layer. args, kwargs: its arguments.
        columns: of the hidden states. lengths: that its rotary embeddings may have.
        rope: whether its rotary embeddings count; where tokens are renumbered they are replaced.
    """
    name = type(layer).__name__
    taken = parameters(type(layer).forward)
    named = list(taken)[1 : len(args) + 1]  # without self
    states = args[0] if args else None
    if not isinstance(states, Tensor) or states.ndim not in (3, 4) or "attention_mask" in named:
        raise unsupported(f"{name} isn't given hidden states (batch, columns, width), and them alone, by position")
    if states.shape[1] != columns:
        raise unsupported(f"{name} is given {states.shape[1]} columns of hidden states in place of {columns}")
    if not rope or ("position_embeddings" not in taken and "position_embeddings" not in kwargs):
        return
    found = kwargs.get("position_embeddings", 0)  # None is for a layer that rotates nothing
    pair = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)
    parts = found if pair else (found,) if isinstance(found, Tensor) and found.is_complex() else ()
    if found is not None and (not parts or any(part.ndim != 3 or part.shape[1] not in lengths for part in parts)):
        raise unsupported(f"{name} isn't given position_embeddings, a pair (batch, {lengths[0]} columns, head width)")


def check_layer_output(layer: nn.Module, output: Any) -> None:
    """Raise `LitPruneError` unless a decoder layer returns its states, alone or, where it says so, first of several."""
    if isinstance(output, Tensor) or (returns_several(type(layer)) and isinstance(output[0], Tensor)):
        return
    raise unsupported(f"{type(layer).__name__} returns {type(output).__name__} in place of a tensor")


def check_reached(model: nn.Module, reached: bool) -> None:
    """Raise `LitPruneError` if what a model was called with has not come down to its decoder's layers."""
    if not reached:
        raise unsupported(f"{type(model).__name__} doesn't hand its keywords down to its decoder's layers")


@memoize
def _check_library() -> None:
    from transformers import Cache, DynamicCache, GenerationMixin
    from transformers.generation import utils
    from transformers.masking_utils import create_causal_mask

    _takes(create_causal_mask, "create_causal_mask", ("config", "inputs_embeds", "attention_mask", "position_ids"))
    _takes(create_causal_mask, "create_causal_mask", ("layer_idx", "allow_is_causal_skip"))
    cache_name(create_causal_mask, "create_causal_mask")
    _takes(DynamicCache.__init__, "DynamicCache", ("config",))
    _takes(getattr(Cache, "get_seq_length", None), "Cache.get_seq_length", ("layer_idx",))
    if ENCODED not in getattr(utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", (ENCODED,)):
        raise unsupported(f"generate() doesn't pass encoded images as {ENCODED!r}")
    _takes(getattr(GenerationMixin, "_prefill", None), "GenerationMixin._prefill", PREFILL)


@memoize
def _check_bidirectional() -> None:
    from transformers.masking_utils import create_bidirectional_mask

    _takes(create_bidirectional_mask, "create_bidirectional_mask", ("config", "inputs_embeds", "attention_mask"))


@memoize
def _check_forward(kind: type[nn.Module], names: tuple[str, ...]) -> None:
    """Check that a module's forward has these parameters, takes the KV cache, and hands down unknown keywords."""
    kinds = {part.kind for part in parameters(kind.forward).values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise unsupported(f"{kind.__name__} takes no further keywords (**kwargs) to hand down")
    if inspect.Parameter.VAR_POSITIONAL not in kinds:  # else it passes on whatever it is given, and tells nothing
        _takes(kind.forward, kind.__name__, names)
        cache_name(kind.forward, kind.__name__)


def _check_attention(layer: nn.Module) -> None:
    """Check what computes a layer's own queries and keys: see `reading.own_rows` and `reading.own_keys`."""
    if not projects(layer):
        return
    own, kind = getattr(layer, "self_attn", None), type(layer).__name__
    need(own, f"the self_attn of {kind}", ("q_proj", "k_proj", "head_dim", "scaling"))
    if rotation(own) is None:
        raise unsupported(f"the module of {type(own).__name__} has no apply_rotary_pos_emb")


def _takes(function: Any, owner: str, names: tuple[str, ...]) -> None:
    found = {} if function is None else parameters(function)
    if missing := [name for name in names if name not in found]:
        raise unsupported(f"{owner} takes no {' and no '.join(map(repr, missing))}")
