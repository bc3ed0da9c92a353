"""Sizes for `lit_prune.cost.flops`, read off a transformers configuration or a shipped shape; no model is needed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from math import isqrt
from typing import Any

from torch import Tensor

from lit_prune.cost.decoders import decoder_size
from lit_prune.cost.flops import ModelSize
from lit_prune.cost.formulas import has_formula, tower_fields
from lit_prune.cost.shapes import Config
from lit_prune.cost.tiling import overlapped, overlapping_crops, square_crops, tile_count
from lit_prune.cost.trace import ImageLoad, VisionTrace

# Fields that say how many patches along a side become one visual token, or one over it.
MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor", "scale_factor", "hidden_stride")
RATIOS = ("downsample_ratio", "pixel_shuffle_ratio")
SIZED = ("image_grid_thw", "image_sizes", "video_grid_thw", "pixel_values_videos")  # inputs that tell sizes
USUAL = (672, 672)  # height and width in pixels of the image that stands for an unknown one [ours]


def model_size(config: Config, image: tuple[int, int] = USUAL, decoder: ModelSize | None = None) -> ModelSize:
    """Sizes for the price of a forward; `image` is a usual image's height and width in pixels.

    `decoder`: sizes of the decoder, by default those that the configuration describes. Raises `LitPruneError` for a
    vision tower, or a decoder, whose arithmetic isn't known.
    """
    decoder, matrices, vision = decoder or decoder_size(config), tower_fields(config)[1], config.vision_config
    merge, layers = merged(config), getattr(config, "vision_feature_layer", -1)
    features = vision.hidden_size * merge * merge * (1 if isinstance(layers, int) else len(layers))
    return replace(
        decoder,
        tower_known=True,
        vision_width=vision.hidden_size,
        vision_heads=getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", 1),
        vision_mlp=vision.out_hidden_size if _is_glm(vision) else vision.intermediate_size,
        vision_matrices=matrices,
        patch_values=patch_values(vision),
        projector_in=features,
        projector_inner=features if hasattr(vision, "spatial_merge_size") else decoder.width,
        projectors=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        projector_matrices=_projector(config, features, decoder.width),
        image=image_load(config, *image),
    )


def _is_glm(vision: Config) -> bool:
    return vision.model_type == "glm4v_vision"


def _projector(config: Config, features: int, width: int) -> int:
    """Multiply-adds for one row of projectors that aren't two matrices; 0: they are."""
    kind, vision = config.model_type, config.vision_config
    if kind in ("gemma3", "paligemma"):
        return vision.hidden_size * width
    if hasattr(config, "scale_factor"):
        return features * width
    if _is_glm(vision):  # a convolution, a matrix, a gated MLP
        out = vision.out_hidden_size
        return features * out + out * out + 3 * out * vision.intermediate_size
    if kind == "molmo2":  # one query for each block of patches, then a gated MLP
        own, block = config.adapter_config, merged(config) ** 2
        taken, inner = own.hidden_size * len(own.vision_feature_layer), own.num_attention_heads * own.head_dim
        attention = taken * inner + 2 * block * taken * inner + inner * own.hidden_size + 2 * block * inner
        return attention + own.intermediate_size * (2 * own.hidden_size + own.text_hidden_size)
    return 0


def known_size(config: Config, image: tuple[int, int] = USUAL) -> ModelSize | None:
    """As much of `model_size` as is known: without the vision tower, or nothing at all (None).

    For figures, which never stop the work that they are about.
    """
    for known in (lambda: model_size(config, image), lambda: decoder_size(config)):
        # Configurations are anyone's: fields are missing, are lists, differ from layer to layer or refuse to be read.
        with suppress(Exception):
            return known()
    return None


