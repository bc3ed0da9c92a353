"""Images of noise, as the processors of the families would hand them to their models."""

import torch
from torch import Tensor, nn

from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import first_side, image_load, merged, pair, patch_values
from lit_prune.cost.tiling import tile_count
from lit_prune.host.zoo.inputs import marker, visual_tokens
from lit_prune.host.zoo.pixels import Picture, drawn, parameters

# Model types whose images are made by the rule of their processor, with all crops; others by their forward's signature.
RULED = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "vipllava",
    "internvl",
    "gemma3",
    "paligemma",
    "idefics3",
    "smolvlm",
)
RULED += ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v")
TILED = ("aya_vision", "cohere2_vision")  # whose tiles are chosen as InternVL's
NOMINAL_PATCH = 16  # pixels along a patch's sides where a configuration doesn't say [ours]
Inputs = dict[str, Tensor]


def noise(
    model: nn.Module, token: int, batch: int, image: tuple[int, int], generator: torch.Generator
) -> tuple[Inputs, Tensor]:
    """Model inputs of `batch` images, one a sample, and the ids that stand for one of them in a prompt.

    `token`: the placeholder of an image's token. `image`: height and width in pixels, for models that don't scale every
    image to one size.
    """
    if model.config.model_type in RULED:
        inputs, visual = _ruled(model.config, batch, image, generator)
        return inputs, torch.full((visual,), token)
    return _by_signature(model, token, batch, image)


def _ruled(config: Config, batch: int, image: tuple[int, int], generator: torch.Generator) -> tuple[Inputs, int]:
    load, vision = image_load(config, *image), config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # patches in a row, and the grid they come from
        grid = [1, *_grid(config, image)]
        pixels = torch.randn(batch * load.patches, patch_values(vision), generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * batch)}, load.visual
    height, width = pair(vision.image_size)
    crops = load.patches // ((height // pair(vision.patch_size)[0]) * (width // pair(vision.patch_size)[1]))
    if hasattr(config, "image_grid_pinpoints"):
        pixels = torch.randn(batch, crops, 3, height, width, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([image] * batch)}, load.visual
    pixels = torch.randn(batch * crops, 3, height, width, generator=generator)
    if hasattr(config, "scale_factor"):  # the crops of each sample in a row
        pixels = pixels.unflatten(0, (batch, crops))
    return {"pixel_values": pixels}, load.visual


def _by_signature(model: nn.Module, token: int, batch: int, image: tuple[int, int]) -> tuple[Inputs, Tensor]:
    """As far as a forward's parameters show its conventions; how many tokens an image has, its own encoder says."""
    inputs = _images(model, image, batch)
    visual = torch.full((visual_tokens(model.config.model_type, model, one_image(model, image)),), token)
    start, end = (marker(model.config, which) for which in ("start", "end"))
    return inputs, torch.cat([*start, visual, *end])


def one_image(model: nn.Module, image: tuple[int, int]) -> Inputs:
    """Noise of one image as a forward's parameters show a class's conventions; on the meta device pixels alone are."""
    return {name: _placed(value, model) for name, value in _images(model, image, 1).items()}


def _images(model: nn.Module, image: tuple[int, int], batch: int) -> Inputs:
    config = model.config
    grid, tiles = _grid(config, image, "image_merge_sizes" in parameters(model)), _tiles(config, image)
    shown = [Picture(2 * row + 1, grid) for row in range(batch) for _ in range(tiles)]
    return drawn(config.model_type, model)(shown, [tiles] * batch)


def _tiles(config: Config, image: tuple[int, int]) -> int:
    """Images that the tower is given for one, the thumbnail among them."""
    if config.model_type not in TILED:
        return 1
    tiles = tile_count(*image, pair(config.vision_config.image_size))
    return tiles + (tiles > 1)


def _placed(value: Tensor, model: nn.Module) -> Tensor:
    if value.is_floating_point():
        return value.to(model.device, model.dtype)
    return value if model.device.type == "meta" else value.to(model.device)


def _grid(config: Config, image: tuple[int, int], by_image: bool = False) -> tuple[int, int]:
    """Patches along the sides of an image that keeps its own size, in whole blocks of those that are merged.

    `by_image`: the processor says how many those are, 2 x 2.
    """
    vision = getattr(config, "vision_config", None) or config
    merge = merged(config) if hasattr(config, "vision_config") else 1
    merge = 2 if by_image else max(merge, first_side(getattr(vision, "pooling_kernel_size", None)) or 1)
    patch = first_side(getattr(vision, "patch_size", None)) or NOMINAL_PATCH
    height, width = (max(1, round(side / patch / merge)) * merge for side in image)
    return height, width
