"""Where things are in a transformers vision-language model: the only table of names per family."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import TOWERS, USUAL, crop_load
from lit_prune.errors import LitPruneError
from lit_prune.host.compat import rotation
from lit_prune.pruners.base import Dims

# A forward has images (or videos) if it carries this input; these ids, where a configuration has them, stand for them.
INPUTS = {"image": "pixel_values", "video": "pixel_values_videos"}
TOKENS = {"image": "image_token_id", "video": "video_token_id"}
# Model types whose images all have the same number of tokens. In the others it depends on the image's size.
FIXED_GRID = ("llava",)
NOMINAL = 576  # visual tokens of an image about which a configuration says nothing [ours]
# Families whose image tokens attend to each other in both directions.
BIDIRECTIONAL = ("paligemma", "gemma3", "gemma4", "gemma4_unified", "molmo2")


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that pruning touches.

    `tokens`: id of each modality's placeholder. `image_length`: visual tokens of every image, `None` where images
    differ.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    tokens: dict[str, int]
    dims: Dims
    image_length: int | None

    @property
    def device(self) -> torch.device:
        """Where the decoder computes; offloaded weights may wait elsewhere. Raises `LitPruneError` if it is several.

        Attention rows, masks and rotary embeddings go from layer to layer, so the layers have to be on one device.
        """
        devices = {_device(getattr(layer, "input_layernorm", layer)) for layer in self.layers}
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


def find(model: nn.Module) -> ModelParts:
    """Parts of a `*ForConditionalGeneration`; raises `LitPruneError` for a model that isn't one."""
    model = unwrap(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    ids = {modality: getattr(model.config, name, None) for modality, name in TOKENS.items()}
    if layers is None or ids["image"] is None:
        raise LitPruneError(
            f"{type(model).__name__} is no vision-language model with a decoder and an image token; "
            f"load a *ForConditionalGeneration, such as LLaVA"
        )
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    fixed = model.config.model_type in FIXED_GRID and getattr(vision, "model_type", None) in TOWERS
    visual = crop_load(model.config, 1).visual if fixed else nominal_tokens(model.config)
    return ModelParts(
        decoder=decoder,
        layers=layers,
        tokens={modality: token for modality, token in ids.items() if token is not None},
        dims=Dims(width=text.hidden_size, depth=len(layers), visual=visual, varies=not fixed),
        image_length=visual if fixed else None,
    )


def check_stages(config: Config, stages: tuple[int, ...]) -> None:
    """Raise `LitPruneError` where a model can't drop visual tokens before these decoder layers.

    Its first layers may need all visual tokens behind them (deepstack), later ones may see a window of the context.
    """
    if not stages:
        return
    if config.model_type in BIDIRECTIONAL:
        raise LitPruneError(
            f"models of the family {config.model_type} can't be pruned: their image tokens attend to each other in "
            f"both directions, and the masks behind a stage are causal"
        )
    full_until = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if stages[0] < full_until:
        raise LitPruneError(
            f"no visual token may be dropped before layer {stages[0]}: behind its layers 0 to {full_until - 1} this "
            f"model adds vision features to all of them (deepstack); prune before layer {full_until} or later"
        )
    windowed = [layer for layer in _windowed(config.get_text_config()) if layer >= stages[0]]
    if windowed:
        raise LitPruneError(
            f"pruning before layer {stages[0]} is not possible: layers {windowed} attend to a window of the "
            f"context, which counts cached columns, and these are not positions once tokens are dropped; where "
            f"prompts are shorter than the window, load the model with sliding_window=None in its text_config"
        )


def nominal_tokens(config: Config) -> int:
    """Visual tokens that stand for an image's where images differ: those of one tile, else of a usual image [ours].

    For display, and the repair adapter's number of codes: a configuration that doesn't say gives `NOMINAL`.
    """
    if isinstance(given := getattr(config, "image_seq_length", None), int) and given > 0:
        return given
    vision = getattr(config, "vision_config", None)
    image, patch = (_height_width(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if image is None and (merge := getattr(vision, "spatial_merge_size", None)):
        image, patch = USUAL, patch and tuple(side * merge for side in patch)
    if image is None or patch is None:
        return NOMINAL
    return max(1, (image[0] // patch[0]) * (image[1] // patch[1]))


def _height_width(size: object) -> tuple[int, int] | None:
    """Both sides of what may be given as one number, two, or not at all."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    return sides if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides) else None


def _windowed(text) -> tuple[int, ...]:
    """Decoder layers whose attention does not reach over the whole context."""
    window = getattr(text, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(text, "layer_types", None) or [default] * text.num_hidden_layers
    if window is not None and window >= text.max_position_embeddings:
        kinds = ["full_attention" if kind == "sliding_attention" else kind for kind in kinds]
    return tuple(layer for layer, kind in enumerate(kinds) if kind != "full_attention")


@torch.no_grad()
def plain_keys(layer: nn.Module, states: Tensor) -> Tensor:
    """The layer's own keys of normed `states` (batch, seq, width), before their rotation: (batch, seq, inner)."""
    attention = layer.self_attn
    keys = attention.k_proj(states)
    norm = getattr(attention, "k_norm", None)
    return keys if norm is None else norm(keys.unflatten(2, (-1, attention.head_dim))).flatten(2)


def query_key(
    layer: nn.Module, queries: Tensor, keys: Tensor, query_rope: tuple[Tensor, Tensor], key_rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The layer's own rotated queries and keys of normed states, as its attention will compute them.

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
