"""Options of a verb, from the signature and docstring of its ``run``: argparse reads words, jsonargparse values."""

import argparse
import dataclasses
import importlib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from lit_prune.commands._support import yaml_loader
from lit_prune.commands._support.settings import config_content
from lit_prune.commands._support.suggest import closest, in_short, suggestion, wrong_value
from lit_prune.errors import LitPruneError, UsageError
from lit_prune.files.shipped import closest_configs, config_or_text, meant
from lit_prune.files.yaml_files import parse_yaml, shown

SHORT = {"config": "-c", "out": "-o"}
PRINT_CONFIG = "print_config"
HELP_WIDTH = 79
LARGEST = 2**63 - 1


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of description and examples as they are."""


def run_verb(verb: str, argv: list[str]) -> None:
    """Parse the arguments of a verb and call its ``run``."""
    run, options = parse_verb(verb, argv)
    run(**options)


def parse_verb(verb: str, argv: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """A verb's ``run``, and its arguments from a command line; raises `UsageError` for one that can't be read.

    argparse takes the command line apart, for only its `nargs` read `--image a b` and a bare `--compare`; jsonargparse,
    which gives each option one value, turns the values into what the annotations ask for, and prints the help.
    """
    run = importlib.import_module(f"lit_prune.commands.{verb.replace('-', '_')}").run
    yaml_loader.install("yaml")
    parser = _typed_parser(verb, run)
    given = _read_words(argv, run)
    printed = given.pop("printed", None)
    files = [] if _own_config(run) else given.pop("config", [])
    contents = {file: _read_file(file, run) for file in files}
    values = _merged([*contents.values(), _grouped(given)], run)
    if printed:
        parser.parse_args([f"--config={json.dumps(values)}", printed] if PRINT_CONFIG in printed else [printed])
    required = [name for name, p in inspect.signature(run).parameters.items() if p.default is p.empty]
    if missing := [f"--{name}" for name in required if name not in values]:
        raise UsageError(f"give {', '.join(missing)}")
    try:
        options = parser.parse_object(values)
    except Exception as error:  # nothing but the user's input is read here
        raise UsageError(_explained(error, [*contents.items(), ("", _grouped(given))], run)) from error
    if not _own_config(run):
        options.pop("config", None)
    check_values(options)
    return run, parser.instantiate(options).as_dict()


def check_values(node: Any, name: str = "") -> None:
    """Raise `UsageError` for values that no option can take: numbers of more than 64 bits, text with a NUL."""
    if isinstance(node, Namespace | dict):
        for key, value in (vars(node) if isinstance(node, Namespace) else node).items():
            check_values(value, f"{name}.{key}" if name else f"{key}")
    elif isinstance(node, list | tuple):
        for value in node:
            check_values(value, name)
    elif isinstance(node, int) and not -LARGEST <= node <= LARGEST:
        raise UsageError(f"`{name}`: a number of {node.bit_length()} bits is too large")
    elif isinstance(node, str | PathLike) and "\0" in str(node):
        raise UsageError(f"`{name}`: {str(node)!r} has a NUL character")


def examples(run: Callable[..., None]) -> list[str]:
    """The lines under ``Examples:`` in a docstring, as they are written."""
    text = (inspect.getdoc(run) or "").partition("\n\nExamples:\n")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- the parsers ----------------------------------------------------------------------------------------------------


def _typed_parser(verb: str, run: Callable[..., None]) -> ArgumentParser:
    """Types, defaults and help of a verb's options."""
    parser = ArgumentParser(
        prog=f"lit-prune {verb}",
        description=_about(run),
        epilog=_epilog(run),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    if not _own_config(run):
        parser.add_argument("--config", action="config", help="YAML file of this verb's options; those given win.")
    parser.add_function_arguments(run, as_positional=False, fail_untyped=False)
    return parser


def _word_parser(run: Callable[..., None]) -> argparse.ArgumentParser:
    """Parser for the number of words of each option; the typed parser interprets them."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("-h", "--help", dest="printed", action="store_const", const="--help")
    for name, hint in _hints(run).items():
        short = [SHORT[name]] if name in SHORT else []
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *short])
        if _is(hint, list):
            parser.add_argument(*flags, dest=name, nargs="+", action="extend")
        elif name == "config" and not _own_config(run):
            parser.add_argument(*flags, dest=name, action="append")
            parser.add_argument(f"--{PRINT_CONFIG}", dest="printed", action="store_const", const=f"--{PRINT_CONFIG}")
        elif _is(hint, bool):
            parser.add_argument(*flags, dest=name, nargs="?", const="true")
        elif _groups(hint):  # its name alone stands for the defaults
            parser.add_argument(*flags, dest=name, nargs="?", const="{}")
            parser.add_argument(f"--{name}.help", dest="printed", action="store_const", const=f"--{name}.help")
        else:
            parser.add_argument(*flags, dest=name)
    return parser


def _about(run: Callable[..., None]) -> str:
    """Paragraphs between a docstring's first line and its arguments; the parser itself reads the rest."""
    text = inspect.getdoc(run).partition("\n\nArgs:")[0].partition("\n\n")[2]
    return "\n\n".join(textwrap.fill(" ".join(part.split()), HELP_WIDTH) for part in text.split("\n\n"))


def _epilog(run: Callable[..., None]) -> str:
    """Examples, and the short forms of options."""
    names = [*inspect.signature(run).parameters]
    hints = [f"{flag} is --{name}" for name, flag in SHORT.items() if name in {"config", *names}]
    hints += [f"a first word is --{names[0]}", "lists may be written --option a b, flags without a value"]
    lines = ["examples:", *(f"  {line}" for line in examples(run)), "", textwrap.fill("; ".join(hints), HELP_WIDTH)]
    return "\n".join(lines if examples(run) else lines[2:])


# -- from words to values -------------------------------------------------------------------------------------------


def _read_words(argv: list[str], run: Callable[..., None]) -> dict[str, Any]:
    """The text given for each option, a list of it for lists; words before the first option belong to parameters.

    A list takes all that are left: ``copy micro rcp`` is ``--action copy --names micro rcp`` for these two parameters.
    """
    hints, given = _hints(run), {}
    first = words = list(takewhile(lambda word: not word.startswith("-"), argv))
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:  # by its name alone
            break
        if words:
            given[name], words = (words, []) if _is(hints[name], list) else (words[0], words[1:])
    try:
        found, unknown = _word_parser(run).parse_known_args(argv[len(first) :])
    except argparse.ArgumentError as error:
        raise UsageError(f"{(error.argument_name or '').partition('/')[0]}: {error.message}") from error
    except ValueError as error:  # argparse drops `--` from `--prompt=--` (Python 3.11), and misses the value then
        raise UsageError("a value can't be `--`") from error
    if unknown := words + unknown:
        raise UsageError(_unknown(unknown, hints))
    for name, value in vars(found).items():
        given[name] = [*given.get(name, []), *value] if name in hints and _is(hints[name], list) else value
    if "config" in given:
        named = given["config"]
        given["config"] = [*map(config_or_text, named)] if isinstance(named, list) else config_or_text(named)
    for name, value in given.items():  # one value that is a list already stays as written
        if isinstance(value, list) and len(value) == 1 and value[0].startswith("[") and value[0].endswith("]"):
            given[name] = value[0]
    return given


def _unknown(words: list[str], hints: dict[str, Any]) -> str:
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        return f"unexpected argument `{words[0]}`"
    name = option.partition("=")[0]
    found = closest(name.lstrip("-").replace("-", "_"), hints)
    return f"unknown option `{name}`{suggestion(found and f'--{found}')}"


def _grouped(given: dict[str, Any]) -> dict[str, Any]:
    """`{"train.gpus": "8"}` as `{"train": {"gpus": "8"}}`."""
    values: dict[str, Any] = {}
    for name in sorted(given):  # a group comes before what is in it
        group, _, field = name.partition(".")
        content = values.get(group, {}) if field else given[name]
        if field and isinstance(content, str):
            try:
                content = {} if content == "{}" else parse_yaml(content, f"--{group}")
            except LitPruneError as error:
                raise UsageError(str(error)) from error
        values[group] = {**content, field: given[name]} if field else content
    return values


def _read_file(file: str, run: Callable[..., None]) -> dict[str, Any]:
    """The options in a verb's file; raises `UsageError` for one that can't be read, and for a key that is no option."""
    content = config_content(file)
    if content is None:  # an address, or a pipe
        if not Path(file).is_fifo():
            raise UsageError(f"no configuration file `{shown(file)}`{meant(closest_configs(file))}")
        try:
            content = parse_yaml(Path(file).read_text(encoding="utf-8"), file)
        except (LitPruneError, OSError, UnicodeError) as error:
            raise UsageError(f"{file}: {error}") from error
    known = [name for name in _hints(run) if name != "config" or _own_config(run)]
    for key, value in content.items():
        keys = [f"{key}.{field}" for field in value] if key in known and _is_group(key, value, run) else [key]
        if wrong := next((key for key in keys if key not in known), None):
            raise UsageError(f"{file}: unknown key `{wrong}`{suggestion(closest(wrong, known))}")
    return content


def _merged(parts: list[dict[str, Any]], run: Callable[..., None]) -> dict[str, Any]:
    """Values of files and of the command line: later ones win, in groups option by option."""
    values: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            value = {} if value == "{}" and _groups(_hints(run)[name]) else value
            both = _is_group(name, value, run) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **value} if both else value
    return values


