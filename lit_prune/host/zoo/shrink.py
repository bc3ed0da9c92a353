"""Every class of transformers' image-text-to-text list as a tiny random model, by rule from its default configuration.

A field's name says what it measures, so that one table of names serves all classes; what a class asks beyond its
fields' names stands in `exceptions.py`.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from lit_prune.host.zoo.exceptions import FIELDS

DEPTH, WIDTH, VOCABULARY = 8, 64, 256
SIDE, PATCH = 32, 8  # pixels of an image and a patch in towers of a fixed size

Fields = dict[str, Any]

# Of the decoder, then of everything else. A field that a configuration doesn't have, or that is None, stays so.
TEXT: Fields = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_heads": 4,
    "head_dim": 32,
    "global_head_dim": 32,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "max_position_embeddings": 512,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 24,
    "sliding_window_size": 24,
    "attention_chunk_size": 24,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "index_topk": 512,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "query_pre_attn_scalar": 32,
    "moe_hidden_size": WIDTH,
    "initializer_range": 0.1,
}
OTHER: Fields = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "encoder_ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "depth": 3,
    "encoder_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "attention_heads": 2,
    "encoder_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_position_embeddings": 64,
    "window_size": 32,
    "max_position_embeddings": 512,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "encoder_hidden_size": 32,
    "moe_intermediate_size": 32,
    "pos_emb_height": 16,
    "pos_emb_width": 16,
    "head_dim": 16,
}
SDPA: Fields = {"attn_implementation": "sdpa"}
LARGEST = 100_000_000  # parameters of a model that runs here in a moment
LINKED = ("hidden_size", "projection_dim", "projector_hidden_size", "image_text_hidden_size")
AUDIO: Fields = {
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "d_model": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "downsample_hidden_size": 16,
    "output_dim": WIDTH,
    "text_hidden_size": WIDTH,
    "adapter_out_dim": WIDTH,
}


def default_config(kind: str) -> Any:
    """A class's own configuration, as the library has it by default."""
    from transformers import CONFIG_MAPPING  # slow to import

    return CONFIG_MAPPING[kind]()


def tiny_config(kind: str) -> Any:
    """The configuration of a class of the list, `kind` its model type, shrunk."""
    from transformers import CONFIG_MAPPING

    config = default_config(kind)
    before, text, ids = config.to_dict(), _text_name(config), _Ids()
    if "vision_config" in before and before["vision_config"] is None:
        before["vision_config"] = config.sub_configs["vision_config"]().to_dict()
    fields = _part(before, text is None, ids, text)
    _link(fields, text)
    if "image_grid_pinpoints" in fields:
        fields["image_grid_pinpoints"] = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    for path, value in FIELDS.get(kind, {}).items():
        _put(fields, path, value)
    return CONFIG_MAPPING[kind].from_dict(fields)


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """The model in fp32 and evaluation mode, frozen, with SDPA where the class has it.

    A model that the rule doesn't make small is left without weights (on the meta device).
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model, options = _build(kind)
    if sum(weights.numel() for weights in model.parameters()) <= LARGEST:
        model = model_class(kind)._from_config(tiny_config(kind), dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def _build(kind: str) -> tuple[nn.Module, Fields]:
    make = partial(model_class(kind)._from_config, dtype=torch.float32)
    try:
        return make(tiny_config(kind), **SDPA), SDPA
    except ValueError:  # the class has no such implementation
        return make(tiny_config(kind)), {}


def model_class(kind: str) -> type[nn.Module]:
    """The class that the list names for a model type."""
    import transformers

    return getattr(transformers, listed()[kind])


def listed() -> dict[str, str]:
    """Names of the classes in the installed transformers' image-text-to-text list, by model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


class _Ids:
    """Ids of special tokens, numbered from the vocabulary's end; one that the library uses twice stays one."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}

    def small(self, token: int) -> int:
        return self.found.setdefault(token, VOCABULARY - 1 - len(self.found))


def _text_name(config: Any) -> str | None:
    """Name of the decoder's configuration in a model's; None: it is the model's own."""
    text = config.get_text_config()
    return next((name for name in config.sub_configs if getattr(config, name, None) is text), None)


