"""Images of noise, as the processors of the families would hand them to their models."""

import torch
from torch import Tensor

from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import image_load, merged, pair, patch_values


def noise(
    config: Config, batch: int, image: tuple[int, int], generator: torch.Generator
) -> tuple[dict[str, Tensor], int]:
    """Model inputs of `batch` images, one a sample, and how many visual tokens each has.

    `image`: height and width in pixels, for families whose images have no size of their own. Raises `LitPruneError`
    for a vision tower that isn't known.
    """
    load, vision = image_load(config, *image), config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # patches in a row, and the grid they come from
        merge = merged(config)
        factor = pair(vision.patch_size)[0] * merge
        grid = [1, *(max(1, round(side / factor)) * merge for side in image)]
        pixels = torch.randn(batch * load.patches, patch_values(vision), generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * batch)}, load.visual
    height, width = pair(vision.image_size)
    crops = load.patches // ((height // pair(vision.patch_size)[0]) * (width // pair(vision.patch_size)[1]))
    if hasattr(config, "image_grid_pinpoints"):
        pixels = torch.randn(batch, crops, 3, height, width, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([image] * batch)}, load.visual
    return {"pixel_values": torch.randn(batch * crops, 3, height, width, generator=generator)}, load.visual
