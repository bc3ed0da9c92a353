"""Vision features that a model adds to its visual tokens behind its first layers too (deepstack).

The library adds them to columns by their place in the whole sequence. Where tokens may leave before, the hooks take
the features from the decoder and add them to the columns that are left, at the next layer's input.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEATURES, PLACES = "deepstack_visual_embeds", "visual_pos_masks"  # keywords of a decoder


@dataclass(frozen=True)
class Deepstack:
    """`features[i]`, one row per visual token of the batch, belong behind layer i; `number`: the row of each column."""

    features: list[Float[Tensor, "tokens width"]]
    visual: Bool[Tensor, "batch seq"]
    number: Int[Tensor, "batch seq"]

    @classmethod
    def taken(cls, kwargs: dict) -> "Deepstack | None":
        """Out of a decoder's keywords, which have none of it then; None if they had none."""
        if kwargs.get(FEATURES) is None or kwargs.get(PLACES) is None:
            return None
        features, visual = list(kwargs[FEATURES]), kwargs[PLACES]
        kwargs[FEATURES] = None
        visual = visual[..., 0] if visual.ndim == 3 else visual
        number = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        return cls(features, visual, number)

    def add(self, index: int, hidden: Float[Tensor, "batch left width"], columns: Int[Tensor, "batch left"]) -> Tensor:
        """Add the features of the previous layer to the states at the input of layer `index`."""
        if not 0 < index <= len(self.features):
            return hidden
        rows = self.features[index - 1].to(hidden)[self.number.gather(1, columns)]
        return torch.where(self.visual.gather(1, columns)[..., None], hidden + rows, hidden)
