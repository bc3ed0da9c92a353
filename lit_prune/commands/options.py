"""Options of a verb: made from the signature and docstring of its ``run``."""

import dataclasses
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable
from functools import cache

from jsonargparse import ArgumentError, ArgumentParser

from lit_prune.cli import UsageError
from lit_prune.commands.explain import explain, explain_unexpected
from lit_prune.commands.overlays import check_files, config_files

SHORT = {"-c": "config", "-o": "out"}
YES_NO = ("true", "false", "yes", "no")


def run_verb(verb: str, argv: list[str]) -> None:
    """Parse the arguments of a verb and call its ``run``."""
    run = importlib.import_module(f"lit_prune.commands.{verb.replace('-', '_')}").run
    # Paragraphs between the first line and the arguments; the parser itself reads the rest of the docstring.
    about = inspect.getdoc(run).partition("\n\nArgs:")[0].partition("\n\n")[2]
    parser = ArgumentParser(prog=f"lit-prune {verb}", description=about, exit_on_error=False, allow_abbrev=False)
    own_config = "config" in inspect.signature(run).parameters
    if not own_config:
        parser.add_argument("--config", action="config", help="YAML file of this verb's options; those given win.")
    names = [*inspect.signature(run).parameters]
    hints = [f"{flag} is --{name}" for flag, name in SHORT.items() if name in {"config", *names}]
    hints += [f"a first word is --{names[0]}", "lists may be written --option a b, flags without a value"]
    parser.epilog = "; ".join(hints)
    parser.add_function_arguments(run, as_positional=False, fail_untyped=False)
    if not own_config:
        check_files(argv)
    try:
        options = parser.parse_args(plain(argv, run))
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser, [] if own_config else config_files(argv))) from error
    except Exception as error:  # jsonargparse lets some through: nothing but the user's input is read here
        raise UsageError(explain_unexpected(error)) from error
    if not own_config:
        del options["config"]
    run(**parser.instantiate(options).as_dict())


def plain(argv: list[str], run: Callable[..., None]) -> list[str]:
    """Rewrite ``--image a b``, ``--image a --image b`` and bare ``--flag`` as the one form the parser reads.

    A bare ``--group`` of options, a dataclass, stands for its defaults; ``--group.name value`` sets one of them.
    A file of options comes first, so that the options given beside it win wherever they stand.
    """
    hints = _hints(run)
    lists: dict[str, list[str]] = {}
    files, plain_argv = [], []
    tokens = list(argv)
    if tokens and not tokens[0].startswith("-"):  # a first word belongs to the first parameter
        tokens = [f"--{next(iter(inspect.signature(run).parameters))}", *tokens]
    while tokens:
        name, value = _option(tokens.pop(0), hints)
        given = [] if value is None else [value]
        if name in hints and _is(hints[name], list):
            while tokens and not tokens[0].startswith("-"):
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
    return values[0] if written else json.dumps(values)


@cache
def _is(kind: typing.Any, wanted: type) -> bool:
    """Whether a type is ``wanted``, ``wanted[...]`` or either of them or None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is(part, wanted) for part in typing.get_args(kind))
    return kind is wanted or typing.get_origin(kind) is wanted


def _groups(kind: typing.Any) -> list[type]:
    """The dataclasses that a type is, or is a union of: groups of options."""
    return [part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)]
