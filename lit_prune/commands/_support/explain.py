"""Turn a parser's complaint into one line that names the key, the file and the closest right key."""

import ast
import difflib
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from omegaconf.errors import GrammarParseError

from lit_prune.commands._support.overlays import classes_in, config_content
from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import MODEL, RENAMED, names_of
from lit_prune.files.yaml_files import ENDINGS, shorten

LONGEST = 400  # characters of a message
SPEC = ["class_path", "init_args", "dict_kwargs"]
UNKNOWN = re.compile(r"(?:does not accept option '([^']+)')|(?:Option '([^']+)' is not accepted)")
NO_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s+(.*(?:has no attribute|No module|not a subclass).*)")
NOT_MEANT = re.compile(r"- (Expected an? |Not a valid subclass|Not of type )")
NOISE = re.compile(r"^(- )?(Does not validate|Subtypes:|Errors:|Expected a <class 'None|Problem with|Given value)")


def explain(message: str, parser: ArgumentParser, files: Iterable[str] = ()) -> str:
    """Shorten a parser's message; name the file at fault and, for a misspelt key, the closest right one.

    Args:
        message: What jsonargparse says.
        parser: The parser whose keys are the right ones.
        files: The configuration files that were read.
    """
    files = [file for file in files if file.endswith(ENDINGS)]
    text = shorten(_explained(message, parser, files), LONGEST)
    return text if "`" in text or "--" in text or not files else f"{files[-1]}: {text}"


def explain_refused(error: Exception) -> str | None:
    """One line for what a constructor refused while a configuration's objects were made; None for anything else.

    None too where a constructor of ours refused it, whose own error says it best.
    """
    cause, message = error.__cause__, str(error)
    while cause is not None:
        if isinstance(cause, LitPruneError):
            return None
        cause = cause.__cause__
    if "Does not validate against any of the Union subtypes" not in message:
        return None
    failed = re.search(r"Namespace\(class_path='[\w.]*?(\w+)'", message)  # those before it in a list were made
    reason = " ".join(_likeliest(message).replace("- ", "", 1).split())
    reason = re.sub(r"Problem with given class_path '[^']*': ", "", reason)
    return shorten(f"`{failed[1]}`: {reason}" if failed else reason, LONGEST)


def _likeliest(message: str) -> str:
    """A message without the alternatives of a union that were not meant: of a class given, what is wrong with it."""
    lines = message.splitlines()
    if "Errors:" not in (stripped := [line.strip() for line in lines]):
        return message
    start = stripped.index("Errors:")
    margin = lines[start].index("Errors:") + 2
    found: list[list[str]] = []
    for line in lines[start + 1 :]:
        if line.strip() and not line.startswith(" " * margin):
            break
        if line[margin : margin + 2] == "- ":
            found.append([])
        if found:
            found[-1].append(line)
    items = ["\n".join(item) for item in found if not NOT_MEANT.match(item[0].strip())]
    best = max(items, key=lambda item: ("given class_path" in item, "is not accepted" not in item), default="")
    if not best:
        return message
    before = [line for line in lines[:start] if "Parser key" in line or "given class_path" in line]
    return "\n".join([*before, _likeliest(best)])


def _explained(message: str, parser: ArgumentParser, files: list[str]) -> str:
    message = _likeliest(message)
    if match := re.search(r"'[\w.]*?(\w+)':\s+the following arguments are required: (.*)", message):
        place = _place(message)[0].removesuffix(".init_args")
        return f"`{place}`: {match[1]} needs {', '.join(f'`{name}`' for name in match[2].split(', '))}"
    if message.startswith("unrecognized arguments:"):
        return _unrecognised(message, parser, files)
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"give {', '.join(f'--{_without_verb(name, parser)}' for name in match[1].split(', '))}"
    if match := re.search(r'Key "([\w.]+)\.\w+" not found in namespace', message):
        return f"`{match[1]}`: expected the `key: value` lines of its options"
    if match := re.search(r"Parser key \"([\w.]+)\":\s+Unable to load config '(.*)'", message):
        return f"`{match[1]}`: expected the `key: value` lines of its options, got {match[2]}"
    if match := UNKNOWN.search(message):
        return _unknown_key(message, match[1] or match[2], parser, files)
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        at = f"`{place}`: " if (place := _place(message)[0]) else ""  # none for `--data.help`
        return f"{at}no class `{match[1]}`; write its full path, `package.module.Class`"
    if match := NO_CLASS.search(message):
        return _bad_class(message, match[1], match[2])
    if "Not a valid subclass" in message and (match := re.search(r"Given value: (\{.*\})", message)):
        return _bad_spec(message, match[1], files)
    return _condense(message)


