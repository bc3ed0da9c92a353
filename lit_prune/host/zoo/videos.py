"""Prompts with videos of noise for a tiny model, by the conventions of its class as far as its signature shows them."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host.parts import find
from lit_prune.host.zoo.inputs import QUESTION, Prompts, marker
from lit_prune.host.zoo.pixels import GRIDS, Inputs, parameters, pixels_of

VIDEOS = (1, 2, 1)  # videos of each prompt
FRAMES = 2
OTHERS: dict[str, str] = {  # what a class wants beside pixels and grids that can't be made up here
    **dict.fromkeys(("gemma4", "gemma4_unified"), "places of patches in each frame"),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), "frames packed as slices"),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "seconds of each frame, beside sound"),
    "molmo2": "patches that each token pools",
    "nemotron_h_omni": "frames packed into tubelets",
}


def takes_videos(model: nn.Module) -> bool:
    """True if a model's forward takes the pixels of videos."""
    return "pixel_values_videos" in parameters(model)


def video_prompts(kind: str, model: nn.Module) -> Prompts:
    """Three samples with one, two and one videos of two frames; text stands between frames if the class takes it.

    Raises:
        LitPruneError: the class takes no videos, or none that can be made up here.
    """
    if not takes_videos(model) or kind in OTHERS:
        reason = f"takes videos as {OTHERS[kind]}" if kind in OTHERS else "takes no videos"
        raise LitPruneError(f"{type(model).__name__} {reason}: none are made up for it")
    for apart in (True, False):
        given = _prompts(kind, model, apart)
        try:
            with torch.no_grad():
                model(**given.batch())
        except (RuntimeError, StopIteration, ValueError):
            if not apart:
                raise
        else:
            return given
    return given


def _prompts(kind: str, model: nn.Module, apart: bool) -> Prompts:
    config, taken, token = model.config, parameters(model), find(model).tokens["video"]
    apart = apart and "video_grid_thw" in taken
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
    if "video_grid_thw" not in taken:
        side = next(iter(_image(kind, model, 0).values())).shape[-1]
        frames = [_noise(video, FRAMES, 3, side, side) for video in videos]
        return {"pixel_values_videos": torch.stack(frames)}
    for video in videos:
        frame = _image(kind, model, video)["pixel_values"]
        found += [frame, frame.flip(0)]
    grids = torch.tensor([[FRAMES, *GRIDS[video]] for video in videos])
    sizes = {"video_merge_sizes": torch.full((len(videos),), 2)} if kind == "video_llama_3" else {}
    return {"pixel_values_videos": torch.cat(found), "video_grid_thw": grids, **sizes}


def _image(kind: str, model: nn.Module, image: int) -> Inputs:
    return pixels_of(kind, model)([image], [1])


def _noise(video: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(video + 1))


@torch.no_grad()
def _length(kind: str, model: nn.Module, video: int) -> int:
    """Visual tokens of a video: the features that the model's own encoder gives."""
    encode: Any = model.base_model.get_video_features
    given = _pixels(kind, model, [video])
    known = inspect.signature(encode).parameters
    features = encode(**{name: value for name, value in given.items() if name in known or "kwargs" in known})
    rows = features.pooler_output
    return sum(part.shape[:-1].numel() for part in (rows if isinstance(rows, tuple | list) else [rows]))
