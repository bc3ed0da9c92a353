"""Options of a verb: made from the signature and docstring of its ``run``."""

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import cache
from os import PathLike

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from lit_prune.commands._support import yaml_loader
from lit_prune.commands._support.explain import explain, explain_unexpected
from lit_prune.commands._support.overlays import check_files, config_files
from lit_prune.errors import UsageError
from lit_prune.files.shipped import config_or_text

SHORT = {"-c": "config", "-o": "out"}
YES_NO = ("true", "false", "yes", "no")
HELP_WIDTH = 79
LARGEST = 2**63 - 1
NEGATIVE = re.compile(r"-\.?[0-9]")  # a number, no option


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of description and examples as they are."""


def run_verb(verb: str, argv: list[str]) -> None:
    """Parse the arguments of a verb and call its ``run``."""
    run, options = parse_verb(verb, argv)
    run(**options)


def parse_verb(verb: str, argv: list[str]) -> tuple[Callable[..., None], dict[str, typing.Any]]:
    """A verb's ``run``, and its arguments from a command line; raises `UsageError` for one that can't be read."""
    run = importlib.import_module(f"lit_prune.commands.{verb.replace('-', '_')}").run
    yaml_loader.install("yaml")
    parser = ArgumentParser(
        prog=f"lit-prune {verb}",
        description=_about(run),
        epilog=_epilog(run),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    own_config = "config" in inspect.signature(run).parameters
    if not own_config:
        parser.add_argument("--config", action="config", help="YAML file of this verb's options; those given win.")
    parser.add_function_arguments(run, as_positional=False, fail_untyped=False)
    line = plain(argv, run)
    if not own_config:
        check_files(line, every_option=False)
    try:
        options = parser.parse_args(line)
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser, [] if own_config else config_files(line))) from error
    except Exception as error:  # jsonargparse lets some through: nothing but the user's input is read here
        raise UsageError(explain_unexpected(error)) from error
    if not own_config:
        del options["config"]
    check_values(options)
    return run, parser.instantiate(options).as_dict()


def check_values(node: typing.Any, name: str = "") -> None:
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


def _about(run: Callable[..., None]) -> str:
    """Paragraphs between a docstring's first line and its arguments; the parser itself reads the rest."""
    text = inspect.getdoc(run).partition("\n\nArgs:")[0].partition("\n\n")[2]
    return "\n\n".join(textwrap.fill(" ".join(part.split()), HELP_WIDTH) for part in text.split("\n\n"))


def _epilog(run: Callable[..., None]) -> str:
    """Examples, and the short forms of options."""
    names = [*inspect.signature(run).parameters]
    hints = [f"{flag} is --{name}" for flag, name in SHORT.items() if name in {"config", *names}]
    hints += [f"a first word is --{names[0]}", "lists may be written --option a b, flags without a value"]
    lines = ["examples:", *(f"  {line}" for line in examples(run)), "", textwrap.fill("; ".join(hints), HELP_WIDTH)]
    return "\n".join(lines if examples(run) else lines[2:])


def plain(argv: list[str], run: Callable[..., None]) -> list[str]:
    """Rewrite ``--image a b``, ``--image a --image b`` and bare ``--flag`` as the one form the parser reads.

    A bare ``--group`` of options, a dataclass, stands for its defaults; ``--group.name value`` sets one of them.
    A file of options comes first, so that the options given beside it win wherever they stand; one that isn't here is
    looked up among those that come with the package.
    """
    hints = _hints(run)
    lists: dict[str, list[str]] = {}
    files, plain_argv = [], []
    tokens = _named(list(argv), run, hints)
    while tokens:
        name, value = _option(tokens.pop(0), hints)
        if name == "config" and tokens and value is None:
            tokens[0] = config_or_text(tokens[0])
        elif name == "config" and value is not None:
            value = config_or_text(value)
        given = [] if value is None else [value]
        if name in hints and _is(hints[name], list):
            while tokens and (not tokens[0].startswith("-") or NEGATIVE.match(tokens[0])):
                given.append(tokens.pop(0))
            lists.setdefault(name, []).extend(given)
        elif name in hints and _is(hints[name], bool) and not given:
            spoken = tokens and tokens[0].lower() in YES_NO
            plain_argv.append(f"--{name}={tokens.pop(0) if spoken else 'true'}")
        elif name in hints and _groups(hints[name]) and not given and (not tokens or tokens[0].startswith("-")):
            plain_argv.append(f"--{name}={{}}")
        elif name in hints and value is None:
            (files if name == "config" else plain_argv).extend([f"--{name}", *tokens[:1]])
            del tokens[:1]
        elif name == "config":
            files.append(f"--{name}={value}")
        else:
            plain_argv.append(name if value is None else f"--{name}={value}")
    return files + plain_argv + [f"--{name}={_as_yaml(values)}" for name, values in lists.items()]


def _named(tokens: list[str], run: Callable[..., None], hints: dict[str, typing.Any]) -> list[str]:
    """The words before the first option, with the names of the parameters that they belong to, in order.

    A list takes all that are left: ``copy micro rcp`` is ``--action copy --names micro rcp`` for these two parameters.
    """
    named: list[str] = []
    for name in inspect.signature(run).parameters:
        if not tokens or tokens[0].startswith("-"):
            break
        named += [f"--{name}", tokens[0]]
        tokens = tokens[1:]
        if _is(hints[name], list):
            break
    return named + tokens


def _hints(run: Callable[..., None]) -> dict[str, typing.Any]:
    """The type of every option: of the parameters, and as `group.name` of the fields of those that are dataclasses."""
    hints = {"config": str, **typing.get_type_hints(run)}
    hints.pop("return", None)
    for name, kind in list(hints.items()):
        for group in _groups(kind):
            hints |= {f"{name}.{field}": of for field, of in typing.get_type_hints(group).items()}
    return hints


def _option(token: str, hints: dict[str, typing.Any]) -> tuple[str, str | None]:
    """Name (without dashes when it is a parameter) and value of a token."""
    if token in SHORT and SHORT[token] in hints:
        return SHORT[token], None
    if not token.startswith("--"):
        return token, None
    name, equals, value = token[2:].partition("=")
    name = name.replace("-", "_")
    return (name if name in hints or equals else token), (value if equals else None)


def _as_yaml(values: list[str]) -> str:
    """One value that is a list already stays as written."""
    written = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
    if written:
        return values[0]
    return yaml.safe_dump(values, default_style='"', default_flow_style=True, width=sys.maxsize).strip()


@cache
def _is(kind: typing.Any, wanted: type) -> bool:
    """Whether a type is ``wanted``, ``wanted[...]`` or either of them or None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is(part, wanted) for part in typing.get_args(kind))
    return kind is wanted or typing.get_origin(kind) is wanted


def _groups(kind: typing.Any) -> list[type]:
    """The dataclasses that a type is, or is a union of: groups of options."""
    return [part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)]
