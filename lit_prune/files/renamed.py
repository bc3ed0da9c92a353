"""Keys renamed or added since version 0.1: renamed ones are an error in users' files, saved files are translated."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

# By class, for its subclasses too: an argument's name in version 0.1, and today's.
RENAMED = {
    "PruneModule": {"mass": "proportional_attention", "floor": "final_lr", "spare": "contenders"},
    "HostOptions": {"mass": "proportional_attention"},
    "Pruner": {"shape": "stage_ratios"},
    "VisionPruner": {"vision_shape": "vision_stage_ratios"},
    "RCP": {"floor": "attention_floor", "mass": "keep_mass"},
    "SavedStep": {"moment": "key"},
}
# By class: an argument that came later, and its value in files that were saved before.
ADDED = {"RCP": {"form": "first"}, "RepairAdapter": {"form": "first"}}
CONFIGS = {"dcp_mass": "dcp_proportional"}  # names of shipped configurations
MODEL = "model"  # the key of a configuration that holds the arguments of PruneModule
OLD = {old for names in RENAMED.values() for old in names}


def new_names(kind: type) -> dict[str, str]:
    """Today's name of each argument of a class that was renamed, by the old one; a name that it still takes is none."""
    parameters = inspect.signature(kind).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        names |= RENAMED.get(ancestor.__name__, {})
    return {old: new for old, new in names.items() if old not in parameters and (new in parameters or passes_on)}


def translated(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Saved arguments of a class under today's names. One that is there under both names stays, to be refused.

    An argument that is missing, since it came later, has the value that saved files imply.
    """
    names = new_names(kind)
    today = {new if (new := names.get(name, name)) not in arguments else name: arguments[name] for name in arguments}
    return {**_added(kind), **today}


def _added(kind: type) -> dict[str, Any]:
    parameters, values = inspect.signature(kind).parameters, {}
    for ancestor in reversed(kind.__mro__):
        values |= {name: value for name, value in ADDED.get(ancestor.__name__, {}).items() if name in parameters}
    return values


def old_keys(node: Any, key: str = "") -> dict[str, str]:
    """The dotted keys of a configuration that have another name today, each with that name.

    Args:
        node: what is at `key`, such as the content of a whole file.
        key: the dotted key of `node`; empty for a whole file.
    """
    if not isinstance(node, dict):
        return {}
    found = _among(node, key, RENAMED["PruneModule"]) if key == MODEL else {}
    arguments, class_path = node.get("init_args"), node.get("class_path")
    if isinstance(arguments, dict) and OLD & arguments.keys():
        found |= _among(arguments, f"{key}.init_args".lstrip("."), names_of(class_path))
    for name, value in node.items():
        found |= old_keys(value, f"{key}.{name}" if key else str(name))
    return found


def names_of(class_path: Any) -> dict[str, str]:
    """`new_names` of a class by its path; empty where there is no such class."""
    module, _, name = str(class_path).rpartition(".")
    try:
        return new_names(getattr(import_module(module), name))
    except Exception:  # whatever its module raises: who builds the class reports it
        return {}


def renamed_text(found: Mapping[str, str]) -> str:
    """A message that names the new key for each old one."""
    return "renamed since version 0.1: " + ", ".join(f"`{old}` is now `{new}`" for old, new in found.items())


def _among(node: dict, key: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{key}.{old}": new for old, new in names.items() if old in node}
