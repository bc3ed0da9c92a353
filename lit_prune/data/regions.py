"""Hints about the regions that a question asks about: the share of each visual token's patch they cover."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from lit_prune.errors import BadSample
from lit_prune.host.parts import INPUTS
from lit_prune.ops.pixels import denormalised

Box = Sequence[float]  # x0, y0, x1, y1 in pixels
LARGEST_PIXEL = 1e9  # bound on box edges; Python's integers may exceed any float


def boxes_of(record: dict) -> list[list[float]]:
    """Boxes of a record. Raises BadSample unless they are lists of four finite numbers."""
    boxes = record.get("boxes")
    if boxes is None:
        return []
    if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        raise BadSample("", None, "its boxes are no list of lists of four numbers")
    if not all(isinstance(edge, int | float) and abs(edge) < LARGEST_PIXEL for box in boxes for edge in box):  # no nan
        raise BadSample("", None, "its boxes have edges that are no numbers of pixels")
    return boxes


def regions(boxes: Sequence[Box], grid: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "boxes patches"]:
    """Share of each patch that each box covers: `grid` rows and columns of patches over `size` (width, height) pixels.

    Patches are counted row by row.
    """
    (rows, columns), (width, height) = grid, size
    x, y = (torch.arange(n + 1, dtype=torch.float32) * (pixels / n) for n, pixels in ((columns, width), (rows, height)))
    cover = torch.zeros(len(boxes), rows, columns)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        across = (x[1:].clamp(max=x1) - x[:-1].clamp(min=x0)).clamp(min=0)
        down = (y[1:].clamp(max=y1) - y[:-1].clamp(min=y0)).clamp(min=0)
        cover[index] = down[:, None] * across[None, :] / (x[1] * y[1])
    return cover.flatten(1)


def seen_box(image_processor: Any, size: tuple[int, int], box: Box) -> tuple[float, float, float, float] | None:
    """Transform a box of an image of `size` (width, height) by resizing and cropping; None if it is cropped away.

    A mask of the box is passed through the processor, which must return one picture per image.
    """
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        return None
    mask = Image.new("RGB", size)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    found = image_processor(images=mask, return_tensors="pt")
    pixels = next(found[name] for name in INPUTS["image"] if name in found)
    rows, columns = (denormalised(pixels.flatten(0, -4)[0], image_processor)[0] > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def sample_regions(
    processor: Any, inputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Box]
) -> Float[Tensor, "boxes patches"] | None:
    """Hint of one encoded sample; None if the positions of its visual tokens in the image aren't known.

    They are known if the model sees one whole image as a square grid of patches: LLaVA-1.5, or one tile of InternVL.

    Args:
        processor: of the model. inputs: the encoded sample.
        sizes: width and height of the sample's images in pixels. boxes: in pixels of its only image.
    """
    pixels, count = inputs.get("pixel_values"), int((inputs["input_ids"] == processor.image_token_id).sum())
    side = round(count**0.5)
    square = pixels is not None and pixels.ndim == 4 and len(pixels) == 1 and pixels.shape[2] == pixels.shape[3]
    if len(sizes) != 1 or not square or not count or side * side != count:
        return None
    seen = pixels.shape[2]
    if not _as_it_is(processor.image_processor, sizes[0], seen):
        boxes = [box for each in boxes if (box := seen_box(processor.image_processor, sizes[0], each)) is not None]
    return regions(boxes, (side, side), (seen, seen))


def _as_it_is(image_processor: Any, size: tuple[int, int], seen: int) -> bool:
    """True if the processor neither scales nor crops an image of this size."""
    sizes = [getattr(image_processor, name, None) or {} for name in ("size", "crop_size")]
    return {*size, *(edge for each in sizes for edge in dict(each).values() if edge is not None)} == {seen}


def joined(samples: Sequence[Float[Tensor, "_ _"] | None]) -> dict[str, Tensor]:
    """Hints of a batch: `regions` (batch, regions, visual), zero-padded; empty if no sample has any."""
    known = [sample for sample in samples if sample is not None]
    if not known:
        return {}
    regions = torch.zeros(len(samples), max(1, *map(len, known)), max(sample.shape[1] for sample in known))
    for row, sample in enumerate(samples):
        if sample is not None:
            regions[row, : len(sample), : sample.shape[1]] = sample
    return {"regions": regions}
