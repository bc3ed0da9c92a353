"""Names that differ between versions of transformers, found by looking at the installed library and the attached model.

Version numbers are never compared: a version in between, a fork, or a model with code of its own may use either name.
Signatures are looked at once per class. `checks.py` checks the rest of what the hooks rely on.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache as memoize
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from lit_prune.errors import LitPruneError

TESTED = "5.19 to 5.24"  # versions of transformers that pyproject.toml admits: jobs/test_versions.sh tests both ends
CACHE_NAMES = ("cache", "past_key_values")  # the KV cache as a keyword and in outputs: since 5.24, and before
ENCODED = "mm_encoder_outputs"  # keyword under which a model is handed images that are encoded already, by modality


def cache_of(arguments: Any) -> Any:
    """The KV cache among keyword arguments, or in the output of a model or of `generate()`; None if there is none."""
    for name in CACHE_NAMES:
        # An output's own get() warns about the older name, which it also answers to.
        found = dict.get(arguments, name) if isinstance(arguments, dict) else getattr(arguments, name, None)
        if found is not None:
            return found
    return None


def cache_keyword(module: nn.Module) -> str:
    """Keyword under which a model, a decoder or a layer takes the KV cache.

    Raises:
        LitPruneError: it takes none under a known name.
    """
    return cache_name(type(module).forward, type(module).__name__)


@memoize
def cache_name(function: Any, owner: str) -> str:
    """Keyword under which a function takes the KV cache; raises `LitPruneError` that names `owner` if it takes none."""
    found = next((name for name in CACHE_NAMES if name in parameters(function)), None)
    if found is None:
        raise unsupported(f"{owner} takes no KV cache as {' or '.join(map(repr, CACHE_NAMES))}")
    return found


@memoize
def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a function by name, seen through decorators."""
    return dict(inspect.signature(function).parameters)


@memoize
def all_parameters(kind: type[nn.Module]) -> set[str]:
    """Parameters of a class's forward and of those that it overrides."""
    return {name for base in kind.__mro__ if "forward" in vars(base) for name in parameters(vars(base)["forward"])}


# -- what a class does, by what its code names ----------------------------------------------------------------------

# Attention whose queries and keys are projections of their own, rotated in every layer: cheaper to read row by row.
PROJECTED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
PROJECTED += ("Qwen2_5_VLAttention", "Qwen3VLTextAttention")


@memoize
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names in the code of a class's forward and of those that it overrides, in the order of their first use."""
    forwards = (vars(base).get("forward") for base in kind.__mro__)
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards if forward is not None)
    return tuple(name for code in codes if code is not None for name in code.co_names)


def pre_norm(layer: nn.Module) -> nn.Module | None:
    """The norm at a layer's input; None: it has none there.

    Raises:
        LitPruneError: its code names one that isn't there.
    """
    for name in _norms(type(layer)):
        found = layer._modules.get(name)
        if found is not None or name == "input_layernorm":
            if found is None:
                raise unsupported(f"{type(layer).__name__} has no {name}")
            return None if name.startswith("post") else found
    return None


@memoize
def _norms(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names in a class's code that may be norms': flags and functions may be named so too."""
    return tuple(name for name in _names(kind) if "norm" in name)


def projects(layer: nn.Module) -> bool:
    """True if a layer's own queries and keys can be had by its projections, row by row."""
    own = getattr(layer, "self_attn", None)
    if own is None:
        return "self_attn" in _names(type(layer))
    return any(base.__name__ in PROJECTED for base in type(own).__mro__)


def builds_masks(model: nn.Module) -> bool:
    """True if a model builds masks of its own, such as those of images whose tokens see each other both ways."""
    kinds = (kind for kind in type(model).__mro__ if kind.__name__ != "GenerationMixin")
    return any("create_masks_for_generate" in vars(kind) for kind in kinds)


def plain_forward(layer: nn.Module) -> Callable:
    """A layer's forward without hooks of its own, and not compiled."""
    own = vars(layer).get("forward")
    if own is None:
        return type(layer).forward.__get__(layer)
    return getattr(own, "replaced", own) or type(layer).forward.__get__(layer)


# -- masks and activation checkpointing -----------------------------------------------------------------------------


def causal_mask(
    config: Any, hidden: Tensor, valid: Tensor | None, cache: Any, layer: int, skip: bool
) -> Tensor | BlockMask | None:
    """Causal mask in the form that the model's attention takes, sized by one layer's own cache; None: not needed.

    Args:
        config: the decoder's.
        hidden: states at the layer's input (batch, seq, width).
        valid: real columns (batch, cached + seq), or None if all are.
        cache: the KV cache, or None.
        layer: the layer whose cached columns count.
        skip: whether attention may be causal without a mask.
    """
    from transformers.masking_utils import create_causal_mask  # slow to import

    decodes = skip and valid is None and hidden.shape[1] == 1 and type(cache).__name__ == "DynamicCache"
    if decodes and config._attn_implementation == "sdpa":
        return None  # as the library would find, in many more steps
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        position_ids=None,  # ids with gaps would be read as packed sequences
        layer_idx=layer,
        allow_is_causal_skip=skip,
        **{cache_name(create_causal_mask, "create_causal_mask"): cache},
    )


