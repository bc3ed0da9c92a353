"""Create a plug-in from an object, a shipped method's name, a YAML file, a saved folder or a hub repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import old_keys, renamed_text
from lit_prune.files.shipped import SUFFIXES, find_config
from lit_prune.files.yaml_files import NoMapping, read_yaml
from lit_prune.host.options import Frames, HostOptions, Positions, Proportional
from lit_prune.loading.locations import HUB_NAME, hub_options
from lit_prune.ops.budget import Budget, parse_budget
from lit_prune.plugin import SETTINGS, Plugin, unpruned
from lit_prune.plugin.reading import holds_model
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter

FULL = "full"  # the full model, as a method


@dataclass(frozen=True)
class MethodText:
    """A method in one line, as every command, YAML file and Python call writes it: `[NAME=]PATH[,PATH...][!][@BUDGET]`.

    PATH is `full`, the name of a shipped method, a YAML file, a plug-in folder or a repository of the hub,
    `OWNER/NAME[/SUBFOLDER][:REVISION]`. `!` leaves the repair adapter out, `@` gives a budget: `fastv@64`,
    `rcp!@11.1%`, `runs/a/plugin@2:64,8:16`. Where several methods are compared, NAME is a row's name, and several paths
    are trained runs of one method.
    """

    name: str
    paths: tuple[str, ...]
    repair: bool = True
    keep: Budget | None = None

    @classmethod
    def parse(cls, text: str, key: str = "method") -> "MethodText":
        """Read a line; raises `LitPruneError`, which names `key`, without a path or with an unreadable budget."""
        if Path(text).expanduser().exists():  # a name with these signs in it
            return cls("", (text,))
        rest, at, budget = text.rpartition("@")
        name, _, path = (rest if at else text).rpartition("=")
        repair, paths = not path.endswith("!"), tuple(path.removesuffix("!").split(","))
        if not all(paths):
            raise LitPruneError(f"{key} {text}: no method; write PATH or NAME=PATH, several paths as NAME=A,B,C")
        return cls(name, paths, repair, parse_budget(budget, f"{key} {text}") if at else None)

    @property
    def path(self) -> str:
        """The paths as they were written."""
        return ",".join(self.paths)

    def plugin(self, hub: dict[str, Any] | None = None) -> Plugin:
        """The plug-in of its one path; raises `LitPruneError` where there is none. `hub`: options of a repository."""
        plugin = unpruned() if self.paths == (FULL,) and not hub else _plugin(self.path, hub or {})
        plugin.repair = plugin.repair if self.repair else None
        plugin.keep = plugin.keep if self.keep is None else self.keep
        return plugin


def as_plugin(
    pruner: PruningMethod | Plugin | str | Path, repair: RepairAdapter | None = None, keep: Any = None, **hub: Any
) -> Plugin:
    """Create a `Plugin` from any way of naming a method.

    Args:
        pruner: an object, or a line that `MethodText` reads: `full`, the name of a shipped method (`fastv`), a YAML
            file, a folder written by `save_pretrained` or a repository of the hub (`OWNER/NAME`), each with `@BUDGET`
            and, to leave its repair adapter out, `!`.
        repair: repair adapter for a pruner object.
        keep: budget for a pruner object.
        hub: `revision`, `token`, `subfolder`, `cache_dir` of a plug-in's folder or repository.

    Raises:
        LitPruneError: no method of this name (the message lists the closest names), or the file can't be read.
    """
    hub = hub_options(hub, pruner if isinstance(pruner, str | Path) else type(pruner).__name__)
    if hub and isinstance(pruner, Plugin | PruningMethod):
        raise LitPruneError(f"{min(hub)} is an option of plug-ins on the hub, not of an object")
    if isinstance(pruner, Plugin):
        return pruner
    if isinstance(pruner, PruningMethod):
        return Plugin(pruner, repair, keep).eval()
    if not isinstance(pruner, str | Path) or not str(pruner):
        kind = f"the class {pruner.__name__}" if isinstance(pruner, type) else repr(pruner)
        raise LitPruneError(
            f"{kind} is no method: give a shipped method's name such as 'fastv', a YAML file, a plug-in folder, or a "
            f"Pruner object"
        )
    return MethodText.parse(str(pruner)).plugin(hub)


def _plugin(pruner: str, hub: dict[str, Any]) -> Plugin:
    """The plug-in of a shipped name, a YAML file, a folder or a repository."""
    folder = Path(pruner).expanduser()
    if folder.suffix not in SUFFIXES and (folder / hub.get("subfolder", "") / SETTINGS).is_file():
        return Plugin.from_pretrained(folder, **hub)
    try:
        file = find_config(pruner, "pruners")
    except LitPruneError:
        if folder.suffix in SUFFIXES or not (folder.is_dir() or "/" in str(pruner)):
            raise
        return Plugin.from_pretrained(folder if folder.is_dir() else pruner, **hub)
    if hub:
        raise LitPruneError(f"{min(hub)} is an option of plug-ins on the hub, and {pruner} is a method")
    return plugin_from_yaml(file)


def plugin_from_yaml(path: str | Path) -> Plugin:
    """Create an untrained plug-in from a file such as those in `configs/pruners/`, with the command line's parser."""
    try:
        model = read_yaml(path).get("model")
    except NoMapping:
        model = None
    if not isinstance(model, dict) or not model.get("pruner"):
        raise LitPruneError(f"{path} names no method: it needs `model: {{pruner: {{class_path: ...}}}}`")
    return plugin_of(model, str(path))


def plugin_of(model: dict[str, Any], source: str) -> Plugin:
    """Create an untrained plug-in from the fields of a YAML file's `model`; errors name their `source`."""
    from jsonargparse import ArgumentError, ArgumentParser

    if renamed := old_keys(model, "model"):
        raise LitPruneError(f"{source}: {renamed_text(renamed)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pruner", type=PruningMethod)
    parser.add_argument("--repair", type=RepairAdapter | None)
    parser.add_argument("--positions", type=Positions, default="original")
    parser.add_argument("--proportional_attention", type=Proportional, default="none")
    parser.add_argument("--frames", type=Frames, default="together")
    names = ("pruner", "repair", *vars(HostOptions()))
    try:
        chosen = {key: model[key] for key in names if model.get(key) is not None}
        built = parser.instantiate(parser.parse_object(chosen))
    except ArgumentError as error:
        raise LitPruneError(f"{source}: {error}") from error
    options = HostOptions(**{name: built[name] for name in vars(HostOptions())})
    keep = model.get("keep")
    budget = None if keep is None else parse_budget(keep, f"{source}: model.keep")
    return Plugin(built.pruner, built.get("repair"), budget, options=options).eval()


def plugin_in(place: Any, hub: dict[str, Any]) -> Plugin | None:
    """The plug-in in a local folder; None if it is no folder, or that of a model."""
    if not isinstance(place, str | Path):
        return None
    folder = Path(place).expanduser() / str(hub.get("subfolder") or "")
    return Plugin.from_pretrained(folder) if (folder / SETTINGS).is_file() and not holds_model(folder) else None


def plugin_on_hub(name: Any, hub: dict[str, Any]) -> Plugin | None:
    """The plug-in of a repository; None if no repository has the name, or it holds no plug-in."""
    if not isinstance(name, str) or HUB_NAME.fullmatch(name) is None or Path(name).expanduser().exists():
        return None
    try:
        return Plugin.from_pretrained(name, **hub)
    except LitPruneError:
        return None
