"""User errors, printed without a traceback, and range checks that raise them."""

import math
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from numbers import Integral, Real
from typing import Any


class LitPruneError(Exception):
    """Error caused by the user's input or settings. The message says what is wrong, where, and how to fix it."""


class UsageError(Exception):
    """Command line or configuration that can't be parsed; exit code 2. `key`: the dotted key at fault, if known."""

    def __init__(self, text: str, key: str = ""):
        super().__init__(text)
        self.key = key


class BadSample(LitPruneError):
    """Unusable sample, with `file`, `sample` (its id or index) and `reason`.

    Code that knows neither file nor sample passes "" and None; callers that know them raise it again with both.
    """

    def __init__(self, file: object, sample: object, reason: str):
        super().__init__(file, sample, reason)  # kept as args, so that it pickles
        self.file, self.sample, self.reason = str(file), sample, reason

    def __str__(self) -> str:
        file = f"{self.file}: " if self.file else ""
        sample = f"sample {self.sample}: " if self.sample is not None else ""
        return f"{file}{sample}{self.reason}"


def extra(*names: str) -> str:
    """Commands that install optional dependencies, by the names of extras in pyproject.toml: `extra("datasets")`.

    The project isn't on a package index, so the commands name the clone or the packages themselves.
    """
    clone = f"pip install -e '.[{','.join(names)}]' in the clone of lit_prune"
    packages = [package for name in names for package in _requirements(name)]
    return f"{clone}, or pip install {' '.join(repr(package) for package in packages)}" if packages else clone


def _requirements(name: str) -> list[str]:
    """Requirements of an extra from the installed package's metadata; empty if the package isn't installed."""
    try:
        every = requires("lit-prune") or []
    except PackageNotFoundError:
        return []
    matches = (re.fullmatch(r"""([^;]+);.*extra == ["'](.+)["'].*""", line) for line in every)
    chosen = [match[1].strip() for match in matches if match and match[2] == name]
    return [package for package in chosen if not package.startswith("lit-prune")]


LONGEST_WORD = 300  # characters: a path may be long


def one_line(text: str) -> str:
    """Format a message as one line for a terminal: escape control characters, shorten very long words."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text.strip())
    half = LONGEST_WORD // 2 - 2
    return re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:half]}...{word[0][-half:]}", shown)


def in_words(error: BaseException) -> str:
    """Describe an unexpected exception in one line."""
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

    None passes: the option is off.

    Args:
        name: the key, such as `model.lr`.
        value: the value to check.
        least: inclusive lower bound. above: exclusive lower bound.
        most: inclusive upper bound. below: exclusive upper bound.
        whole: allow integers only.
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
    """Apply `check_number` to each entry of a list."""
    for i, value in enumerate(values):
        check_number(f"{name}[{i}]", value, **limits)


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `LitPruneError` unless `value` is one of those allowed; the message names the key and lists them."""
    if value not in (allowed := tuple(allowed)):
        raise LitPruneError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")


def _wanted(least: float | None, above: float | None, most: float | None, below: float | None, whole: bool) -> str:
    """Describe the range in words."""
    kind = "a whole number" if whole else "a finite number"
    if least is not None and most is not None:
        return f"{kind} from {least} to {most}"
    low = f"of at least {least}" if least is not None else f"above {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return " ".join(filter(None, [kind, " and ".join(filter(None, [low, high]))]))
