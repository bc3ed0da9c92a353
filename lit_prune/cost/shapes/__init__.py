"""The shapes of public checkpoints, for work without a download: costs, benchmarks, tests with random weights.

Each JSON file beside this one is named after its hub id and holds the fields of that checkpoint's `config.json` which
define the architecture, in the form that transformers v5 writes; every one is spelt out, so that a changed default of
the library changes no shape.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from lit_prune.errors import LitPruneError

FOLDER = Path(__file__).parent


@runtime_checkable
class Config(Protocol):
    """Fields of a configuration: a transformers one, or a `Shape`."""

    def get_text_config(self) -> Any:
        """The decoder's fields."""


class Shape(SimpleNamespace):
    """Fields of a configuration, to be read as transformers' own, whose classes bring models' code: seconds."""

    def get_text_config(self) -> "Shape":
        """The decoder's fields."""
        return self.text_config


@cache
def names() -> tuple[str, ...]:
    """Hub ids of the checkpoints whose shape is shipped."""
    return tuple(sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.json")))


def shipped_fields(name: str) -> dict[str, Any]:
    """The fields of a public checkpoint's `config.json`; raises `LitPruneError` as `shipped_shape` does."""
    return json.loads(_text(name))


def shipped_shape(name: str) -> Shape:
    """The same fields as attributes, for what asks for nothing that a configuration's class would add.

    Raises:
        LitPruneError: the shape of `name` is not shipped, with those that are.
    """
    return json.loads(_text(name), object_hook=lambda fields: Shape(**fields))


def _text(name: str) -> str:
    if name not in names():
        raise LitPruneError(f"the shape of {name} is not shipped; shipped are: {', '.join(names())}")
    return (FOLDER / f"{name}.json").read_text(encoding="utf-8")