def explain_interpolation(error: Exception, parser: ArgumentParser, files: Iterable[str] = ()) -> str:
    """One line for a ``${...}`` that leads nowhere."""
    text = str(error)
    wanted = re.search(r"resolved to '([^']+)'", text) or re.search(r"key '([^']+)' not found", text)
    place = re.search(r"full_key: (\S+)", text)
    at = f"`{_without_verb(place[1], parser)}`: " if place else ""
    if isinstance(error, GrammarParseError):
        return f"{at}not a valid interpolation; `${{key}}` stands for another key's value"
    if wanted is None:
        return at + text.partition("\n")[0]
    key = _as_written(_without_verb(wanted[1], parser), files)
    return f"{at}nothing is at `${{{key}}}`{_renamed(key, files) or _meant(closest(key, keys_of(parser, files)))}"


def explain_unexpected(error: Exception) -> str:
    """One line for an error that the parser did not foresee."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"the configuration can't be read: {type(error).__name__}{text and ': '}{text} (--debug shows where)"


def keys_of(parser: ArgumentParser, files: Iterable[str] = ()) -> list[str]:
    """The dotted keys that a parser knows, with those of the classes that the files choose."""
    names = {option.lstrip("-") for option in parser._option_string_actions if option.startswith("--")}
    nested = {f"{key}.init_args.{name}" for key, path in classes_in(files).items() for name in _parameters(path)}
    return sorted(name for name in names | nested if not name.endswith(("help", "+", "print_config")))


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


def _meant(key: str | None) -> str:
    return f"; did you mean `{key}`?" if key else ""


def _renamed(key: str, files: Iterable[str], dashes: str = "") -> str:
    """The end of a message that gives today's name of a key of version 0.1; empty for any other key."""
    parent, _, name = key.rpartition(".")
    path = classes_in(files).get(parent.removesuffix(".init_args"))
    new = (RENAMED["PruneModule"] if parent == MODEL else names_of(path)).get(name)
    return f"; it is `{dashes}{parent}.{new}` now" if new else ""


def _without_verb(key: str, parser: ArgumentParser) -> str:
    first, _, rest = key.partition(".")
    return rest if rest and first not in {k.partition(".")[0] for k in keys_of(parser)} else key


def _as_written(key: str, files: Iterable[str]) -> str:
    """A key of an interpolation in full, as a file has it: OmegaConf before 2.4 names the last part alone."""
    texts = (Path(file).read_text(errors="replace") for file in files if Path(file).is_file())
    found = (re.search(rf"\$\{{([\w.]*\b{re.escape(key)})\}}", text) for text in texts)
    return next((match[1] for match in found if match), key)


def _unrecognised(message: str, parser: ArgumentParser, files: list[str]) -> str:
    tokens = message.partition(":")[2].split()
    option = next((t for t in tokens if t.startswith("-")), None)
    if option is None:
        return f"unexpected argument `{tokens[0]}`"
    key = option.lstrip("-").partition("=")[0]
    found = closest(key, keys_of(parser, files))
    return f"unknown option `--{key}`{_renamed(key, files, '--') or _meant(found and '--' + found)}"


def _unknown_key(message: str, key: str, parser: ArgumentParser, files: list[str]) -> str:
    """A key that a parser or the class chosen by a class_path does not have."""
    place, class_path = _place(message[: message.index(f"'{key}'")])
    if class_path is None:
        hint = _renamed(key, files) or _meant(closest(key, keys_of(parser, files)))
        return f"{_file_with(key, files)}unknown key `{key}`{hint}"
    known = _parameters(class_path)
    head, _, tail = key.partition(".")
    if tail and head not in known and (spec := closest(head, SPEC)):  # `init_arg:` for `init_args:`
        full = f"{place.removesuffix('.init_args')}.{head}"
        return f"{_file_with(full, files)}unknown key `{full}`; did you mean `{spec}`?"
    if new := names_of(class_path).get(key):
        return f"{_file_with(f'{place}.{key}', files)}unknown key `{place}.{key}` of {class_path}; it is `{new}` now"
    found = closest(key, known) or closest(key, SPEC)
    takes = "" if found else f"; it takes {', '.join(known) or 'no arguments'}"
    full = f"{place}.{key}"
    return f"{_file_with(full, files)}unknown key `{full}` of {class_path}{_meant(found)}{takes}"