def _part(fields: Fields, is_text: bool, ids: _Ids, text: str | None = None) -> Fields:
    """One configuration of a model, shrunk; `text` names the decoder's among its parts."""
    table, found = TEXT if is_text else OTHER, dict(fields)
    for name, value in fields.items():
        if name == "audio_config" and isinstance(value, dict):  # nobody speaks; it is there all the same
            found[name] = {**value, **{field: AUDIO[field] for field in AUDIO if field in value}}
        elif name.endswith("_config") and isinstance(value, dict) and name != "per_layer_config":
            found[name] = _part(value, name == text, ids)
        elif name.endswith(("_id", "token_index")) and isinstance(value, int):
            found[name] = ids.small(value)
        elif name in table and value is not None and not isinstance(value, dict):
            found[name] = _like(value, table[name])
    for name in ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"):
        if isinstance(fields.get(name), int):
            found[name] = VOCABULARY
    if is_text and isinstance(heads := fields.get("num_key_value_heads"), int):
        found["num_key_value_heads"] = 4 if heads == fields["num_attention_heads"] else 2
    if is_text and fields.get("head_dim") and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        found["head_dim"] = found["qk_rope_head_dim"]
    if isinstance(depth := fields.get("num_hidden_layers"), int):
        found |= _per_layer(fields, depth, found["num_hidden_layers"])
    if isinstance(rope := found.get("rope_parameters"), dict):
        found["rope_parameters"] = _rope(rope, found)
    return found


def _per_layer(fields: Fields, before: int, depth: int) -> Fields:
    """Settings of each layer for fewer layers: the first ones, and last one of each kind that isn't among them."""
    kinds = fields.get("layer_types") or fields.get("layers_block_type") or [""] * before
    chosen = list(range(min(depth, before)))
    missing = [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind not in kinds[:depth]]
    chosen[len(chosen) - len(missing) :] = missing
    found: Fields = {}
    for name, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == before and before > depth:
            numbered = list(value) == sorted(set(value)) if all(isinstance(v, int) for v in value) else False
            found[name] = list(range(depth)) if numbered else [value[layer] for layer in chosen]
    if apart := fields.get("per_layer_config"):
        settings = {int(layer): _own(values) for layer, values in apart.items()}
        found["per_layer_config"] = {i: settings[layer] for i, layer in enumerate(chosen) if layer in settings}
    return found


def _own(values: Fields) -> Fields:
    """Settings of one layer in place of the decoder's, shrunk."""
    found = {name: TEXT.get(name, value) for name, value in values.items()}
    if isinstance(heads := values.get("num_key_value_heads"), int):
        found["num_key_value_heads"] = 4 if heads == values.get("num_attention_heads") else 2
    return found


def _like(value: Any, small: Any) -> Any:
    """A small value in the form of a large one."""
    if isinstance(value, list | tuple) and not isinstance(small, list):
        return [small] * len(value)
    return small


def _rope(rope: Fields, fields: Fields) -> Fields:
    """Rotary settings whose sections fill the small head."""
    found = {key: _rope(value, fields) if isinstance(value, dict) else value for key, value in rope.items()}
    sections = rope.get("mrope_section")
    if sections:
        head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        scaled = [max(1, part * half // sum(sections)) for part in sections]
        scaled[0] += half - sum(scaled)
        found["mrope_section"] = scaled
    return found


def _link(fields: Fields, text: str | None) -> None:
    """Widths that other parts name for the decoder's, or for the tower's, follow them."""
    for name, part in fields.items():
        if not isinstance(part, dict) or name == text:
            continue
        for field in ("out_hidden_size", "output_dim", "text_hidden_size", "projection_dim", "vision_output_dim"):
            if isinstance(part.get(field), int):
                part[field] = WIDTH
    if text and "initializer_range" in fields:
        fields["initializer_range"] = TEXT["initializer_range"]
    for field in LINKED if text else ():
        if isinstance(fields.get(field), int):
            fields[field] = WIDTH


def _put(fields: Fields, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        fields = fields[part]
    fields[last] = value
