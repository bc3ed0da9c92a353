"""Sizes of decoders, read off a configuration's fields; `lit_prune.host.structure` counts any other on its modules."""

from dataclasses import replace
from typing import Any

from lit_prune.cost.flops import LayerSize, ModelSize, plain_layer
from lit_prune.cost.shapes import Config
from lit_prune.errors import LitPruneError

FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Decoders whose every layer is attention by four projections, and SwiGLU or GeGLU, beside those of Qwen 3.5.
PLAIN = ("llama", "mistral", "mistral4", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2")
PLAIN += ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text", "glm46v_text", "molmo2_text", "smollm3")
PLAIN += ("hyperclovax",)
GATED_DELTA = ("qwen3_5_text",)


def decoder_size(config: Config) -> ModelSize:
    """Sizes for the price of the decoder alone, with KV cache and LM head.

    Raises `LitPruneError` for a decoder whose layers aren't described by the fields of its configuration.
    """
    text, found = config.get_text_config(), decoder_fields(config)
    kind = getattr(text, "model_type", None)
    if found.mlp == 0 or kind not in (*PLAIN, *GATED_DELTA):
        raise LitPruneError(f"the price of a decoder of type {kind} isn't known")
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * found.depth
    window = getattr(text, "sliding_window", None)
    if kind in GATED_DELTA:
        return replace(found, layers=tuple(_gated(text, found, kind == "linear_attention") for kind in kinds))
    if window is None or not any("sliding" in kind for kind in kinds):
        return found
    whole = plain_layer(found)
    return replace(found, layers=tuple(replace(whole, window=window) if "sliding" in k else whole for k in kinds))


def decoder_fields(config: Config) -> ModelSize:
    """Sizes of a decoder by the fields of its configuration; `mlp` is 0 where there is no field for it.

    Raises `LitPruneError` where another field is missing.
    """
    text = config.get_text_config()
    sizes = [_field(text, name) for name in FIELDS]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise LitPruneError(f"the price of a decoder of type {getattr(text, 'model_type', '?')} isn't known")
    width, depth, heads, vocab = sizes
    mlp = _field(text, "intermediate_size")
    return ModelSize(
        width=width,
        depth=depth,
        heads=heads,
        key_heads=_field(text, "num_key_value_heads") or heads,
        head_dim=_field(text, "head_dim") or width // heads,
        mlp=mlp if isinstance(mlp, int) else 0,
        vocab=vocab,
        tower_known=False,
    )


def _field(text: Any, name: str) -> Any:
    """A field of a configuration; None: it has none, or one for each layer, which it refuses to read as one."""
    try:
        return getattr(text, name, None)
    except Exception:  # of a class of its own
        return None


def _gated(text: Any, size: ModelSize, linear: bool) -> LayerSize:
    """A layer of Qwen 3.5: attention whose output is gated, or a gated delta rule behind a convolution."""
    plain = plain_layer(size)
    if not linear:
        return replace(plain, matrices=plain.matrices + size.width * size.heads * size.head_dim)
    heads, key, value = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    mixed = 2 * text.linear_num_key_heads * key + heads * value
    projections = size.width * (mixed + 2 * heads * value + 2 * heads)
    return LayerSize(
        matrices=projections + mixed * text.linear_conv_kernel_dim + 3 * size.width * size.mlp,
        pair=0,
        cached=0,
        state=mixed * text.linear_conv_kernel_dim + heads * key * value,
        recurrence=3 * heads * key * value,
    )
