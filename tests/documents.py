"""Code blocks of the documents, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tiny import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "jobs" / "README.md", ROOT / "lit_prune" / "micro" / "weights" / "README.md"]
FENCE = "```"
NOT_RUN = re.compile(r"<!-- not run here: (.+) -->")
FILE = re.compile(r"# ((?:lit_prune|configs)/\S+\.(?:py|yaml))\n")
PROGRAMS = ("lit-prune", "lightning")
OPERATORS = frozenset(["&&", "||", ";", "|", "&", "(", ")", "{", "}", ">", ">>", "<", "<<"])


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, and the line of its fence.

    `reason` is why it isn't run, from the comment before the fence: `<!-- not run here: REASON -->`. `file` is the path
    in the repository that its first line names: such a block is the content of that file.
    """

    document: Path
    line: int
    language: str
    text: str
    reason: str | None = None

    @property
    def file(self) -> str | None:
        found = FILE.match(self.text)
        return found[1] if found and self.language in ("python", "yaml") else None

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


@cache
def blocks(document: Path) -> tuple[Block, ...]:
    """The blocks of a document, in order; raises `ValueError` for one that has no end."""
    return tuple(_blocks(document, document.read_text(encoding="utf-8").splitlines(keepends=True)))


def _blocks(document: Path, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        if lines[number].startswith(FENCE):
            language = lines[number].removeprefix(FENCE).strip()
            end = lines.index(f"{FENCE}\n", number + 1)
            reason = NOT_RUN.fullmatch(lines[number - 1].strip()) if number else None
            text = "".join(lines[number + 1 : end])
            yield Block(document, number + 1, language, text, reason[1] if reason else None)
            number = end
        number += 1


def commands(text: str) -> list[list[str]]:
    """The commands of a shell text, each as its words: quotes and comments removed, continued lines joined."""
    text = re.sub(r"cat >\S+ <<(\w+)\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, ""
        command: list[str] = []
        for word in words:
            if word.startswith("#"):
                break
            if word in OPERATORS:
                found.append(command)
                command = []
            else:
                command.append(word)
        found.append(command)
    return [command for command in found if command]


def ours(command: list[str]) -> list[str] | None:
    """The part of a command that starts with one of this project's programs; None for other commands."""
    place = next((i for i, word in enumerate(command) if word in PROGRAMS), None)
    return None if place is None else command[place:]


def heredocs(text: str) -> dict[str, str]:
    """Files that a shell text writes by `cat >FILE <<END`."""
    found = re.findall(r"cat >(\S+) <<(\w+)\n(.*?)^\2$", text, re.DOTALL | re.MULTILINE)
    return {path: body for path, _, body in found}


def spans(document: Path) -> list[str]:
    """Commands of this project with options or arguments in the running text, between backticks."""
    text = document.read_text(encoding="utf-8")
    for block in blocks(document):
        text = text.replace(block.text, "")
    quoted = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    return [span for span in quoted if re.match(rf"(?:{'|'.join(PROGRAMS)}) [a-z]+ \S", span)]
