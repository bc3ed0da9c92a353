"""Read a plug-in's settings, and build pruner, adapter and options from them; errors name the file they came from."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import translated
from lit_prune.host.options import HostOptions
from lit_prune.pruners.base import PruningMethod

SETTINGS, WEIGHTS = "plugin.json", "plugin.safetensors"


def build(spec: dict[str, Any], kind: type, source: Path) -> Any:
    """Build a pruner or adapter from its class path; never imports a module outside this project."""
    module, _, name = spec["class_path"].rpartition(".")
    if module.startswith("lit_prune.") and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LitPruneError(f"{source}: this version has no {spec['class_path']}") from error
    built = getattr(sys.modules.get(module), name, None)
    if not (isinstance(built, type) and issubclass(built, kind)):
        raise LitPruneError(
            f"{source} names {spec['class_path']}, which is no {kind.__name__} that is imported here; "
            f"import its module first, if you trust it"
        )
    arguments = translated(built, spec["init_args"])
    parts = {name: a for name, a in arguments.items() if isinstance(a, dict) and "class_path" in a}
    arguments |= {name: build(part, PruningMethod, source) for name, part in parts.items()}
    try:
        return built(**arguments)
    except LitPruneError as error:
        raise LitPruneError(f"{source}: {error}") from error


def options(settings: dict[str, Any], source: Path) -> HostOptions:
    """Host options of the settings; older files contain none."""
    given = translated(HostOptions, settings)
    try:
        return HostOptions(**{name: given[name] for name in vars(HostOptions()) if name in given})
    except LitPruneError as error:
        raise LitPruneError(f"{source}: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read and check a `plugin.json`."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitPruneError(
            f"{path.parent} is no plug-in folder: {SETTINGS} can't be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise LitPruneError(f"{path} is not JSON: {error}") from error
    check_settings(settings, path)
    return settings


def check_settings(settings: Any, path: Path) -> None:
    """Raise `LitPruneError` unless the settings have all required keys."""
    needed = {"pruner", "repair", "keep", "base", "dims", "fingerprint"}
    if missing := needed.difference(settings if isinstance(settings, dict) else ()):
        raise LitPruneError(f"{path} lacks {', '.join(sorted(missing))}: not a plug-in of this project")


def download(name: str, hub: dict[str, Any]) -> Path:
    """Download a plug-in's two files from the hub; `hub`: options of `snapshot_download`."""
    try:
        return Path(snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS], **hub))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LitPruneError(f"plug-in {name}: no such folder, and no such repository could be reached") from error