def image_load(config: Config, height: int, width: int) -> ImageLoad:
    """Load of an image of so many pixels on the model, by the rule of the model's own processor.

    Limits on an image's pixels, which stand in a processor's files, are not known here.
    """
    if hasattr(config.vision_config, "spatial_merge_size"):
        factor = pair(config.vision_config.patch_size)[0] * merged(config)
        rows, columns = (max(1, round(side / factor)) * merged(config) for side in (height, width))
        return grid_load(config, 1, rows, columns)
    if hasattr(config, "image_grid_pinpoints"):
        return _any_resolution(config, height, width)
    if hasattr(config, "downsample_ratio"):
        tiles = tile_count(height, width, pair(config.vision_config.image_size))
        return crop_load(config, tiles + (tiles > 1))
    if hasattr(config, "scale_factor"):
        return crop_load(config, square_crops(height, width))
    if config.model_type == "molmo2":
        side, patch = pair(config.vision_config.image_size)[0], pair(config.vision_config.patch_size)[0]
        rows, columns = overlapping_crops(height, width, side, patch)
        return crop_load(config, rows * columns + 1, overlapped(rows, columns, side, patch, merged(config)))
    return crop_load(config, 1)


def crop_load(config: Config, crops: int, visual: int | None = None) -> ImageLoad:
    """The load of `crops` crops of the tower's fixed size, which give `visual` tokens (all of theirs by default)."""
    vision = config.vision_config
    rows, columns = (
        pixels // patch for pixels, patch in zip(pair(vision.image_size), pair(vision.patch_size), strict=True)
    )
    tokens, depth = rows * columns + tower_fields(config)[0], vision.num_hidden_layers
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    projected = crops * (tokens if whole else rows * columns) // merged(config) ** 2
    if visual is not None and config.model_type == "molmo2":
        projected = visual  # of what crops share one patch is pooled
    return ImageLoad(
        patches=crops * rows * columns,
        tokens=(crops * tokens,) * depth,
        pairs=(crops * tokens * tokens,) * depth,
        projected=projected,
        visual=projected if visual is None else visual,
    )


