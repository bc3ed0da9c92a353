"""Hints about the regions that a question asks about: how much of each visual token's patch they cover."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

Box = Sequence[float]  # x0, y0, x1, y1 in pixels


def regions(boxes: Sequence[Box], side: int, size: int) -> Float[Tensor, "boxes patches"]:
    """The share of each of `side` x `side` patches, row by row, that each box covers, in `size` x `size` pixels."""
    edges = torch.arange(side + 1, dtype=torch.float32) * (size / side)
    low, high = edges[:-1], edges[1:]
    cover = torch.zeros(len(boxes), side, side)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        across = (high.clamp(max=x1) - low.clamp(min=x0)).clamp(min=0)
        down = (high.clamp(max=y1) - low.clamp(min=y0)).clamp(min=0)
        cover[index] = down[:, None] * across[None, :] / (edges[1] ** 2)
    return cover.flatten(1)


def seen_box(image_processor: Any, size: tuple[int, int], box: Box) -> tuple[float, float, float, float] | None:
    """A box of an image of `size` (width, height) after resizing and cropping; None if it is cropped away.

    Its mask goes through the processor, which gives one picture of an image.
    """
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        return None
    mask = Image.new("RGB", size)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    values = image_processor(images=mask, return_tensors="pt")["pixel_values"][0, 0]
    white = values * image_processor.image_std[0] + image_processor.image_mean[0] > 0.5
    rows, columns = white.nonzero(as_tuple=True)
    if not len(rows):
        return None
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def sample_regions(
    processor: Any, inputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Box]
) -> Float[Tensor, "boxes patches"] | None:
    """The hint of one encoded sample; None where the places of its visual tokens in the image aren't known.

    They are where the model sees one image, whole, as a square grid of patches: LLaVA-1.5, or one tile of InternVL.

    Args:
        processor: of the model. inputs: what it made of the sample.
        sizes: width and height of the sample's images in pixels. boxes: in pixels of its one image.
    """
    pixels, count = inputs.get("pixel_values"), int((inputs["input_ids"] == processor.image_token_id).sum())
    side = round(count**0.5)
    square = pixels is not None and pixels.ndim == 4 and len(pixels) == 1 and pixels.shape[2] == pixels.shape[3]
    if len(sizes) != 1 or not square or not count or side * side != count:
        return None
    seen = pixels.shape[2]
    if not _as_it_is(processor.image_processor, sizes[0], seen):
        boxes = [box for each in boxes if (box := seen_box(processor.image_processor, sizes[0], each)) is not None]
    return regions(boxes, side, seen)


def _as_it_is(image_processor: Any, size: tuple[int, int], seen: int) -> bool:
    """True if an image of this size passes through the processor without being scaled or cropped."""
    sizes = [getattr(image_processor, name, None) or {} for name in ("size", "crop_size")]
    return {*size, *(edge for each in sizes for edge in dict(each).values() if edge is not None)} == {seen}


def joined(samples: Sequence[Float[Tensor, "_ _"] | None]) -> dict[str, Tensor]:
    """A batch's hints, `regions` (batch, regions, visual), zero where a sample has fewer; none if no sample has any."""
    known = [sample for sample in samples if sample is not None]
    if not known:
        return {}
    regions = torch.zeros(len(samples), max(1, *map(len, known)), max(sample.shape[1] for sample in known))
    for row, sample in enumerate(samples):
        if sample is not None:
            regions[row, : len(sample), : sample.shape[1]] = sample
    return {"regions": regions}
