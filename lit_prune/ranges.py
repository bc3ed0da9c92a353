"""Validate numbers from a user: finite, of the right kind, within their range."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from lit_prune.errors import LitPruneError


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raise `LitPruneError` unless `value` is a finite number in the range; the message names the key and the range.

    None passes: it stands for an option that is off.

    Args:
        name: the key, such as `model.lr`.
        value: what was given.
        least: lowest value allowed. above: the same, itself excluded.
        most: highest value allowed. below: the same, itself excluded.
        whole: only integers.
    """
    if value is None:
        return
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    fits = (
        number
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not fits:
        raise LitPruneError(f"{name} is {value}; it must be {_wanted(least, above, most, below, whole)}")


def check_numbers(name: str, values: Iterable[Any], **limits: Any) -> None:
    """`check_number` for each entry of a list."""
    for i, value in enumerate(values):
        check_number(f"{name}[{i}]", value, **limits)


def _wanted(least: float | None, above: float | None, most: float | None, below: float | None, whole: bool) -> str:
    """The range in words."""
    kind = "a whole number" if whole else "a finite number"
    if least is not None and most is not None:
        return f"{kind} from {least} to {most}"
    low = f"of at least {least}" if least is not None else f"above {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return " ".join(filter(None, [kind, " and ".join(filter(None, [low, high]))]))
