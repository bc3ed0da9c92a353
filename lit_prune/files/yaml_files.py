"""YAML files as mappings, checked before anything is built from them; budgets such as 2:30 stay text."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lit_prune.errors import LitPruneError

ENDINGS = (".yaml", ".yml", ".json")
MOST_BYTES = 1 << 20  # a configuration has a few thousand
MOST_NODES = 100_000  # with every alias expanded
PAIR = re.compile(r"\d+(?::[0-5]?\d)+", re.ASCII)  # what YAML 1.1 takes for a number to the base of 60
MERGE = "tag:yaml.org,2002:merge"


class NoMapping(LitPruneError):
    """Valid YAML that is no mapping: an empty file, a list, or a single value."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML (or JSON) file.

    Raises:
        LitPruneError: one line with the file's name: it is missing or no file, no UTF-8 text, empty, not valid YAML, no
            mapping of names, too large, or has a key twice.
    """
    return parse_yaml(_text(Path(path)), str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse the mapping in a text; `name`: its source, for messages. Raises as `read_yaml` does."""
    try:
        text = pairs_as_text(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise NoMapping(f"{name}: the file is empty")
        if _size(root, {}, name) > MOST_NODES:
            raise LitPruneError(f"{name}: its aliases expand to more than {MOST_NODES:,} values")
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise LitPruneError(f"{name}: not valid YAML: nested too deeply") from error
    except yaml.YAMLError as error:
        raise LitPruneError(f"{name}: not valid YAML: {_reason(error, text)}") from error
    except ValueError as error:  # a date or a number that Python doesn't take
        raise LitPruneError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        kind = {list: "a list", type(None): "nothing"}.get(type(content), "a single value")
        raise NoMapping(f"{name}: expected `key: value` lines, found {kind} at the top")
    if odd := [key for key in content if not isinstance(key, str) or not key]:
        raise LitPruneError(f"{name}: keys at the top are names, not {odd[0]!r}")
    return content


def pairs_as_text(text: str) -> str:
    """YAML loader that keeps `2:30` as text, which YAML 1.1 reads as a base-60 number, 150."""
    if not PAIR.search(text):
        return text
    try:
        tokens = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    except yaml.YAMLError:
        return text  # whoever loads it says what is wrong
    for token in reversed([token for token in tokens if token.plain and PAIR.fullmatch(token.value)]):
        text = f"{text[: token.start_mark.index]}'{token.value}'{text[token.end_mark.index :]}"
    return text


def shown(path: str | Path) -> str:
    """Make a name printable and short, for messages."""
    return shorten(repr(str(path))[1:-1], 200)


def shorten(text: str, most: int) -> str:
    """Truncate a text to at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise LitPruneError(f"{path} is a folder: give a YAML file")
        if not path.exists():
            raise LitPruneError(f"{shown(path)}: No such file")
        if path.is_char_device() or path.is_block_device():
            raise LitPruneError(f"{path} is a device: give a YAML file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise LitPruneError(f"{shown(path)} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MOST_BYTES:
        raise LitPruneError(f"{path}: larger than {MOST_BYTES >> 20} MiB: this is no configuration file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise LitPruneError(f"{path}: UTF-16 or UTF-32 text: save it as UTF-8") from error
        if b"\0" in data:
            raise LitPruneError(f"{path}: a binary file, no YAML text") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise LitPruneError(f"{path}: line {line} is not UTF-8 text: save the file as UTF-8") from error
    if "\0" in text:
        raise LitPruneError(f"{path}: a binary file or UTF-16 text, no YAML text in UTF-8")
    return text


def _size(node: yaml.Node, known: dict[int, int | None], name: str) -> int:
    """Expand aliases below a node, visiting each node once; rejects repeated keys and loops."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] is None:
            raise LitPruneError(f"{name}, line {node.start_mark.line + 1}: an alias that refers to itself")
        return known[id(node)]
    known[id(node)] = None
    children = node.value
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node, name)
        children = [part for pair in node.value for part in pair]
    known[id(node)] = size = 1 + sum(_size(child, known, name) for child in children)
    return size


def _refuse_repeated(node: yaml.MappingNode, name: str) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise LitPruneError(f"{name}, line {key.start_mark.line + 1}: the key `{key.value}` is there twice")
            seen.add((key.tag, key.value))


def _reason(error: yaml.YAMLError, text: str) -> str:
    """Format PyYAML's error in one line, with the line number."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the control character #x{error.character:02x}"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    lines = text.splitlines()
    if mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
        return f"line {mark.line + 1}: a tab; indent with spaces"
    problem = error.problem
    if "could not determine a constructor" in problem:
        problem = f"the tag {problem.rpartition('tag ')[2]} is not allowed"
    return f"line {mark.line + 1}: {', '.join(filter(None, [error.context, problem]))}"