def _explained(error: Exception, sources: list[tuple[str, dict[str, Any]]], run: Callable[..., None]) -> str:
    """Report the first value that its option rejects, with its file; otherwise the parser's message."""
    hints = _hints(run)
    for file, values in sources:
        for name, value in values.items():
            group = _is_group(name, value, run)
            each = {f"{name}.{field}": part for field, part in value.items()} if group else {name: value}
            for key, part in each.items():
                if problem := wrong_value(key, hints[key], part):
                    return f"{file}: {problem}" if file else problem
    return in_short(error)


# -- a verb's parameters --------------------------------------------------------------------------------------------


def _own_config(run: Callable[..., None]) -> bool:
    """True if `--config` is a parameter of the verb, rather than a file with its options."""
    return "config" in inspect.signature(run).parameters


@cache
def _hints(run: Callable[..., None]) -> dict[str, Any]:
    """Types of all options: of parameters, and of dataclass parameters' fields as `group.name`."""
    hints = {"config": str, **typing.get_type_hints(run)}
    hints.pop("return", None)
    for name, kind in list(hints.items()):
        for group in _groups(kind):
            hints |= {f"{name}.{field}": of for field, of in typing.get_type_hints(group).items()}
    return hints


@cache
def _is(kind: Any, wanted: type) -> bool:
    """True if a type is ``wanted``, ``wanted[...]``, or a union with one of them."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is(part, wanted) for part in typing.get_args(kind))
    return kind is wanted or typing.get_origin(kind) is wanted


def _groups(kind: Any) -> list[type]:
    """The dataclasses that a type is, or is a union of: groups of options."""
    return [part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)]


def _is_group(name: str, value: Any, run: Callable[..., None]) -> bool:
    return isinstance(value, dict) and bool(_groups(_hints(run)[name]))
