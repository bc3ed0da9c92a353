"""The content of configuration files, and of options that take a part of one, as nested mappings."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError, UsageError
from lit_prune.files.renamed import MODEL, old_keys, renamed_text
from lit_prune.files.shipped import closest_configs, meant
from lit_prune.files.yaml_files import ENDINGS, NoMapping, parse_yaml, read_yaml, shown

CLASS = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*")  # the name of a class, with or without its module
LARGEST_JSON = 1 << 20  # bytes of a configuration
LONGEST_NAME = 255  # of a file


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


def option_content(value: Any) -> dict[str, Any] | None:
    """The mapping that any other option's value gives: a file, inline text, or the bare name of a class; else None."""
    if not isinstance(value, str):
        return None
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


def check_content(content: dict[str, Any] | None, key: str, source: str) -> None:
    """Raise `UsageError` for a class_path that is no name, and for keys of version 0.1 that have another name today.

    Args:
        content: what a file or an option's value holds.
        key: the dotted key that it is for; empty for a whole configuration.
        source: the file or the option, for the message.
    """
    for place, spec in specs(content, key):
        if not isinstance(path := spec["class_path"], str):
            raise UsageError(f"{source}: `{place}.class_path` is {path!r}: write the full path, `package.module.Class`")
    whole = isinstance(content, dict) and MODEL in content  # a file of its own, as `--pruner` takes
    if found := old_keys(content, "" if whole else key):
        raise UsageError(f"{source}: {renamed_text(found)}")


def specs(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All mappings with a class_path in nested ones and in lists, each with its dotted key, outermost first."""
    if isinstance(node, list):
        for each in node:
            yield from specs(each, key)
    elif isinstance(node, dict):
        if "class_path" in node:
            yield key, node
        for name, value in node.items():
            yield from specs(value, f"{key}.{name}" if key else str(name))


def merged(old: Any, new: Any) -> Any:
    """Mappings merged key by key, except where a class is replaced by another; in a list the last one is meant.

    The value of a key with a plus, such as `callbacks+`, is appended to the list of that name.
    """
    if isinstance(old, list) and old and isinstance(new, dict) and "class_path" not in new:
        return [*old[:-1], merged(old[-1], new)]
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "class_path" in new and last_name(old.get("class_path")) != last_name(new["class_path"]):
        return new
    appended = {key: value for key, value in new.items() if str(key).endswith("+") and isinstance(value, list)}
    lists = {key[:-1]: [*(old.get(key[:-1]) or []), *value] for key, value in appended.items()}
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items() if key not in appended}, **lists}


def value_at(content: Any, key: str) -> Any:
    """The value at a dotted key, of the last one in a list; None where nothing is."""
    for part in key.split("."):
        content = content[-1] if isinstance(content, list) and content else content
        content = content.get(part) if isinstance(content, dict) else None
    return content[-1] if isinstance(content, list) and content else content


def leaves(content: Any, key: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    if not isinstance(content, dict):
        return {key: content}
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= leaves(value, f"{key}.{name}" if key else str(name))
    return found


def last_name(class_path: Any) -> str:
    """The last part of an import path: a class may be written with or without its module."""
    return str(class_path).rpartition(".")[2]


def _is_large_json(path: Path) -> bool:
    """True for instruction data, say: to parse a gigabyte as YAML takes an hour."""
    return path.suffix == ".json" and path.is_file() and path.stat().st_size > LARGEST_JSON


def _is_pipe(value: str) -> bool:
    try:
        return Path(value).is_fifo()
    except (OSError, ValueError):
        return False
