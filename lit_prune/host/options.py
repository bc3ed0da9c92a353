"""What the host does with tokens that a method left, whatever the method."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_prune.errors import LitPruneError

Positions = Literal["original", "renumbered"]
Mass = Literal["none", "count", "similarity"]


@dataclass(frozen=True)
class HostOptions:
    """Settings that every method has alike.

    Args:
        positions: `original`: a kept token keeps its position, and decoding goes on behind the whole prompt.
            `renumbered`: from each stage on, tokens are numbered anew without gaps, and decoding goes on from there.
        mass: what tokens that a decoder stage drops leave to kept ones: `none`, or their share of attention, in full
            (`count`) or times the similarity of the two (`similarity`). See `MassGivenBack`.

    Raises:
        LitPruneError: a value that there is not.
    """

    positions: str = "original"
    mass: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("positions", get_args(Positions)), ("mass", get_args(Mass))):
            if (value := getattr(self, name)) not in allowed:
                raise LitPruneError(f"{name}: {value!r} is not one of {', '.join(allowed)}")

    def described(self) -> list[str]:
        """Options that differ from their defaults, in words."""
        words = {"mass": "proportional attention", "positions": "renumbered positions"}
        plain = ("count", "renumbered")
        return [words[name] + ("" if value in plain else f" ({value})") for name, value in self.changed().items()]

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        default = HostOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}
