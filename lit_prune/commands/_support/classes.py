"""Classes that a configuration names, and what they take."""

import importlib
import inspect
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser

from lit_prune.commands._support.suggest import LONGEST, UNIONS, closest, in_short, suggestion
from lit_prune.files.yaml_files import shorten


def find_class(name: Any, kinds: Iterable[type] = ()) -> Any:
    """The class at an import path, or the one among `kinds` and their subclasses that has a bare name; else None."""
    module, _, last = str(name).rpartition(".")
    if not module:
        found = (each for kind in kinds for each in _family(kind) if each.__name__ == last)
        return next(found, None)
    try:
        return getattr(importlib.import_module(module), last, None)
    except Exception:  # whatever its module raises
        return None


def no_class(path: Any) -> str:
    """A message about an import path at which no class is, with the nearest name of its module."""
    module, _, name = str(path).rpartition(".")
    if not module:
        return f"no class `{path}`; write its full path, `package.module.Class`"
    try:
        names = [n for n, value in vars(importlib.import_module(module)).items() if isinstance(value, type)]
        reason = f"{module} has no `{name}`"
    except Exception as error:  # whatever the module raises: it can't be used
        names, reason = [], f"{type(error).__name__}: {in_short(error)}"
    found = closest(name, names)
    return shorten(f"no class `{path}` ({reason})", LONGEST) + suggestion(found and f"{module}.{found}")


@cache
def class_parser(kind: Any) -> ArgumentParser:
    """A parser of a class's arguments alone."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser


def arguments_of(kind: Any) -> list[str]:
    """The arguments of a class, as the parser sees them; none where it can't tell."""
    try:
        return [action.dest for action in class_parser(kind)._actions if action.dest != "help"]
    except Exception:  # a suggestion must never hide the message that it belongs to
        return []


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of a class's arguments; none where the parser can't tell."""
    try:
        return {action.dest: action.default for action in class_parser(kind)._actions}
    except Exception:  # not a class, or one whose signature can't be read
        return {}


def required_by(kind: Any) -> list[str]:
    """Arguments without a default."""
    if kind is None:
        return []
    try:
        found = inspect.signature(kind).parameters.values()
    except (ValueError, TypeError):
        return []
    return [p.name for p in found if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def types_of(parser: ArgumentParser) -> dict[str, Any]:
    """The type of each of a parser's keys."""
    return {action.dest: action._typehint for action in parser._actions if hasattr(action, "_typehint")}


def classes_of(hint: Any) -> list[type]:
    """The classes of the project and its libraries in a type: what a `class_path` may name."""
    if typing.get_origin(hint) in (*UNIONS, list, dict, tuple) or typing.get_args(hint):
        return [kind for part in typing.get_args(hint) for kind in classes_of(part)]
    return [hint] if isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "datetime") else []


def is_one_of(kind: Any, kinds: list[type]) -> bool:
    if not isinstance(kind, type) or any(getattr(each, "_is_protocol", False) for each in kinds):
        return True  # a function, or what only the parser can tell
    return any(issubclass(kind, each) for each in kinds)


def _family(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _family(each)