def grid_load(config: Config, frames: int, rows: int, columns: int) -> ImageLoad:
    """The load of an image that the tower takes in its own size, as a grid of patches, with or without windows."""
    vision, merge = config.vision_config, merged(config)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    patches = frames * rows * columns
    windowed = full = frames * (rows * columns) ** 2
    if hasattr(vision, "window_size"):
        side = vision.window_size // merge // pair(vision.patch_size)[0]
        windowed = frames * merge**4 * _squares(rows // merge, side) * _squares(columns // merge, side)
    whole = getattr(vision, "fullatt_block_indexes", range(depth))
    pairs = tuple(full if layer in whole else windowed for layer in range(depth))
    return ImageLoad(patches, (patches,) * depth, pairs, patches // merge**2, patches // merge**2)


def vision_trace(
    config: Config, inputs: Mapping[str, Any], total: Tensor, videos: Tensor | None = None
) -> VisionTrace | None:
    """Load on the tower of a processor's `inputs`, whose samples have `total` visual tokens (batch,).

    `videos`: how many of them are videos' (batch,); None: none are. None where images have one size, where the inputs
    don't say which size they have, or where the tower's price isn't known.
    """
    if not has_formula(config) or all(inputs.get(name) is None for name in SIZED):
        return None
    of_videos = [0] * len(total) if videos is None else videos.tolist()
    of_images = [both - mine for both, mine in zip(total.tolist(), of_videos, strict=True)]
    samples = [[] for _ in total]
    for loads, totals in ((_image_loads, of_images), (_video_loads, of_videos)):
        if not any(totals):
            continue
        mine = _by_sample(loads(config, inputs, sum(totals)), totals)
        if mine is None:
            return None
        samples = [before + more for before, more in zip(samples, mine, strict=True)]
    return VisionTrace.of(samples) if any(samples) else None


def _image_loads(config: Config, inputs: Mapping[str, Any], total: int) -> list[ImageLoad]:
    """Of all images of some inputs, in the prompts' order; none where they don't say."""
    grids, sizes = inputs.get("image_grid_thw"), inputs.get("image_sizes")
    if grids is not None:
        return [grid_load(config, *grid) for grid in grids.tolist()]
    if sizes is None or not hasattr(config, "image_grid_pinpoints"):
        return []
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    counts = inputs.get("batch_num_images")
    alone = [n == 1 for n in counts for _ in range(n)] if counts is not None else [True] * len(sizes)
    return [
        _any_resolution(config, *size) if by_crops else _lone_crop(config)
        for size, by_crops in zip(sizes, alone, strict=True)
    ]


def _video_loads(config: Config, inputs: Mapping[str, Any], total: int) -> list[ImageLoad]:
    """Of all videos, with `total` visual tokens: grids of frames, or frames of the tower's fixed size."""
    grids, pixels = inputs.get("video_grid_thw"), inputs.get("pixel_values_videos")
    if grids is not None:
        return [grid_load(config, *grid) for grid in grids.tolist()]
    if not isinstance(pixels, Tensor) or pixels.ndim != 5:
        return []
    return [crop_load(config, pixels.shape[1], total // pixels.shape[0])] * pixels.shape[0]


def _by_sample(loads: Sequence[ImageLoad], totals: Sequence[int]) -> list[list[ImageLoad]] | None:
    """Images of each sample: they stand in the prompts' order, each brings its tokens. None where they don't fit."""
    ends = list(accumulate((load.visual for load in loads), initial=0))
    if not loads or any(end not in ends for end in accumulate(totals)) or ends[-1] != sum(totals):
        return None
    marks = [ends.index(end) for end in accumulate(totals, initial=0)]
    return [list(loads[a:b]) for a, b in pairwise(marks)]


def _any_resolution(config: Config, height: int, width: int) -> ImageLoad:
    """Crops on the best of the model's canvases and the whole image; padding is cut off, rows end in a line break."""
    crop, patch = config.vision_config.image_size, config.vision_config.patch_size
    canvas = _canvas(height, width, config.image_grid_pinpoints)
    side = crop // patch
    rows, columns = (side * (pixels // crop) for pixels in canvas)
    crops = rows * columns // side**2 + 1
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    limit = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if limit.isdecimal() and (ratio := (rows * columns / (int(limit) * side**2)) ** 0.5) > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return crop_load(config, crops, visual=side**2 + rows * (columns + 1))


def _canvas(height: int, width: int, canvases: Sequence[Sequence[int]]) -> Sequence[int]:
    """The canvas on which the most of an image's pixels are left, the smallest of such.

    transformers' `select_best_resolution`, whose import brings models' code.
    """

    def left(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas[0] * canvas[1]

    return max(canvases, key=left)


def _lone_crop(config: Config) -> ImageLoad:
    """One of several images, which is not cut into crops: its tokens and one line break."""
    return crop_load(config, 1, visual=crop_load(config, 1).visual + 1)


def _squares(length: int, side: int) -> int:
    """Sum of squares of the pieces when `length` is cut into pieces of `side`."""
    return length // side * side**2 + (length % side) ** 2


def merged(config: Config) -> int:
    """Patches along one side that become one visual token."""
    vision = config.vision_config
    for part in (vision, config):
        for name in MERGES:
            if (found := first_side(getattr(part, name, None))) is not None:
                return found
        for name in RATIOS:
            if isinstance(ratio := getattr(part, name, None), float) and ratio > 0:
                return round(1 / ratio)
    if isinstance(visual := getattr(config, "mm_tokens_per_image", None), int):
        return max(1, first_side(vision.image_size) // first_side(vision.patch_size) // isqrt(visual))
    return 2 if config.model_type == "molmo2" else 1


def first_side(value: Any) -> int | None:
    """A size that may be given as one number or one for each side."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def patch_values(vision: Config) -> int:
    height, width = pair(vision.patch_size)
    channels = getattr(vision, "num_channels", None) or vision.in_channels
    return channels * height * width * getattr(vision, "temporal_patch_size", 1)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
