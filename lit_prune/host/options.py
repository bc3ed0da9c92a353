"""Options of a pruned forward that hold for any method."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_prune.errors import LitPruneError

Positions = Literal["original", "renumbered"]
Proportional = Literal["none", "count", "similarity"]


@dataclass(frozen=True)
class HostOptions:
    """Settings that every method has alike.

    Args:
        positions: `original`: a kept token keeps its position, and decoding goes on behind the whole prompt.
            `renumbered`: from each stage on, tokens are numbered anew without gaps, and decoding goes on from there.
        proportional_attention: add log(size) to the attention logits of each kept token, whose size grows by the tokens
            dropped next to it: by each in full (`count`), or times the similarity of the two (`similarity`); `none`:
            off. See `ProportionalAttention`.

    Raises:
        LitPruneError: a value that there is not.
    """

    positions: str = "original"
    proportional_attention: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("positions", get_args(Positions)), ("proportional_attention", get_args(Proportional))):
            if (value := getattr(self, name)) not in allowed:
                raise LitPruneError(f"{name}: {value!r} is not one of {', '.join(allowed)}")

    def described(self) -> list[str]:
        """Options that differ from their defaults, in words."""
        words = {"proportional_attention": "proportional attention", "positions": "renumbered positions"}
        plain = ("count", "renumbered")
        return [words[name] + ("" if value in plain else f" ({value})") for name, value in self.changed().items()]

    def changed(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        default = HostOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}
