"""A class chosen anew starts from its own defaults.

jsonargparse keeps equally named ``init_args`` of the old class when a later file or option swaps a ``class_path``: a
budget or a list of layers meant for one method would silently serve another. So the key is set to null first.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_prune.shipped import config_or_text

CONFIG = ("-c", "--config")


def with_resets(args: list[str], chosen: dict[str, str]) -> list[str]:
    """The same command line with a reset before every file or option that swaps a class.

    Args:
        args: The arguments after the verb.
        chosen: Classes chosen by default, by dotted key.
    """
    chosen = dict(chosen)
    result = []
    for option, value, written in _options(args):
        if option in CONFIG and value is not None:
            found = dict(_class_paths(_load(value)))
        else:
            found = dict(_class_paths(_load(value, as_class=True), _key(option))) if value and _key(option) else {}
        for key in _swapped(found, chosen):
            result.append(f"--config={json.dumps(_nested(key))}" if option in CONFIG else f"--{key}=null")
            chosen = {k: v for k, v in chosen.items() if not k.startswith(f"{key}.")}
        chosen.update(found)
        result += written
    return result


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
    return {key: found for file in files for key, found in _class_paths(_load(file))}


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
        elif equals:
            yield option, value, [word]
        elif tokens and not tokens[0].startswith("-"):
            yield option, tokens[0], [word, tokens.pop(0)]
        else:
            yield option, None, [word]


def _key(option: str) -> str:
    return option.removeprefix("--").removesuffix(".class_path") if option.startswith("--") else ""


def _load(value: str, as_class: bool = False) -> Any:
    """A file's or an inline text's content; a bare word may be a class. What cannot be read is the parser's affair."""
    try:
        path = Path(value)
        node = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return {"class_path": node} if as_class and isinstance(node, str) else node


def _class_paths(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All (dotted key, class_path) of nested mappings, outermost first."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("class_path"), str):
        yield key, node["class_path"]
    for name, value in node.items():
        yield from _class_paths(value, f"{key}.{name}" if key else str(name))


def _swapped(found: dict[str, str], chosen: dict[str, str]) -> list[str]:
    """Keys whose class changes, without those inside another."""
    keys = [k for k, v in found.items() if k in chosen and chosen[k].rpartition(".")[2] != v.rpartition(".")[2]]
    return [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]


def _nested(key: str) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nested(rest) if rest else None}
