"""What the stand-ins for Slurm's commands share: which options there are, and what their values look like."""

import re
import shlex
import sys
from pathlib import Path

NUMBER, NAME, TIME = r"\d+", r"[\w.%:/-]+", r"(\d+-)?\d+(:\d\d){0,2}"
OPTIONS = {
    "account": NAME,
    "array": r"[\d,:-]+(%\d+)?",
    "cpus-per-task": NUMBER,
    "gpus-per-node": rf"({NAME}:)?{NUMBER}",
    "job-name": NAME,
    "kill-on-bad-exit": r"[01]",
    "mem": r"\d+[KMGT]?",
    "nodes": r"\d+(-\d+)?",
    "ntasks": NUMBER,
    "ntasks-per-node": NUMBER,
    "open-mode": r"append|truncate",
    "output": r"[\w.%/-]+",
    "partition": NAME,
    "requeue": None,
    "signal": r"([BR]{1,2}:)?(SIG)?[A-Z]+\d?@\d+",
    "time": TIME,
}


def refuse(message: str) -> None:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def option(word: str) -> tuple[str, str]:
    """Name and value of one `--name=value`, or an error as Slurm would give it."""
    name, _, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or name not in OPTIONS:
        refuse(f"unrecognized option '{word}'")
    if (OPTIONS[name] is None) != (not value) or (value and not re.fullmatch(OPTIONS[name], value)):
        refuse(f"invalid value for --{name}: '{value}'")
    return name, value


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines, all of which must stand before the first command."""
    found, commands = {}, False
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            if commands:
                refuse(f"'{line}' stands behind the first command, where Slurm doesn't see it")
            found |= dict(option(word) for word in shlex.split(line.removeprefix("#SBATCH")))
        commands = commands or bool(line.strip() and not line.startswith("#"))
    return found
