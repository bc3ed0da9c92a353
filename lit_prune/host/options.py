"""Options of a pruned forward that hold for any method."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_prune.errors import check_choice

Positions = Literal["original", "renumbered"]
Proportional = Literal["none", "count", "similarity", "attention"]
Frames = Literal["together", "apart"]


@dataclass(frozen=True)
class HostOptions:
    """Settings that every method has alike.

    Args:
        positions: `original`: a kept token keeps its position, and decoding goes on behind the whole prompt.
            `renumbered`: from each stage on, tokens are numbered anew without gaps, and decoding goes on from there.
            The files of `configs/pruners/` set what each method's authors do.
        proportional_attention: add log(size) to the attention logits of each kept token, whose size grows by the tokens
            dropped next to it: by each in full (`count`), times the similarity of the two (`similarity`), or by their
            attention (`attention`, ERA's bias); `none`: off. See `ProportionalAttention`.
        frames: of a video. `together`: a video is one image, whose frames compete for its budget. `apart`: each frame
            is an image, which gets its share of the video's budget.

    Raises:
        LitPruneError: a value that there is not.
    """

    positions: str = "original"
    proportional_attention: str = "none"
    frames: str = "together"

    def __post_init__(self) -> None:
        for name, allowed in (("positions", Positions), ("proportional_attention", Proportional), ("frames", Frames)):
            check_choice(name, getattr(self, name), get_args(allowed))

    def described(self, published: str = "original") -> list[str]:
        """Options that differ from a method's `published` positions and from no proportional attention, in words."""
        positions = [] if self.positions == published else [f"{self.positions} positions"]
        rules = {"none": [], "count": ["proportional attention"], "attention": ["ERA's bias"]}
        rule, apart = self.proportional_attention, ["frames apart"] if self.frames == "apart" else []
        return positions + rules.get(rule, [f"proportional attention ({rule})"]) + apart

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        default = HostOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}
