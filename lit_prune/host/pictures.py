"""The images and videos of a forward: which of a prompt's tokens belong to which.

Tokens of one image are a run, and so are those of a video or of each of its frames. Where text stands between parts of
one image or video (timestamps, ends of rows, names of tiles), the inputs beside the ids tell what belongs together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.host.compat import ENCODED
from lit_prune.host.parts import INPUTS

SIZES = "lit_prune_sizes"  # attribute of encoded images or videos: their `Sizes`
GRIDS = ("video_grid_thw", "video_grids")  # frames, rows and columns of each video

Columns = Bool[Tensor, "batch columns"]


@dataclass(frozen=True)
class Sizes:
    """Images or videos of a batch, in the prompts' order.

    `shares`: patches of each, of which a token stands for the same number everywhere, or ones where all have as many
    tokens; None: each frame is one run. `frames`: of each video; None: images. `samples`: prompts that they belong to;
    `generate()` repeats each of them where it returns several.
    """

    shares: Int[Tensor, " pictures"] | None
    frames: Int[Tensor, " pictures"] | None
    samples: int

    def begin(self, mine: Columns, runs: Columns, apart: bool) -> tuple[Columns, Columns, Bool[Tensor, ""]]:
        """First tokens of each, the same with `apart` of each frame, and whether these sizes are the tokens'."""
        if self.shares is None:
            return self._begin_runs(runs, apart)
        place, total = mine.flatten().cumsum(0) - 1, mine.sum()
        scaled, whole = self.shares * total, self.shares.sum().clamp(min=1)
        lengths = scaled // whole
        ends = lengths.cumsum(0)
        which = torch.searchsorted(ends, place.clamp(min=0), right=True).clamp(max=len(ends) - 1)
        inside = (place - (ends - lengths)[which]).view_as(mine)
        starts = mine & (inside == 0)
        rows = runs & (mine.cumsum(1) == 1)  # none goes on from one prompt to the next
        fits = (whole % total.clamp(min=1) == 0) | (self.shares == 1).all()
        exact = fits & (scaled % whole == 0).all() & (lengths > 0).all() & ~(rows & ~starts).any()
        if not apart or self.frames is None:
            return starts, starts, exact
        each = (lengths // self.frames.clamp(min=1)).clamp(min=1)[which].view_as(mine)
        number = self.frames[which].view_as(mine)
        return starts, mine & (inside % each == 0) & (inside // each < number), exact

    def _begin_runs(self, runs: Columns, apart: bool) -> tuple[Columns, Columns, Bool[Tensor, ""]]:
        place = runs.flatten().cumsum(0) - 1
        ends = self.frames.cumsum(0)
        which = torch.searchsorted(ends, place.clamp(min=0), right=True).clamp(max=len(ends) - 1)
        starts = runs & (place == (ends - self.frames)[which]).view_as(runs)
        return starts, runs if apart else starts, runs.sum() == ends[-1]


def split(
    mine: Columns, sizes: Sizes | None, video: bool = False, apart: bool = False
) -> tuple[Columns, Int[Tensor, " batch"]]:
    """First tokens of what is pruned as one image, and the number of images or videos of each sample.

    Args:
        mine: tokens of one modality.
        sizes: what is known; where nothing is, or it isn't the tokens', each run is an image.
        video: whether it is videos; unknown ones of a sample count as one.
        apart: prune each frame as an image of its own.
    """
    runs = mine & ~pad(mine[:, :-1], (1, 0))
    number = runs.any(1).long() if video else runs.sum(1)
    if sizes is None or not sizes.samples or mine.shape[0] % sizes.samples:
        return runs, number
    times = mine.shape[0] // sizes.samples
    starts, parts, exact = sizes.begin(mine[::times], runs[::times], apart)
    starts, parts = (columns.repeat_interleave(times, 0) for columns in (starts, parts))
    return torch.where(exact, parts, runs), torch.where(exact, starts.sum(1), number)


def sizes_of(inputs: Mapping[str, Any], modality: str, ended_rows: bool) -> Sizes | None:
    """Sizes of the images or videos as the inputs give them; None where they aren't needed.

    `ended_rows`: text separates the rows of an image, which `image_sizes` has the sizes of.
    """
    encoded = (inputs.get(ENCODED) or {}).get(modality)
    if encoded is not None and hasattr(encoded, SIZES):
        return getattr(encoded, SIZES)
    samples = next((len(inputs[name]) for name in ("input_ids", "attention_mask") if inputs.get(name) is not None), 0)
    return _of_videos(inputs, samples) if modality == "video" else _of_images(inputs, samples, ended_rows)


def _of_videos(inputs: Mapping[str, Any], samples: int) -> Sizes | None:
    grid = next((inputs[name] for name in GRIDS if inputs.get(name) is not None), None)
    pixels = next((inputs[name] for name in INPUTS["video"] if inputs.get(name) is not None), None)
    if grid is not None:
        merge = inputs.get("video_merge_sizes")
        shares = grid.prod(1) if merge is None else grid.prod(1) // merge**2
        return Sizes(shares, grid[:, 0], samples)
    if (frames := inputs.get("num_frames_per_video")) is not None:
        return Sizes(None, torch.as_tensor(frames, device=None if pixels is None else pixels.device), samples)
    if isinstance(pixels, Tensor) and pixels.ndim == 5:
        one = torch.ones(pixels.shape[0], dtype=torch.long, device=pixels.device)
        return Sizes(one, one * pixels.shape[1], samples)
    return None


def _of_images(inputs: Mapping[str, Any], samples: int, ended_rows: bool) -> Sizes | None:
    """Of images whose rows or tiles text separates: Molmo 2 by its grids, Pixtral's by their pixels."""
    if (grids := inputs.get("image_grids")) is not None:
        return Sizes(grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3], None, samples)
    if ended_rows and inputs.get("image_sizes") is not None:
        pixels = inputs.get("pixel_values")
        sizes = torch.as_tensor(inputs["image_sizes"], device=None if pixels is None else pixels.device)
        return Sizes(sizes.prod(1), None, samples)
    return None


def keep_sizes(encoded: Mapping[str, Any], inputs: Mapping[str, Any], ended_rows: bool) -> None:
    """Note the sizes of what was encoded on the features: the inputs that tell them may be gone in the forward."""
    for modality, output in encoded.items():
        if output is not None and not hasattr(output, SIZES):
            setattr(output, SIZES, sizes_of({**inputs, ENCODED: None}, modality, ended_rows))


def join_tiles(ids: Int[Tensor, "batch columns"], runs: Columns) -> Columns:
    """First tokens of images, out of those of their tiles as Idefics 3 and SmolVLM name them.

    Each tile is `<fake_token_around_image><NAME>` and its tokens. An image's last tile is the whole image, of the same
    name for all images: so the prompt's last run shows that name, and the run behind one of that name begins an image.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    name, mark = (pad(ids[:, :-by], (by, 0), value=-1) for by in (1, 2))
    last = torch.where(runs, columns, -1).amax(1, keepdim=True).clamp(min=0)
    whole, around = name.gather(1, last), mark.gather(1, last)
    before = pad(torch.where(runs, columns, -1).cummax(1).values[:, :-1], (1, 0), value=-1)  # the run before, its start
    there = before.clamp(min=0)
    ended = name.gather(1, there) == whole
    tiles = (mark == around) & (mark.gather(1, there) == around) & (around != ids.gather(1, last))
    return runs & ~(tiles & (before >= 0) & ~ended)
