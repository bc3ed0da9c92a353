"""Words for what a user got wrong: the nearest right name, and what a value should have been."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser

from lit_prune.files.yaml_files import shorten

LONGEST = 400  # characters of a message
UNIONS = (typing.Union, types.UnionType)


def closest(key: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant: same name elsewhere, a sibling nearly so named, or anything alike."""
    known = list(known)
    parent, _, name = key.rpartition(".")
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if same_name and (found := difflib.get_close_matches(key, same_name, n=1, cutoff=0.5 if parent else 0.1)):
        return found[0]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if found := difflib.get_close_matches(name, siblings, n=1, cutoff=0.5):
        return siblings[found[0]]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.7)), None)


def suggestion(key: str | None) -> str:
    """The end of a message that suggests a key; empty without one."""
    return f"; did you mean `{key}`?" if key else ""


def in_short(error: BaseException) -> str:
    """A library's message as it is, on one line and cut where it grows long."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, LONGEST)


def wrong_value(place: str, hint: Any, value: Any) -> str | None:
    """One line for a value that doesn't fit a type, as jsonargparse reads both; None for one that does."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:  # a type that jsonargparse doesn't check
        return None
    try:
        parser.parse_object({"value": value})
    except Exception:  # whatever it is: the value is at fault
        given = "nothing" if value in ("", None) else value
        return shorten(f"`{place}`: expected {', or '.join(type_names(hint))}, got {given}", LONGEST)
    return None


def type_names(hint: Any) -> list[str]:
    """The alternatives of a type as people write them; null only where nothing else is allowed."""
    if typing.get_origin(hint) in UNIONS:
        names = [name for part in typing.get_args(hint) for name in type_names(part)]
        return [name for name in dict.fromkeys(names) if name != "null"] or ["null"]
    if typing.get_origin(hint) is typing.Literal:
        return [f"one of {[*typing.get_args(hint)]}"]
    if hint in (None, types.NoneType):
        return ["null"]
    name = getattr(typing.get_origin(hint) or hint, "__name__", str(hint))
    inner = [" or ".join(type_names(part)) for part in typing.get_args(hint) if part is not ...]
    return [f"{name}[{', '.join(inner)}]" if inner else name]