def bidirectional_mask(config: Any, hidden: Tensor, valid: Tensor) -> Tensor | BlockMask | None:
    """Mask of an encoder's layer, in the form that its attention takes; None: not needed."""
    from transformers.masking_utils import create_bidirectional_mask  # slow to import

    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid)


def window_order(grids: Sequence[Sequence[int]], merge: int, window: int, patch: int) -> Tensor:
    """The order of blocks of `merge` x `merge` patches in which towers with attention inside windows put them."""
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(torch.tensor(grids), merge, window, patch)[0]


def enable_checkpointing(model: nn.Module, options: dict[str, Any]) -> None:
    """Prepare activation checkpointing, `options` for `torch.utils.checkpoint`; its name is new since 5.23.

    Raises:
        ValueError: the model has none.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_hooks_out_of_checkpoints(layers: Iterable[nn.Module]) -> None:
    """Have layers that are checkpointed run their forward alone again in backward, not their hooks: so since 5.23.

    A hook inside would run a second time, on what the first time has changed.
    """
    if not _checkpoints_calls():
        return
    for layer in layers:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, _ForwardCheckpoint):
            layer._gradient_checkpointing_func = _ForwardCheckpoint(layer, checkpoint)


@memoize
def _checkpoints_calls() -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


class _ForwardCheckpoint:
    """A layer's call, hooks included, around a checkpoint of its forward."""

    def __init__(self, layer: nn.Module, checkpoint: Callable) -> None:
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, call: Callable, *args: Any) -> Any:
        attributes = vars(self.layer)
        own, forward = attributes.get("forward"), self.layer.forward

        def checkpointed(*a: Any, **kwargs: Any) -> Any:
            return self.checkpoint(partial(forward, **kwargs), *a)

        checkpointed.replaced = own  # for `plain_forward`
        attributes["forward"] = checkpointed
        try:
            return call(*args)
        finally:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own


# -- what pickling a model leaves out -------------------------------------------------------------------------------


def drop_capturing_hooks(model: nn.Module) -> None:
    """Remove the hooks that the library adds in a first forward, to collect states; the next one adds them again.

    They are closures, so that a model that has run can't be pickled.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
        if getattr(module, "_output_capturing_hooks_installed", False):
            module._output_capturing_hooks_installed = False


def recording_classes(model: nn.Module) -> set[type[nn.Module]]:
    """Classes in a model that the library has on record as able to collect states."""
    return {type(module) for module in model.modules() if hasattr(type(module), "_can_record_outputs")}


def put_on_record(classes: Iterable[type[nn.Module]]) -> None:
    """Put such classes on record, as their constructors do, which unpickling in another process doesn't call.

    A model that reads its vision tower's states would find none.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    for kind in classes:
        dict.setdefault(_CAN_RECORD_REGISTRY, str(kind), kind._can_record_outputs)


# -- what a class has, and what is said where it lacks something ---------------------------------------------------


@memoize
def returns_several(kind: type[nn.Module]) -> bool:
    """True if a layer's class says that its forward returns a tuple."""
    return "tuple" in str(inspect.signature(kind.forward).return_annotation)


def rotation(attention: nn.Module) -> Callable | None:
    """The function that rotates queries and keys in the module that defines an attention class, if it has one."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def need(part: Any, name: str, attributes: tuple[str, ...]) -> None:
    """Raise `LitPruneError` unless a part of a model, an output or a library has these attributes."""
    if missing := [attribute for attribute in attributes if not hasattr(part, attribute)]:
        raise unsupported(f"{name} has no {' and no '.join(missing)}")


def unsupported(missing: str) -> LitPruneError:
    """The error for an installed library, or a model, that lacks what the hooks rely on."""
    import transformers

    return LitPruneError(
        f"transformers {transformers.__version__}: {missing}, which pruning relies on; known to work: the families of "
        f"docs/models.md on transformers {TESTED} (pip install 'transformers>=5.19,<5.25')"
    )
