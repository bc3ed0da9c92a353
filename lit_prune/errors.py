"""Errors that a user's input or settings caused; the command line prints their text without a traceback."""

import re
from importlib.metadata import PackageNotFoundError, requires


class LitPruneError(Exception):
    """What a user did or gave wrong. The text says what, where, and how to put it right."""


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
