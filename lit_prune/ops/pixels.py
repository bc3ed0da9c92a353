"""Pixels as an image processor hands them to a model, and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def denormalised(pixels: Float[Tensor, "3 height width"], image_processor: Any) -> Float[Tensor, "3 height width"]:
    """Undo the scaling and normalisation of a processor: values from 0 to 1."""
    mean = std = scale = None
    if getattr(image_processor, "do_normalize", True) is not False:
        mean, std = (getattr(image_processor, name, None) for name in ("image_mean", "image_std"))
    if getattr(image_processor, "do_rescale", True) is not False:
        scale = getattr(image_processor, "rescale_factor", None) or 1 / 255
    mean, std = (torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean or 0.0, std or 1.0))
    return ((pixels.detach().float().cpu() * std + mean) / (255 * (scale or 1.0))).clamp(0, 1)