def _bad_class(message: str, class_path: str, reason: str) -> str:
    place, _ = _place(message[: message.index(class_path)])
    module, _, name = class_path.rpartition(".")
    try:
        names = [n for n, value in vars(importlib.import_module(module)).items() if isinstance(value, type)]
    except (ImportError, ValueError):
        names = []
    found = closest(name, names)
    return f"`{place}`: no class `{class_path}` ({reason.strip()}){_meant(found and f'{module}.{found}')}"


def _bad_spec(message: str, given: str, files: list[str]) -> str:
    """A mapping that should hold class_path and init_args and does not."""
    place, _ = _place(message)
    try:
        wrong = [key for key in ast.literal_eval(given) if key not in SPEC]
    except (ValueError, SyntaxError):
        wrong = []
    if not wrong:
        return f"`{place}` wants `class_path` and `init_args`, got {given}"
    full = f"{place}.{wrong[0]}"
    return f"{_file_with(full, files)}unknown key `{full}`{_meant(closest(wrong[0], SPEC))}"


def _place(message: str) -> tuple[str, str | None]:
    """Where a nested message points: dotted key and the innermost class."""
    parts: list[str] = []
    class_path = None
    for line in message.splitlines():
        if match := re.search(r'Parser key "([^"]+)"', line):
            parts.append(match[1])
        elif match := re.search(r"Problem with given class_path '([^']+)'", line):
            class_path = match[1]
            parts.append("init_args")
    return ".".join(parts), class_path


def _parameters(class_path: str) -> list[str]:
    """The arguments of a class, as the parser sees them."""
    module, _, name = class_path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
        added = ArgumentParser(exit_on_error=False).add_class_arguments(found, "x", fail_untyped=False)
    except Exception:  # a suggestion must never hide the message it belongs to
        return []
    return [key.removeprefix("x.") for key in added]


def _file_with(key: str, files: list[str]) -> str:
    """The last file that holds a dotted key, as the beginning of a message."""
    for file in reversed(files):
        node: Any = config_content(file)
        for part in key.split("."):
            node = node.get(part, KeyError) if isinstance(node, dict) else KeyError
        if node is not KeyError:
            return f"{file}: "
    return ""


def _condense(message: str) -> str:
    """Drop what a reader cannot use; keep the whole message where it is not understood."""
    lines = [line.strip() for line in message.splitlines()]
    reasons = [r for r in lines if r and not NOISE.match(r) and not r.startswith("Parser key")]
    place, _ = _place(message)
    found = re.fullmatch(r"(?:- )?Expected an? (.*)\. Got value: (.*)", reasons[0]) if len(reasons) == 1 else None
    if place and found:
        return f"`{place}`: expected {_plain(found[1])}, got {found[2] or 'nothing'}"
    given = re.search(r"Given value: (.*)", message)
    kinds = [found[1] for r in reasons if (found := re.fullmatch(r"(?:- )?Expected an? (.*)", r))]
    if place and given and kinds and len(kinds) == len(reasons):
        return f"`{place}`: expected {', or '.join(_plain(kind) for kind in kinds)}, got {given[1]}"
    if place and given and (subtypes := re.search(r"Subtypes: \[(.*)\]$", message, re.MULTILINE)):
        names = [_plain(re.sub(r"\b(\w+\.)+(\w+)", r"\2", kind)) for kind in _split(subtypes[1])]
        return f"`{place}`: expected {', or '.join(names)}, got {given[1]}"
    text = " ".join(_plain(reason) for reason in reasons) or message.strip()
    return f"`{place}`: {text}" if place else text


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    return re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text.replace(", ", ","))


def _plain(reason: str) -> str:
    """Types as people write them."""
    reason = re.sub(r"<class '([^']*)'>", r"\1", reason)
    return reason.replace("typing.", "").replace("Literal", "one of ").replace("NoneType", "null").removeprefix("- ")
