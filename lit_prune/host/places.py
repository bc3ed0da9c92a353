"""Where things are in a transformers vision-language model: the only table of names per family."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.pruners.base import Dims


@dataclass(frozen=True)
class Places:
    """The parts of a model that pruning touches."""

    decoder: nn.Module
    layers: nn.ModuleList
    image_token: int
    dims: Dims

    @property
    def device(self) -> torch.device:
        """Where the decoder computes; offloaded weights may wait elsewhere. Raises `LitPruneError` if it is several.

        Attention rows, masks and rotary embeddings go from layer to layer, so the layers have to be on one device.
        """
        devices = {_device(layer.input_layernorm) for layer in self.layers}
        if len(devices) > 1:
            raise LitPruneError(
                f"the decoder is spread over {', '.join(sorted(map(str, devices)))}, and pruning needs its layers on "
                f"one device: load with a device_map that keeps them together, such as device_map={{'': 0}}, which may "
                f"offload to 'cpu' or 'disk'"
            )
        return devices.pop()


def _device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate's hook says so where it brings the weights in from the CPU or the disk."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper of peft, whose forward also `generate()` runs; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find(model: nn.Module) -> Places:
    """Parts of a `*ForConditionalGeneration`; raises `LitPruneError` for a model that isn't one."""
    model = unwrap(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    token = getattr(model.config, "image_token_id", None)
    if layers is None or token is None:
        raise LitPruneError(
            f"{type(model).__name__} is no vision-language model with a decoder and an image token; "
            f"load a *ForConditionalGeneration, such as LLaVA"
        )
    text = model.config.get_text_config()
    dims = Dims(width=text.hidden_size, depth=len(layers), visual=visual_tokens(model.config))
    return Places(decoder, layers, token, dims)


def visual_tokens(config) -> int:
    """Visual tokens of one image for models with a fixed number: patches of the vision tower, plus CLS if it stays."""
    if getattr(config, "image_seq_length", None):
        return config.image_seq_length
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return side * side + (getattr(config, "vision_feature_select_strategy", "default") == "full")


def query_key(
    layer: nn.Module, queries: Tensor, keys: Tensor, query_rope: tuple[Tensor, Tensor], key_rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The layer's own rotated queries and keys of normed states, as its attention will compute them.

    `queries` (batch, rows, width) and `keys` (batch, seq, width); returns (batch, heads, rows, head) and
    (batch, key heads, seq, head). Projections are called as modules, so sharded weights are gathered by their hooks.
    """
    attention = layer.self_attn
    rotate: Callable = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    out = []
    for states, (cos, sin), name in ((queries, query_rope, "q"), (keys, key_rope, "k")):
        heads = getattr(attention, f"{name}_proj")(states).view(*states.shape[:2], -1, attention.head_dim)
        norm = getattr(attention, f"{name}_norm", None)
        heads = (heads if norm is None else norm(heads)).transpose(1, 2)
        out.append(rotate(heads, heads, cos, sin)[0])
    return out[0], out[1]
