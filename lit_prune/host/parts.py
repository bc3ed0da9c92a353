"""Parts of a transformers vision-language model: the only table of names per family."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.cost.formulas import TOWERS
from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import USUAL, crop_load
from lit_prune.errors import LitPruneError
from lit_prune.host.compat import all_parameters, builds_masks, parameters, pre_norm
from lit_prune.host.devices import device_of
from lit_prune.host.kinds import Kind, kinds
from lit_prune.pruners.base import Dims

# A forward has images (or videos) if it carries one of these inputs; one of these ids stands for them in a prompt.
INPUTS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
TOKENS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
CROSS_ATTENTION = ("cross_attention_mask", "image_attention_mask")  # inputs of models without visual tokens
INNER = ("model", "decoder", "language_model")  # where a language model keeps what runs its layers
# Model types whose videos stand in a prompt under the image's token.
VIDEOS_AS_IMAGES = ("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr", "glm5_next", "nemotron_h_omni")
NAMED_TILES = ("idefics3", "smolvlm", "granite_docling")  # each tile has its name in the prompt
ENDED_ROWS = ("pixtral",)  # towers whose images have a text token behind each row
# Model types whose images all have the same number of tokens. In the others it depends on the image's size.
FIXED_GRID = ("llava",)
NOMINAL = 576  # visual tokens of an image about which a configuration says nothing [ours]


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that pruning touches.

    `tokens`: id of each modality's placeholder. `image_length`: visual tokens of every image, `None` where images
    differ. `kinds`: what each layer does with tokens. `video_marks`: ids before and behind a video.
    `named_tiles`, `ended_rows`: text tokens separate the tiles of an image, or its rows.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    tokens: dict[str, int]
    dims: Dims
    image_length: int | None
    kinds: tuple[Kind, ...]
    video_marks: tuple[int, int] | None = None
    named_tiles: bool = False
    ended_rows: bool = False

    @property
    def device(self) -> torch.device:
        """Device that the decoder's first layer computes on; offloaded weights may wait elsewhere."""
        return device_of(self.norms[0])

    def image_columns(self, ids: Tensor) -> Tensor:
        """Columns of token ids that stand for an image's tokens, bool of the same shape."""
        return ids == self.tokens["image"]

    @property
    def norms(self) -> list[nn.Module]:
        """A module of each layer that is on its device: its first norm, else the layer itself."""
        norms = ((pre_norm(layer), layer) for layer in self.layers)
        return [layer if norm is None or not any(True for _ in norm.parameters()) else norm for norm, layer in norms]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper of peft, whose forward also `generate()` runs; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find(model: nn.Module) -> ModelParts:
    """Parts of a `*ForConditionalGeneration`; raises `LitPruneError` for a model that has no visual tokens to prune."""
    model = unwrap(model)
    decoder, tokens = _decoder(model), placeholders(model.config)
    if (reason := _unsuited(model, decoder, tokens)) is not None:
        raise LitPruneError(f"{type(model).__name__} {reason}; load a *ForConditionalGeneration, such as LLaVA")
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    marks = [getattr(model.config, f"video_{end}_token_id", None) for end in ("start", "end")]
    fixed = model.config.model_type in FIXED_GRID and getattr(vision, "model_type", None) in TOWERS
    visual = crop_load(model.config, 1).visual if fixed else nominal_tokens(model.config)
    return ModelParts(
        decoder=decoder,
        layers=decoder.layers,
        tokens=tokens,
        dims=Dims(width=text.hidden_size, depth=len(decoder.layers), visual=visual, varies=not fixed),
        image_length=visual if fixed else None,
        kinds=kinds(text, given=builds_masks(model)),
        video_marks=None if None in marks else tuple(marks),
        named_tiles=model.config.model_type in NAMED_TILES,
        ended_rows=ended_rows(model.config),
    )


def ended_rows(config: Config) -> bool:
    """True if text tokens stand behind each row of an image."""
    return getattr(getattr(config, "vision_config", None), "model_type", None) in ENDED_ROWS


