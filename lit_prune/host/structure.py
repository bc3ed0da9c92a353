"""Sizes of a decoder for its price, counted on its own modules: whatever they are, they may be without weights (meta).

Matrices are those of linear layers, of experts that a token takes, and parameters of two dimensions; attention is
recognised by its output projection. A recurrence is priced in its step-by-step form, which kernels rearrange.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lit_prune.cost.decoders import decoder_fields
from lit_prune.cost.flops import LayerSize, ModelSize, plain_layer
from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import USUAL, known_size, model_size
from lit_prune.host import parts
from lit_prune.host.kinds import Kind

TAKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k", "experts_per_token", "top_k")
OUTPUT = re.compile(r"(o|out|wo|dense|c|output)(_proj)?|proj|dense|wo")
EXPERTS = 3  # dimensions of a parameter that holds the matrices of all experts


def counted_size(model: nn.Module) -> ModelSize | None:
    """Sizes for the price of a model: the tower as far as its configuration tells it, every layer of the decoder."""
    model = parts.unwrap(model)
    found = known_size(model.config)
    with suppress(Exception):  # a figure never stops the work that it is about
        here = parts.find(model)
        fields = found or _described(model.config)
        layers = tuple(_layer(layer, kind, model.config) for layer, kind in zip(here.layers, here.kinds, strict=True))
        return replace(fields, layers=() if set(layers) == {plain_layer(fields)} else layers)
    return found


def _described(config: Config) -> ModelSize:
    """The fields of a decoder whose layers are counted, with the tower where its price is known."""
    fields = decoder_fields(config)
    with suppress(Exception):
        return model_size(config, decoder=fields)
    return fields


def meta_size(config: Config, image: tuple[int, int] = USUAL) -> ModelSize | None:
    """`counted_size` of a model that is built without weights; a tower without a formula runs for one `image`."""
    from transformers import AutoModelForImageTextToText  # brings models' code

    from lit_prune.host.dry_run import tower_flops

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    size = counted_size(model)
    if size is not None and not size.tower_known:
        with suppress(Exception):  # towers that can't be run without weights, and inputs that can't be made
            size = replace(size, counted=tower_flops(model, image))
    return size


def _layer(layer: nn.Module, kind: Kind, config: Config) -> LayerSize:
    text = config.get_text_config()
    attention = _attention(layer) if kind.attends else None
    pair, cached = (0, 0) if attention is None else _attended(*attention, text)
    state, recurrence = (0, 0) if not kind.recurrent else _recurrence(layer)
    matrices, visual = (sum(_matrices(layer, text, without=moe)) for moe in ("vision_moe", "text_moe"))
    return LayerSize(
        matrices=matrices,
        pair=pair,
        cached=cached,
        window=kind.window if not kind.prompt else None,
        state=state,
        recurrence=recurrence,
        visual=None if visual == matrices else visual,
    )


def _matrices(module: nn.Module, text: Any, share: float = 1.0, without: str = "") -> Iterator[float]:
    """Multiply-adds for one token in each matrix of a module; `share`: of it that a token takes.

    `without`: name of the experts that it doesn't, where text and images have their own.
    """
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear):  # also where its weights are packed, or on other ranks
        yield share * module.in_features * module.out_features
    elif isinstance(module, nn.Conv1d):
        yield share * module.weight.numel()
    elif not isinstance(module, nn.Embedding) and "Norm" not in type(module).__name__:
        for values in own.values():
            if (values.ndim == 2 and len(values) > 1) or (
                values.ndim == EXPERTS and values.shape[1] == 1
            ):  # a convolution by channel
                yield share * values.numel()
            elif values.ndim == EXPERTS:
                yield share * values.numel() * _taken(text, len(values))
    for child in (part for name, part in module.named_children() if name != without):
        experts = isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(part) for part in child}) == 1
        yield from _matrices(child, text, share * _taken(text, len(child)) if experts else share, without)


def _taken(text: Any, experts: int) -> float:
    """Share of so many experts that a token takes."""
    found = next((value for name in TAKEN if isinstance(value := getattr(text, name, None), int)), None)
    if found is None:
        raise ValueError("how many experts a token takes isn't known")
    return min(1.0, found / experts)


def _attention(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The attention of a layer and its output projection."""
    for module in layer.children():
        named = {name: part for name, part in module.named_children() if isinstance(part, nn.Linear)}
        if not any(name.startswith(("q", "wq", "W_q", "qkv", "k", "query")) for name in named):
            continue
        found = [part for name, part in named.items() if OUTPUT.fullmatch(name)]
        if found:
            return module, found[-1]
    raise ValueError("no attention whose output projection is known")


def _attended(attention: nn.Module, out: nn.Module, text: Any) -> tuple[int, int]:
    """Multiply-adds of a (query, key) pair, and values that the cache holds of a token."""
    head = _first(attention, "head_dim", "attention_head_size") or getattr(text, "head_dim", None)
    keys, values = _first(attention, "qk_head_dim") or head, _first(attention, "v_head_dim") or head
    heads = out.in_features // values
    groups = _first(attention, "num_key_value_groups") or 1
    cached = heads // groups * (keys + values)
    if (rank := _first(attention, "kv_lora_rank")) is not None:  # the cache holds what keys and values are made of
        cached = rank + (_first(attention, "qk_rope_head_dim") or 0)
    chosen = 0
    if (indexer := getattr(attention, "indexer", None)) is not None:  # which has keys of its own, of one head
        head = _first(indexer, "head_dim", "index_head_dim") or 0
        chosen = head * (_first(indexer, "n_heads", "index_n_heads") or 1) // (_first(indexer, "compress_ratio") or 1)
        cached += head
    shared = getattr(attention, "is_kv_shared_layer", False)
    return heads * (keys + values) + chosen, 0 if shared else cached


def _recurrence(layer: nn.Module) -> tuple[int, int]:
    """Values of the state that a layer keeps, and multiply-adds for a token to read and to write it."""
    values, steps = 0, 0
    for module in layer.modules():
        if isinstance(module, nn.Conv1d):
            values += module.weight.shape[0] * module.kernel_size[0]
        key, value, heads = (_first(module, *names) for names in STATES)
        key = key or (value if "Linear" in type(module).__name__ else None)
        if key and value and heads:
            values, steps = values + heads * key * value, steps + 3 * heads * key * value
    return values, steps


STATES = (
    ("head_k_dim", "ssm_state_size", "key_head_dim"),
    ("head_v_dim", "head_dim", "value_head_dim"),
    ("num_v_heads", "num_heads"),
)


def _first(part: Any, *names: str) -> int | None:
    return next((found for name in names if isinstance(found := getattr(part, name, None), int)), None)
