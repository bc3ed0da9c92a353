"""Explain a wrong setting of a Lightning verb in one line: the key, the file and the closest valid key.

If parsing fails, the settings are checked along the parser's keys and the types of their classes. jsonargparse only
raises text, which differs between versions.
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from lit_prune.commands._support.classes import (
    arguments_of,
    class_parser,
    classes_of,
    find_class,
    is_one_of,
    no_class,
    required_by,
    types_of,
)
from lit_prune.commands._support.settings import leaves, merged, specs, value_at
from lit_prune.commands._support.suggest import closest, in_short, suggestion, wrong_value
from lit_prune.commands._support.trainer_parser import Given, PruneParser
from lit_prune.errors import UsageError
from lit_prune.files.renamed import MODEL, RENAMED, names_of

SPEC = ("class_path", "init_args", "dict_kwargs")
NAME = re.compile(r"[A-Za-z_][\w.]*")
INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")
OPTIONS = "the `key: value` lines of its options"


class Problem(NamedTuple):
    """Something wrong with the settings: its dotted key, and the message."""

    key: str
    text: str


def explain(error: Exception, parser: PruneParser) -> UsageError:
    """One line for what a parser has refused; the parser's own words where nothing is found to be wrong.

    Args:
        error: what parsing ended in.
        parser: the verb's, with what it was given.
    """
    if parser.unknown:
        return UsageError(_unknown_option(parser))
    cause: BaseException | None = error
    while cause is not None:
        if name := getattr(cause, "argument_name", None):  # argparse's own: an option without its value
            return UsageError(f"{name}: {cause.message}")
        error, cause = cause, cause.__cause__
    settings, found = Settings(parser), []
    for given in parser.given:
        if problem := next(settings.problems(given), None):
            found.append(problem._replace(text=f"{given.file}: {problem.text}") if given.file else problem)
        settings.add(given)
    # The parser stops at a value that it refuses, so the last is the likeliest; it looks for unknown keys at the end.
    problem = next(chain(reversed(found), settings.missing(), _dangling(settings), [Problem("", _in_words(error))]))
    return UsageError(problem.text, key=problem.key)


def keys_of(parser: PruneParser) -> list[str]:
    """The dotted keys that a parser knows, with those of the classes that it was given."""
    settings = Settings(parser)
    for given in parser.given:
        settings.add(given)
    return settings.keys()


class Settings:
    """The settings of a run as far as they were read: a mapping like a configuration file's.

    Args:
        parser: the verb's, whose default classes are there from the beginning.
    """

    def __init__(self, parser: PruneParser) -> None:
        self.parser = parser
        self.content: dict[str, Any] = {}
        for action in parser._actions:
            if isinstance(default := action.default, dict | Namespace) and "class_path" in default:
                self.add(Given("", action.dest, {"class_path": default["class_path"]}))

    def add(self, given: Given) -> None:
        """Take over what was read next: a new class starts from nothing."""
        content, kinds = given.content, classes_of(types_of(self.parser).get(given.key))
        if isinstance(content, str) and kinds and (kind := find_class(content, kinds)):
            content = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
        for part in reversed(given.key.split(".") if given.key else []):
            content = {part: content}
        if isinstance(content, dict):
            self.content = merged(self.content, content)

    def keys(self) -> list[str]:
        """All dotted keys: the parser's, and the arguments of the classes."""
        names = {option.lstrip("-") for option in self.parser._option_string_actions if option.startswith("--")}
        for key, spec in specs(self.content):
            names |= {f"{key}.init_args.{argument}" for argument in arguments_of(find_class(spec["class_path"]))}
        return sorted(name for name in names if not name.endswith(("help", "+", "print_config")))

    def problems(self, given: Given) -> Iterator[Problem]:
        """Find the error in a file or an option, given the settings read before it."""
        if not given.key:
            yield from self._problems(self.parser, given.content or {}, "", "")
            return
        before, _, _ = given.key.partition(".init_args.")
        hint = types_of(self.parser).get(before)
        if hint is None and not isinstance(given.content, dict):
            if given.key in self._groups(self.parser):
                yield Problem(given.key, f"`{given.key}`: expected {OPTIONS}, got {given.content}")
            return
        content = given.content
        for part in reversed(given.key.removeprefix(before).split(".")[1:]):
            content = {part: content}
        if hint is None:
            yield from self._problems(self.parser, content, f"{before}.", f"{before}.")
        else:
            yield from self._wrong(before, hint, content)

    def missing(self) -> Iterator[Problem]:
        """Arguments that a chosen class can't do without."""
        for key, spec in specs(self.content):
            place, kind = f"{key}.init_args.", find_class(spec["class_path"])
            there = [*(spec.get("init_args") or ()), *(name.removeprefix(place) for name in self.parser.linked)]
            if absent := [f"`{name}`" for name in required_by(kind) if name not in there]:
                yield Problem(key, f"`{key}`: {kind.__name__} needs {', '.join(absent)}")

    def _problems(self, parser: ArgumentParser, content: dict, prefix: str, place: str) -> Iterator[Problem]:
        """Find the error below one of the parser's keys; `place` is that key with its prefix in a file."""
        hints, groups = types_of(parser), self._groups(parser)
        for key, value in content.items():
            key = str(key).removesuffix("+")  # `callbacks+: [...]` appends to a list
            name = f"{prefix}{key}"
            if name in hints:
                yield from self._wrong(f"{place}{key}", hints[name], value)
            elif name in groups and isinstance(value, dict):
                yield from self._problems(parser, value, f"{name}.", f"{place}{key}.")
            elif name in groups:
                got = "" if value is None else f", got {value}"
                yield Problem(f"{place}{key}", f"`{place}{key}`: expected {OPTIONS}{got}")
            elif name not in {action.dest for action in parser._actions}:
                full = f"{place}{key}"
                yield Problem(full, f"unknown key `{full}`{self._renamed(full) or self._meant(full)}")

    def _wrong(self, place: str, hint: Any, value: Any) -> Iterator[Problem]:
        """Find the error in a value: in path and arguments of a class, otherwise in its type."""
        kinds = classes_of(hint)
        if isinstance(value, list) and kinds:
            for i, each in enumerate(value):
                yield from self._wrong(f"{place}[{i}]" if isinstance(each, dict) else place, hint, each)
        elif isinstance(value, dict) and kinds:
            yield from self._wrong_spec(place, kinds, value)
        elif isinstance(value, str) and "${" in value:
            return
        elif problem := wrong_value(place, hint, value):
            if kinds and isinstance(value, str) and NAME.fullmatch(value):
                yield from self._wrong_spec(place, kinds, {"class_path": value})
            else:
                yield Problem(place, problem)

    def _wrong_spec(self, place: str, kinds: list[type], value: dict) -> Iterator[Problem]:
        """Find the error in `class_path` and `init_args`."""
        plain = re.sub(r"\[\d+\]", "", place)
        if unknown := next((key for key in value if key not in SPEC), None):
            meant = closest(str(unknown), SPEC)
            if "class_path" in value or meant:
                yield Problem(plain, f"unknown key `{plain}.{unknown}`{suggestion(meant)}")
            else:
                yield Problem(plain, f"`{plain}` wants `class_path` and `init_args`, got {value}")
            return
        before = value_at(self.content, plain)
        path = value.get("class_path") or (before.get("class_path") if isinstance(before, dict) else None)
        if path is None:
            yield Problem(plain, f"`{plain}`: no class is chosen for these `init_args`; give its `class_path`")
        elif "${" in str(path):
            return
        elif (kind := find_class(path, kinds)) is None:
            yield Problem(plain, f"`{plain}`: {no_class(path)}")
        elif not is_one_of(kind, kinds):
            yield Problem(plain, f"`{plain}`: {path} is not a {' or '.join(each.__name__ for each in kinds)}")
        elif value.get("init_args") is not None:
            yield from self._wrong_arguments(plain, str(path), kind, value["init_args"])

    def _wrong_arguments(self, place: str, path: str, kind: Any, arguments: Any) -> Iterator[Problem]:
        place = f"{place}.init_args"
        if not isinstance(arguments, dict):
            yield Problem(place, f"`{place}`: expected {OPTIONS}, got {arguments}")
            return
        known = arguments_of(kind)
        for key in arguments:
            if known and key not in known and not any(name.startswith(f"{key}.") for name in known):
                meant = closest(str(key), known) or closest(str(key), SPEC)
                takes = "" if meant else f"; it takes {', '.join(known) or 'no arguments'}"
                new = names_of(path).get(key)
                hint = f"; it is `{new}` now" if new else f"{suggestion(meant)}{takes}"
                yield Problem(f"{place}.{key}", f"unknown key `{place}.{key}` of {path}{hint}")
        yield from self._problems(class_parser(kind), arguments, "", f"{place}.") if known else ()

    def _renamed(self, key: str, dashes: str = "") -> str:
        """The end of a message that gives today's name of a key of version 0.1; empty for any other key."""
        parent, _, name = key.rpartition(".")
        path = (value_at(self.content, parent.removesuffix(".init_args")) or {}) if parent else {}
        path = path.get("class_path") if isinstance(path, dict) else None
        new = (RENAMED["PruneModule"] if parent == MODEL else names_of(path)).get(name)
        return f"; it is `{dashes}{parent}.{new}` now" if new else ""

    def _meant(self, key: str, dashes: str = "") -> str:
        found = closest(key, self.keys())
        return suggestion(found and f"{dashes}{found}")

    @staticmethod
    def _groups(parser: ArgumentParser) -> set[str]:
        """Keys that hold others."""
        names = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
        return {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}