def _decoder(model: nn.Module) -> nn.Module | None:
    """The module that runs the decoder's layers, out of a language model with its head around it."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    while found is not None and not isinstance(getattr(found, "layers", None), nn.ModuleList):
        found = next((part for name in INNER if isinstance(part := getattr(found, name, None), nn.Module)), None)
    return found


def placeholders(config: Config) -> dict[str, int]:
    """Ids of the tokens that stand for an image's or a video's, as far as a configuration has them."""
    found = {modality: _first_id(config, names) for modality, names in TOKENS.items()}
    if found["image"] is None:  # image tokens that are words of the vocabulary
        found["image"] = (getattr(config, "vocabulary_map", None) or {}).get("<image>")
    if config.model_type in VIDEOS_AS_IMAGES:
        found["video"] = found["image"]
    return {modality: token for modality, token in found.items() if token is not None}


def _first_id(config: Config, names: Sequence[str]) -> int | None:
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)


def _unsuited(model: nn.Module, decoder: nn.Module | None, tokens: dict[str, int]) -> str | None:
    """Reason why a model has no visual tokens in a decoder, in words that follow its name."""
    inputs = parameters(type(model).forward)
    if getattr(model.config, "is_encoder_decoder", False):
        return "is an encoder with a decoder that reads the image by cross-attention: it has no visual tokens to prune"
    if hasattr(model.config.get_text_config(), "rel_extent"):
        return (
            "adds a bias to its attention for each distance between two tokens, which it counts in the sequence that "
            "is left: tokens that stay would seem to move together"
        )
    if any(name in inputs for name in CROSS_ATTENTION):
        return "reads the image by cross-attention in its decoder's layers: it has no visual tokens to prune"
    if not any(name in all_parameters(type(model)) for names in INPUTS.values() for name in names):
        return "takes no pixels (pixel_values): nothing says when a prompt has an image"
    if decoder is None or not tokens:
        return "is no vision-language model with a decoder and an image token, so nothing says which tokens are visual"
    return None


def allowed_stages(config: Config) -> list[int]:
    """Decoder layers before which visual tokens may be dropped."""
    depth, first, taken = config.get_text_config().num_hidden_layers, _deepstack(config), reused(config)
    return [s for s in range(first, depth) if not any(source < s <= layer for layer, source in taken.items())]


def check_stages(config: Config, stages: tuple[int, ...]) -> None:
    """Raise `LitPruneError` where a model can't drop visual tokens before these decoder layers.

    Its first layers may need all visual tokens behind them (deepstack), later ones may reuse what earlier ones made.
    """
    if not stages:
        return
    full_until = _deepstack(config)
    if stages[0] < full_until:
        raise LitPruneError(
            f"no visual token may be dropped before layer {stages[0]}: behind its layers 0 to {full_until - 1} this "
            f"model adds vision features to all of them (deepstack); prune before layer {full_until} or later"
        )
    for layer, source in reused(config).items():
        if between := [stage for stage in stages if source < stage <= layer]:
            allowed = ", ".join(map(str, allowed_stages(config)))
            raise LitPruneError(
                f"no visual token may be dropped before layer {between[-1]}: layer {layer} of this model reuses what "
                f"layer {source} has made of all of them; it can be pruned before layers {allowed}"
            )


def _deepstack(config: Config) -> int:
    """The first layer that no vision features are added behind."""
    if mapped := getattr(config, "deepstack_layer_map", None):  # pairs of a vision layer and a decoder's
        return 1 + max([layer for _, layer in mapped] + list(getattr(config, "spatial_target_layers", ())))
    return 0


def reused(config: Config) -> dict[int, int]:
    """{layer: the earlier one whose keys, or choice of keys, it takes over}."""
    text = config.get_text_config()
    depth, found = text.num_hidden_layers, {}
    names = getattr(text, "layer_types", None) or ["full_attention"] * depth
    first = depth - (getattr(text, "num_kv_shared_layers", None) or 0)
    for layer in range(first, depth):
        found[layer] = max(source for source in range(first) if names[source] == names[layer])
    for layer, source in enumerate(getattr(text, "kv_source_layers", None) or ()):
        if source < layer:
            found[layer] = source
    last = 0
    for layer, kind in enumerate(getattr(text, "indexer_types", None) or ()):
        last = last if kind == "shared" else layer
        if last < layer:
            found[layer] = min(last, found.get(layer, last))
    return found


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
