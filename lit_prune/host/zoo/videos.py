"""Prompts with videos of noise for a tiny model, by the conventions of its class as far as its signature shows them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host.parts import find
from lit_prune.host.zoo.inputs import QUESTION, Prompts, marker
from lit_prune.host.zoo.pixels import GRIDS, Inputs, parameters, pictures, pixels_of
from lit_prune.host.zoo.pixels import PIXELS as IMAGES
from lit_prune.host.zoo.shrink import PATCH, SIDE

VIDEOS = (1, 2, 1)  # videos of each prompt
FRAMES = 2


def takes_videos(model: nn.Module) -> bool:
    """True if a model's forward takes the pixels of videos."""
    return "pixel_values_videos" in parameters(model)


def video_prompts(kind: str, model: nn.Module) -> Prompts:
    """Three samples with one, two and one videos of two frames; text stands between frames if the class takes it.

    Raises:
        LitPruneError: the class takes no videos.
    """
    if not takes_videos(model):
        raise LitPruneError(f"{type(model).__name__} takes no videos (pixel_values_videos)")
    for apart in (True, False):
        given = _prompts(kind, model, apart)
        try:
            with torch.no_grad():
                model(**given.batch())
        except (RuntimeError, StopIteration, ValueError):  # the class takes a video's tokens in one run
            if not apart:
                raise
        else:
            return given
    return given


def _prompts(kind: str, model: nn.Module, apart: bool) -> Prompts:
    config, taken, token = model.config, parameters(model), find(model).tokens["video"]
    apart = apart and ("video_grid_thw" in taken or kind in PIXELS)
    ends = [marker(config, which) for which in ("start", "end")]
    around = [getattr(config, f"video_{which}_token_id", None) for which in ("start", "end")]
    begin, end = ([] if mark is None else [torch.tensor([mark])] for mark in around)
    draw, samples, owned, first = torch.Generator().manual_seed(0), [], [], 0
    for videos, words in zip(VIDEOS, QUESTION, strict=True):
        parts = [torch.randint(3, 90, (2,), generator=draw)]
        for video in range(first, first + videos):
            runs = FRAMES if apart else 1
            frame = [*ends[0], torch.full((_length(kind, model, video) // runs,), token), *ends[1]]
            frames = [part for _ in range(runs) for part in (torch.randint(3, 90, (1,), generator=draw), *frame)]
            parts += [*begin, *frames, *end]
        samples.append(torch.cat([*parts, torch.randint(3, 90, (words,), generator=draw)]))
        owned.append(range(first, first + videos))
        first += videos

    def extra(ids: Tensor, mask: Tensor, start: int | None = None) -> Inputs:
        types = 2 * (ids == token).long()
        return {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in taken}

    return Prompts(samples, owned, lambda videos, _: _pixels(kind, model, videos), token, extra)


def _pixels(kind: str, model: nn.Module, videos: Sequence[int]) -> Inputs:
    """Each frame is an image of the class, where images keep their size; else one of the tower's size."""
    taken, found = parameters(model), []
    if kind in PIXELS:
        return PIXELS[kind](model.config, videos)
    if "video_grid_thw" not in taken:
        side = next(iter(_image(kind, model, 0).values())).shape[-1]
        return _stacked(videos, 3, side)
    for video in videos:
        frame = _image(kind, model, video)["pixel_values"]
        found += [frame, frame.flip(0)]
    grids = torch.tensor([[FRAMES, *GRIDS[video]] for video in videos])
    sizes = {"video_merge_sizes": torch.full((len(videos),), 2)} if kind == "video_llama_3" else {}
    if "video_second_per_grid" in taken:
        sizes["video_second_per_grid"] = torch.ones(len(videos))
    return {"pixel_values_videos": torch.cat(found), "video_grid_thw": grids, **sizes}


def _stacked(videos: Sequence[int], channels: int, side: int) -> Inputs:
    noise = (torch.Generator().manual_seed(video + 1) for video in videos)
    return {"pixel_values_videos": torch.stack([torch.randn(FRAMES, channels, side, side, generator=g) for g in noise])}


def _of_images(kind: str, names: dict[str, str], apart: bool) -> Callable[[Any, Sequence[int]], Inputs]:
    """Inputs of two images for each video, of one size (`apart`: of sizes of their own), under other names."""

    def made(config: Any, videos: Sequence[int]) -> Inputs:
        images = [2 * video + frame for video in videos for frame in (0, 1)]
        shown = pictures([image % 4 if apart else image // 2 for image in images])
        given = IMAGES[kind](config, shown, [len(images)])
        return {new: given[name] for name, new in names.items()}

    return made


def _molmo2(config: Any, videos: Sequence[int]) -> Inputs:
    names = {"pixel_values": "pixel_values_videos", "image_token_pooling": "video_token_pooling"}
    found = _of_images("molmo2", names, apart=True)(config, videos)
    side = SIDE // PATCH // 2
    return {**found, "video_grids": torch.tensor([[FRAMES, side, side]] * len(videos))}


def _gemma4(config: Any, videos: Sequence[int]) -> Inputs:
    names = {"pixel_values": "pixel_values_videos", "image_position_ids": "video_position_ids"}
    frames = torch.full((len(videos),), FRAMES)
    return {**_of_images("gemma4", names, apart=False)(config, videos), "num_frames_per_video": frames}


def _nemotron(config: Any, videos: Sequence[int]) -> Inputs:
    return _stacked(videos, 3 * config.video_temporal_patch_size, SIDE)


SLICES = {"pixel_values": "pixel_values_videos", "target_sizes": "target_sizes_videos"}
# Classes with conventions of their own.
PIXELS: dict[str, Callable[[Any, Sequence[int]], Inputs]] = {
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4,
    **{name: _of_images(name, SLICES, apart=False) for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "molmo2": _molmo2,
    "nemotron_h_omni": _nemotron,
}


def _image(kind: str, model: nn.Module, image: int) -> Inputs:
    return pixels_of(kind, model)([image], [1])


@torch.no_grad()
def _length(kind: str, model: nn.Module, video: int) -> int:
    """Visual tokens of a video: the features that the model's own encoder gives."""
    encode: Any = getattr(model.base_model, "get_video_features", None) or model.get_video_features
    given = _pixels(kind, model, [video])
    known = inspect.signature(encode).parameters
    features = encode(**{name: value for name, value in given.items() if name in known or "kwargs" in known})
    rows = features.pooler_output
    return sum(part.shape[:-1].numel() for part in (rows if isinstance(rows, tuple | list) else [rows]))
