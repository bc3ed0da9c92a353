"""Entry point: ``lightning``, ``lit-prune`` and ``python -m lit_prune`` all call `main`.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI (`lit_prune.commands.trainer`); every other verb is a
module of `lit_prune.commands`. Nothing heavy is imported before the verb is known, so ``--help`` is fast.
"""

import ast
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from pathlib import Path

from lit_prune.commands import LIGHTNING_VERBS
from lit_prune.errors import LitPruneError, UsageError, extra, one_line

EXAMPLES = (
    "lit-prune sample --out sample",
    'lit-prune generate --image sample/0.png --prompt "What colour is the tile?" --pruner divprune --keep 16',
    "lit-prune configs list pruners",
    "lightning fit -c micro.yaml --trainer.max_steps 100",
    "lightning test -c micro.yaml -c pruners/fastv.yaml",
)
DISTRIBUTION = "lit-prune"
TRAIN = ("lightning", "deepspeed", "wandb")  # packages of the extra `train`
WANDB_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # the new and the old name of W&B's own server
USAGE, FAILURE, INTERRUPTED = 2, 1, 130
LONGEST = 400  # characters of another library's message
LOGGING = ("lightning.pytorch.core", "lightning.pytorch.trainer.connectors.logger_connector")
CONFIGURED = (  # parts of libraries that run what a configuration names
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "profilers", "tuner", "accelerators")),
    *(f"lightning.pytorch.trainer.connectors.{part}_connector" for part in ("accelerator", "callback", "signal")),
    "jsonargparse",
)


def main(args: list[str] | None = None) -> None:
    """Run one verb. User errors are printed as one message; with ``--debug`` anywhere, as a traceback."""
    argv = sys.argv[1:] if args is None else [str(a) for a in args]
    debug = "--debug" in argv or os.environ.get("LIT_PRUNE_DEBUG", "0") not in ("", "0")
    with _command_line(args, argv):
        try:
            _dispatch([a for a in argv if a != "--debug"])
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            code = _report(error, debug)
            if code is None:
                raise
            sys.exit(code)


