"""Configuration files that override others: a newly chosen class starts from its own defaults.

jsonargparse keeps equally named ``init_args`` of the old class when a later file or option swaps a ``class_path``: a
budget or a list of layers meant for one method would silently serve another. So the key is set to null first.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError, UsageError
from lit_prune.files.renamed import MODEL, old_keys, renamed_text
from lit_prune.files.shipped import closest_configs, config_or_text, meant
from lit_prune.files.yaml_files import ENDINGS, NoMapping, parse_yaml, read_yaml, shown

CONFIG = ("-c", "--config")
CLASS = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*")  # the name of a class, with or without its module
LARGEST_JSON = 1 << 20  # bytes of a configuration
LONGEST_NAME = 255  # of a file


def with_resets(args: list[str], chosen: dict[str, str]) -> list[str]:
    """The same command line with a reset before every file or option that swaps a class.

    Args:
        args: The arguments after the verb.
        chosen: Classes chosen by default, by dotted key.

    Raises:
        UsageError: a file that can't be read; the message names it.
    """
    chosen = dict(chosen)
    result = []
    for option, value, written in _options(args):
        found = {}
        with suppress(UsageError):  # `check_files` has said so, or will
            found = _classes(option, value)
        # A bare word is a class where one is set already; elsewhere it may be anything, such as a model's name.
        found = {key: name for key, name in found.items() if "." in name or key in chosen}
        for key in _swapped(found, chosen):
            result.append(f"--config={json.dumps(_nested(key))}" if option in CONFIG else f"--{key}=null")
            chosen = {k: v for k, v in chosen.items() if not k.startswith(f"{key}.")}
        chosen.update(found)
        result += written
    return result


def check_files(args: list[str], every_option: bool = True) -> None:
    """Raise a `UsageError` for the first configuration file, or inline text, of a command line that can't be used.

    It can't be read, or has keys of version 0.1 that have another name today.

    Args:
        args: The arguments after the verb.
        every_option: Any option may be given a configuration file of its part, as those of LightningCLI may.
    """
    for option, value, _ in _options(args):
        if not every_option and option not in CONFIG:
            continue
        _classes(option, value)
        content, key = _content(option, value)
        whole = isinstance(content, dict) and MODEL in content  # a file of its own, as `--pruner` takes
        if found := old_keys(content, "" if whole else key):
            written = value.startswith("{") or "\n" in value
            raise UsageError(f"{option if written else value}: {renamed_text(found)}")


def _classes(option: str, value: str | None) -> dict[str, str]:
    """The classes that one option chooses, by dotted key."""
    content, key = _content(option, value)
    return dict(_class_paths(content, key, file=value if option in CONFIG and value else ""))


def _content(option: str, value: str | None) -> tuple[Any, str]:
    """What one option's value holds where it is a mapping or the name of a class, and the dotted key it is for."""
    if option in CONFIG and value is not None:
        return config_content(value), ""
    return (_option_content(value), _key(option)) if value and _key(option) else (None, "")


def with_shipped(args: list[str]) -> list[str]:
    """The same command line with configuration files looked up: those that aren't here come with the package."""
    result: list[str] = []
    for option, value, written in _options(args):
        if option in CONFIG and value is not None:
            written = [f"{option}={config_or_text(value)}"] if len(written) == 1 else [option, config_or_text(value)]
        result += written
    return result


def classes_in(files: Iterable[str]) -> dict[str, str]:
    """The classes that files choose, by dotted key; the later file wins."""
    return {key: found for file in files for key, found in _class_paths(config_content(file))}


def config_files(args: list[str]) -> list[str]:
    """The configuration files of a command line, in order."""
    return [value for option, value, _ in _options(args) if option in CONFIG and value is not None]


def _options(args: list[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Each option with its value (None: there is none) and the words it is written in."""
    tokens = list(args)
    while tokens:
        word = tokens.pop(0)
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            yield word, None, [word]
        elif word.startswith("-c") and word[2:3] not in ("", "="):  # -cFILE
            yield "-c", word[2:], [word]
        elif equals:
            yield option, value, [word]
        elif tokens and not tokens[0].startswith("-"):
            yield option, tokens[0], [word, tokens.pop(0)]
        else:
            yield option, None, [word]


def _key(option: str) -> str:
    return option.removeprefix("--").removesuffix(".class_path") if option.startswith("--") else ""


def config_content(value: str) -> dict[str, Any] | None:
    """The mapping that a value of ``--config`` gives: a file or inline text; None where only the parser can read it.

    Raises:
        UsageError: it can't be read; the message names the file.
    """
    try:
        if "://" in value or _is_pipe(value):  # a remote file; a pipe can be read once only
            return None
        if value.startswith("{") or "\n" in value:
            return parse_yaml(value, "--config")
        if len(value) < LONGEST_NAME and not Path(value).exists():
            raise UsageError(f"no configuration file `{shown(value)}`{meant(closest_configs(value))}")
        return read_yaml(value)
    except LitPruneError as error:
        raise UsageError(str(error)) from error


def _option_content(value: str) -> Any:
    """The mapping that an option's value gives: a configuration file, inline text, or the bare name of a class."""
    if CLASS.fullmatch(value):
        return {"class_path": value}
    if value.endswith(ENDINGS) and "://" not in value and len(value) < LONGEST_NAME and Path(value).exists():
        try:
            return None if _is_large_json(Path(value)) else read_yaml(value)
        except NoMapping:  # a list of callbacks, say
            return None
        except LitPruneError as error:
            if value.endswith(".json"):  # data rather, of any size
                return None
            raise UsageError(str(error)) from error
    with suppress(LitPruneError):  # any other value is the parser's affair
        return parse_yaml(value, "") if value.startswith("{") else None


def _is_large_json(path: Path) -> bool:
    """True for instruction data, say: to parse a gigabyte as YAML takes an hour."""
    return path.suffix == ".json" and path.is_file() and path.stat().st_size > LARGEST_JSON


def _is_pipe(value: str) -> bool:
    try:
        return Path(value).is_fifo()
    except (OSError, ValueError):
        return False


def _class_paths(node: Any, key: str = "", file: str = "") -> Iterator[tuple[str, str]]:
    """All (dotted key, class_path) of nested mappings, outermost first."""
    if not isinstance(node, dict):
        return
    if "class_path" in node:
        if not isinstance(node["class_path"], str):
            where = f"{file}: `{key}.class_path`" if file else f"`{key}.class_path`"
            raise UsageError(f"{where} is {node['class_path']!r}: write the full path, `package.module.Class`")
        yield key, node["class_path"]
    for name, value in node.items():
        yield from _class_paths(value, f"{key}.{name}" if key else str(name), file)


def _swapped(found: dict[str, str], chosen: dict[str, str]) -> list[str]:
    """Keys whose class changes, without those inside another."""
    keys = [k for k, v in found.items() if k in chosen and chosen[k].rpartition(".")[2] != v.rpartition(".")[2]]
    return [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]


def _nested(key: str) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nested(rest) if rest else None}
