"""Errors that a user's input or settings caused, printed without a traceback, and checks of numbers that raise them."""

import math
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from numbers import Integral, Real
from typing import Any


class LitPruneError(Exception):
    """What a user did or gave wrong. The text says what, where, and how to put it right."""


class UsageError(Exception):
    """A command line or configuration that cannot be read; exit code 2. `key` is the dotted key at fault, if known."""

    def __init__(self, text: str, key: str = ""):
        super().__init__(text)
        self.key = key


class BadSample(LitPruneError):
    """A sample that cannot be used, with `file`, `sample` (its id or index) and `reason`.

    Code that knows neither the file nor the sample leaves them as "" and None; whoever knows them raises again.
    """

    def __init__(self, file: object, sample: object, reason: str):
        super().__init__(file, sample, reason)  # kept as args, so that it pickles
        self.file, self.sample, self.reason = str(file), sample, reason

    def __str__(self) -> str:
        file = f"{self.file}: " if self.file else ""
        sample = f"sample {self.sample}: " if self.sample is not None else ""
        return f"{file}{sample}{self.reason}"


def extra(*names: str) -> str:
    """How to install optional dependencies, by the names of the extras in pyproject.toml: `extra("datasets")`.

    This project is on no package index, so the commands name the clone or the packages themselves, never the project.
    """
    clone = f"pip install -e '.[{','.join(names)}]' in the clone of lit_prune"
    packages = [package for name in names for package in _requirements(name)]
    return f"{clone}, or pip install {' '.join(repr(package) for package in packages)}" if packages else clone


def _requirements(name: str) -> list[str]:
    """What an extra asks for, as this installation's metadata has it; nothing where the package isn't installed."""
    try:
        every = requires("lit-prune") or []
    except PackageNotFoundError:
        return []
    found = (re.fullmatch(r"""([^;]+);.*extra == ["'](.+)["'].*""", line) for line in every)
    chosen = [match[1].strip() for match in found if match and match[2] == name]
    return [package for package in chosen if not package.startswith("lit-prune")]


LONGEST_WORD = 300  # characters: a path may be long


def one_line(text: str) -> str:
    """A message as one line for a terminal: control characters escaped, very long words without their middle."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text.strip())
    half = LONGEST_WORD // 2 - 2
    return re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:half]}...{word[0][-half:]}", shown)


def in_words(error: BaseException) -> str:
    """An unexpected exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


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