def _unknown_option(parser: PruneParser) -> str:
    option = next((word for word in parser.unknown if word.startswith("-")), None)
    if option is None:
        return f"unexpected argument `{parser.unknown[0]}`"
    settings = Settings(parser)
    for given in parser.given:
        settings.add(given)
    key = option.lstrip("-").partition("=")[0]
    return f"unknown option `--{key}`{settings._renamed(key, '--') or settings._meant(key, '--')}"


def _dangling(settings: Settings) -> Iterator[Problem]:
    """Every ``${...}`` that leads nowhere."""
    known = {*settings.keys(), *leaves(settings.content)}
    known |= {key[: match.start()] for key in known for match in re.finditer(r"\.", key)}
    for place, text in leaves(settings.content).items():
        for key in INTERPOLATION.findall(text) if isinstance(text, str) else ():
            if key not in known and not key.startswith("."):
                hint = settings._renamed(key) or settings._meant(key)
                yield Problem(place, f"`{place}`: nothing is at `${{{key}}}`{hint}")


def _in_words(error: BaseException) -> str:
    """A library's message, with the key where the exception has it."""
    place = getattr(error, "full_key", None) if isinstance(error, OmegaConfBaseException) else None
    at = f"`{place}`: " if place else ""
    if isinstance(error, GrammarParseError):
        return f"{at}not a valid interpolation; `${{key}}` stands for another key's value"
    return at + in_short(error)
