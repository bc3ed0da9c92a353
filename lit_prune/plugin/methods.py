"""Create a plug-in from an object, a shipped method's name, a YAML file, a saved folder or a hub repository."""

from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import old_keys, renamed_text
from lit_prune.files.shipped import SUFFIXES, find_config
from lit_prune.files.yaml_files import NoMapping, read_yaml
from lit_prune.host.options import HostOptions, Positions, Proportional
from lit_prune.ops.budget import parse_budget
from lit_prune.plugin import SETTINGS, Plugin
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter


def as_plugin(
    pruner: PruningMethod | Plugin | str | Path, repair: RepairAdapter | None = None, keep: Any = None
) -> Plugin:
    """Create a `Plugin` from any way of naming a method.

    Args:
        pruner: an object, the name of a shipped method (`fastv`), a YAML file, a folder written by `save_pretrained`,
            or a repository of the hub (`OWNER/NAME`).
        repair: repair adapter for a pruner object.
        keep: budget for a pruner object.

    Raises:
        LitPruneError: no method of this name (the message lists the closest names), or the file can't be read.
    """
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
    folder = Path(pruner).expanduser()
    if folder.suffix not in SUFFIXES and (folder / SETTINGS).is_file():
        return Plugin.from_pretrained(folder)
    try:
        file = find_config(pruner, "pruners")
    except LitPruneError:
        if folder.suffix in SUFFIXES or not (folder.is_dir() or "/" in str(pruner)):
            raise
        return Plugin.from_pretrained(folder if folder.is_dir() else pruner)
    return plugin_from_yaml(file)


def plugin_from_yaml(path: str | Path) -> Plugin:
    """Create an untrained plug-in from a file such as those in `configs/pruners/`, with the command line's parser."""
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        model = read_yaml(path).get("model")
    except NoMapping:
        model = None
    if not isinstance(model, dict) or not model.get("pruner"):
        raise LitPruneError(f"{path} names no method: it needs `model: {{pruner: {{class_path: ...}}}}`")
    if renamed := old_keys(model, "model"):
        raise LitPruneError(f"{path}: {renamed_text(renamed)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pruner", type=PruningMethod)
    parser.add_argument("--repair", type=RepairAdapter | None)
    parser.add_argument("--positions", type=Positions, default="original")
    parser.add_argument("--proportional_attention", type=Proportional, default="none")
    names = ("pruner", "repair", *vars(HostOptions()))
    try:
        chosen = {key: model[key] for key in names if model.get(key) is not None}
        built = parser.instantiate(parser.parse_object(chosen))
    except ArgumentError as error:
        raise LitPruneError(f"{path}: {error}") from error
    options = HostOptions(**{name: built[name] for name in vars(HostOptions())})
    keep = model.get("keep")
    budget = None if keep is None else parse_budget(keep, f"{path}: model.keep")
    return Plugin(built.pruner, built.get("repair"), budget, options=options).eval()
