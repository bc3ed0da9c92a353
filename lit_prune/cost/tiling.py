"""Crops that processors cut an image into, of models whose crops aren't said by their configuration.

Numbers are those of the processors' files as the checkpoints have them.
"""

from itertools import product

EDGE = 4  # crops along an image's longer side, Idefics 3 and SmolVLM
CROPS = 8  # at most, beside the whole image, Molmo 2
TILES = 12  # at most, beside the thumbnail, InternVL
MARGIN = 4  # patches along each side of a crop that its neighbour sees too, Molmo 2


def square_crops(height: int, width: int) -> int:
    """Crops of Idefics 3 and SmolVLM, the whole image among them: the longer side is scaled to `EDGE` of them."""
    longer = max(height, width)
    return max(1, -(-height * EDGE // longer)) * max(1, -(-width * EDGE // longer)) + 1


def overlapping_crops(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Rows and columns of Molmo 2's crops of `side` pixels, which overlap: as many as need to be scaled least."""
    margin = 2 * MARGIN * patch
    window = side - margin
    tilings = sorted(
        ((a, b) for a, b in product(range(1, CROPS + 1), repeat=2) if a * b <= CROPS), key=lambda t: (t[0] * t[1], t[0])
    )
    scales = [min(a * window / (height - margin), b * window / (width - margin)) for a, b in tilings]
    if all(scale < 1 for scale in scales):
        return tilings[scales.index(max(scales))]
    return tilings[scales.index(min(scale for scale in scales if scale >= 1))]


def overlapped(rows: int, columns: int, side: int, patch: int, pooled: int) -> int:
    """Visual tokens of so many of Molmo 2's crops and of the whole image, `pooled` patches along a side in each."""
    window, margin, whole = side // patch - 2 * MARGIN, 2 * MARGIN, -(-(side // patch) // pooled)
    down, across = (-(-(count * window + margin) // pooled) for count in (rows, columns))
    return down * across + whole**2


def tile_count(height: int, width: int, tile: tuple[int, int]) -> int:
    """InternVL's tiles of the canvas nearest to an image's shape; of equally near ones the larger, if it fills half."""
    shapes = sorted(
        ((a, b) for a in range(1, TILES + 1) for b in range(1, TILES + 1) if a * b <= TILES),
        key=lambda shape: shape[0] * shape[1],
    )
    best, nearest = (1, 1), float("inf")
    for shape in shapes:
        distance = abs(width / height - shape[0] / shape[1])
        fills = height * width > 0.5 * tile[0] * tile[1] * shape[0] * shape[1]
        if distance < nearest or (distance == nearest and fills):
            best, nearest = shape, distance
    return best[0] * best[1]
