"""Options of a pruned forward that hold for any method."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_prune.errors import check_choice

Positions = Literal["original", "renumbered"]
Proportional = Literal["none", "count", "similarity", "attention"]


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

    Raises:
        LitPruneError: a value that there is not.
    """

    positions: str = "original"
    proportional_attention: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("positions", get_args(Positions)), ("proportional_attention", get_args(Proportional))):
            check_choice(name, getattr(self, name), allowed)

    def described(self, published: str = "original") -> list[str]:
        """Options that differ from a method's `published` positions and from no proportional attention, in words."""
        positions = [] if self.positions == published else [f"{self.positions} positions"]
        rules = {"none": [], "count": ["proportional attention"], "attention": ["ERA's bias"]}
        rule = self.proportional_attention
        return positions + rules.get(rule, [f"proportional attention ({rule})"])

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        default = HostOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}
