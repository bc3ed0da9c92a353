"""Parse and format budgets, with one grammar for YAML files, command lines and Python."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from lit_prune.errors import LitPruneError

ALLOWED = "a number of visual tokens such as 16, a share such as 11.1%, or counts by layer such as 2:192,4:64"
MOST = 10**12  # exclusive upper bound of counts
COUNT = re.compile(r"\d{1,12}", re.ASCII)
SHARE = re.compile(r"(\d{1,12}(?:\.\d*)?|\.\d+)\s*%", re.ASCII)


@dataclass(frozen=True)
class Share:
    """Budget in per cent of each sample's own visual tokens, above 0 and at most 100."""

    percent: float

    def of(self, visual: int) -> int:
        """The share of `visual` tokens as a count, to the nearest token; at least one."""
        return max(1, round(self.percent / 100 * visual))

    def __str__(self) -> str:
        return f"{np.format_float_positional(self.percent, trim='-')}%"


Schedule = dict[int, int]  # {decoder layer: visual tokens kept from its input on}
Budget = int | Share | Schedule  # an average to solve for, as a count or a share, or the counts themselves


def parse_budget(value: Any, key: str = "keep", visual: int | None = None) -> Budget:
    """Parse a budget from a YAML file, a command line or Python.

    Accepts `64` (an average), `11.1%` (a share), `2:192,4:64,8:16` or `{2: 192, 4: 64, 8: 16}` (layer:count of each
    stage), numbers also as text. Raises `LitPruneError`, naming `key`, for anything else; `visual`: number of tokens
    of the model's images, if known, for the message.
    """
    if isinstance(value, Share):
        budget = value if 0 < value.percent <= 100 else None
    elif isinstance(value, str):
        budget = _from_text(value.strip())
    elif isinstance(value, Mapping):
        budget = _from_pairs(value.items())
    else:
        budget = _whole(value)
    if isinstance(budget, int) and budget < 1 and visual is not None:
        raise LitPruneError(f"{key}={budget} must lie between 1 and the image's {visual} visual tokens")
    if budget is None or (isinstance(budget, int) and budget < 1):
        written = isinstance(value, str) and value.isprintable() and value.strip()
        shown = f" {value}" if written else f"={value!r}"
        shown = shown if len(shown) < 60 else f"{shown[:56]} ..."
        raise LitPruneError(f"{key}{shown}: not a budget; write {ALLOWED}")
    return budget


def format_budget(budget: Budget) -> str:
    """Format a budget for `parse_budget`: `64`, `11.1%` or `2:192,4:64`."""
    return format_schedule(budget) if isinstance(budget, dict) else str(budget)


def format_schedule(schedule: Schedule) -> str:
    """Format a schedule for `parse_budget`: `2:192,4:64`."""
    return ",".join(f"{layer}:{count}" for layer, count in schedule.items())


def as_json(budget: Budget | None) -> int | str | Schedule | None:
    """Convert a budget to a JSON or YAML value that `parse_budget` accepts."""
    return str(budget) if isinstance(budget, Share) else budget


def _whole(value: Any) -> int | None:
    """Convert a whole number of any numeric type to int; None for anything else, and for booleans."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real) or not abs(value) < MOST:  # also false for NaN
        return None
    return int(value) if value == int(value) else None


def _from_text(text: str) -> Budget | None:
    if COUNT.fullmatch(text):
        return int(text)
    if share := SHARE.fullmatch(text):
        percent = float(share[1])
        return Share(percent) if 0 < percent <= 100 else None
    return _from_pairs(stage.split(":") for stage in text.split(","))


def _from_pairs(pairs: Iterable[Any]) -> Schedule | None:
    numbers = [[_number(part) for part in pair] for pair in pairs]
    if not numbers or any(len(pair) != 2 or None in pair or pair[0] < 0 or pair[1] < 1 for pair in numbers):
        return None
    schedule = dict(numbers)
    return schedule if len(schedule) == len(numbers) else None  # None if a layer occurs twice


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if COUNT.fullmatch(value.strip()) else None
    return _whole(value)


def tokens(budget: Budget, visual: int) -> int | Schedule:
    """Count that a budget requests of a sample with `visual` tokens, possibly above `visual`; or its schedule."""
    return budget.of(visual) if isinstance(budget, Share) else budget


def resolve(budget: Budget, visual: int, key: str = "keep") -> int | Schedule:
    """Convert a share to a count for a model whose images all have `visual` tokens.

    Raises `LitPruneError`, naming `key`, for a share of less than one token.
    """
    if isinstance(budget, Share) and not round(budget.percent / 100 * visual):
        raise LitPruneError(f"{key} {budget}: 0 visual tokens; it must lie between 1 and the model's {visual}")
    return tokens(budget, visual)