@contextmanager
def _command_line(args: list[str] | None, argv: list[str]) -> Iterator[None]:
    """Make ``sys.argv`` the command that runs: Lightning relaunches it for further processes."""
    before = sys.argv
    sys.argv = before if args is None else [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def _dispatch(argv: list[str]) -> None:
    """Hand the arguments to the verb's own parser."""
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("--help", "-h", "help"):
        print(_help())
    elif verb == "--version":
        print(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
    elif verb in LIGHTNING_VERBS:
        _quiet()
        importlib.import_module("lit_prune.commands.trainer").PruneCLI(verb, rest)
    elif verb in (known := verbs()):
        _quiet()
        importlib.import_module("lit_prune.commands._support.options").run_verb(verb, rest)
    elif not _other_lightning(argv):
        close = difflib.get_close_matches(verb, [*LIGHTNING_VERBS, *known], n=3)
        meant = f"; did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
        raise UsageError(f"unknown verb `{verb}`{meant} (`{_program()} --help` lists the verbs)")


def verbs() -> dict[str, str]:
    """The verbs that Lightning has not, each with its line of help, read from the sources of `lit_prune.commands`."""
    found = {}
    for path in sorted((Path(__file__).parent / "commands").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\ndef run(" in source:
            doc = ast.get_docstring(ast.parse(source)) or ""
            found[path.stem.replace("_", "-")] = doc.partition("\n")[0]
    return found


def _help() -> str:
    rows = [f"  {verb:<10} {line}" for verb, line in [*LIGHTNING_VERBS.items(), *verbs().items()]]
    return "\n".join(
        [
            f"usage: {_program()} VERB [options]    (`lightning`, `lit-prune` and `python -m lit_prune` are one)",
            "",
            "Visual-token pruning for large vision-language models.",
            "",
            "verbs:",
            *rows,
            "",
            "examples:",
            *(f"  {line}" for line in EXAMPLES),
            "",
            "options:",
            f"  -h, --help    this text; `{_program()} VERB --help` for a verb's options",
            "  --version     print the version",
            "  --debug       show tracebacks (or set LIT_PRUNE_DEBUG=1)",
        ]
    )


def _program() -> str:
    return "lightning" if Path(sys.argv[0]).stem == "lightning" else DISTRIBUTION


def _other_lightning(argv: list[str]) -> bool:
    """Hand a verb that is not ours to another distribution's `lightning` command, if one is installed."""
    if _program() != "lightning":
        return False
    for point in entry_points(group="console_scripts", name="lightning"):
        if point.dist is not None and point.dist.name != DISTRIBUTION:
            sys.argv = [sys.argv[0], *argv]
            sys.exit(point.load()())
    return False


def _quiet() -> None:
    """Defaults of the environment: no account needed, no noise. What the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "WANDB_MODE" not in os.environ and not _wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    if os.environ.get("WANDB_MODE") == "offline":  # a run's last lines say where its files are
        os.environ.setdefault("WANDB_SILENT", "true")


def _wandb_key() -> bool:
    """True if Weights & Biases can log in without a prompt."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = os.environ.get("WANDB_BASE_URL", WANDB_HOSTS[0]).rstrip("/").rpartition("/")[2]
    hosts = WANDB_HOSTS if host in WANDB_HOSTS else (host,)
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    paths = [Path(name).expanduser() for name in files if name]
    known = "".join(path.read_text(errors="ignore") for path in paths if path.is_file())
    return any(host in known for host in hosts)


def _report(error: BaseException, debug: bool) -> int | None:
    """Print a user error and return the exit code; None: leave the error to Python."""
    if isinstance(error, SystemExit):
        return INTERRUPTED if isinstance(error.__context__, KeyboardInterrupt) else None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if debug:
        return None
    if isinstance(error, BrokenPipeError):  # `lit-prune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    known = _users(error)
    if known is None:
        return None
    print(f"{_rank()}error: {one_line(str(known)) or type(known).__name__}", file=sys.stderr)
    return USAGE if isinstance(known, UsageError) else FAILURE


def _rank() -> str:
    """Prefix of messages of a process, as in Lightning; empty for rank zero."""
    if sys.modules.get("lightning") is None:
        return ""
    from lightning.pytorch.utilities import rank_zero_only

    rank = getattr(rank_zero_only, "rank", None)
    return f"[rank: {rank}] " if rank else ""


def _users(error: BaseException) -> BaseException | None:
    """The bad input, missing file or wrong setting that caused an error; None for a bug in the program."""
    if isinstance(error, UsageError | LitPruneError | OSError):
        return error
    cause = error.__cause__  # jsonargparse wraps what a constructor raises
    while cause is not None:
        if isinstance(cause, LitPruneError):
            return cause
        cause = cause.__cause__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN:
        return LitPruneError(f"this verb needs {error.name}, which is not installed: {extra('train')}")
    if type(error).__name__ == "MisconfigurationException" or _refused(error):
        return LitPruneError(_in_short(error))
    if type(error).__name__ == "OutOfMemoryError":
        return LitPruneError(f"{_in_short(error)} Smaller batches, or model.checkpoint_activations=true, take less")
    if type(error).__module__.startswith("wandb.errors"):
        said = str(error).partition("\n")[0]  # advice for programmers follows
        return LitPruneError(f"Weights & Biases: {said} (WANDB_MODE=offline runs without it)")
    return None


def _refused(error: BaseException) -> bool:
    """Return whether a library refused a setting: an argument of a callback, an option of the Trainer, a device.

    That is so if a line of Lightning raised the exception (but for its logging, which only code calls), or if it came
    up below a part of Lightning that only a configuration brings in, or below the parser that makes a configuration's
    objects. Anything that code of this project raised, or a training step, is a fault of the program.
    """
    if not isinstance(error, Exception):
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [name for name in frames if name.startswith(("lit_prune.", "lightning.", "jsonargparse."))]
    if not known or known[-1].startswith("lit_prune."):
        return False
    worded = isinstance(error, ValueError | TypeError | RuntimeError | AttributeError | ImportError | AssertionError)
    return known[-1].startswith(CONFIGURED) or (
        worded and frames[-1].startswith("lightning.") and not frames[-1].startswith(LOGGING)
    )


def _in_short(error: BaseException) -> str:
    """Shorten a library's message to one line, with the error's name if the message may be uninformative."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | ArithmeticError | AttributeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (--debug shows all)"
