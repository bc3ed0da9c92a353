"""Read a plug-in's settings, and build pruner, adapter and options from them; errors name the file they came from."""

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import translated
from lit_prune.host.options import HostOptions
from lit_prune.loading.locations import hub_answers, hub_options, hub_place, public_name
from lit_prune.plugin.card import MARK
from lit_prune.pruners.base import PruningMethod

SETTINGS, WEIGHTS, RESULTS = "plugin.json", "plugin.safetensors", "results.json"


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


def known_base(name: str) -> str:
    """Base model that a file names, if it can be had here: older files hold paths, which others don't have."""
    return name if not name or Path(name).expanduser().is_dir() else public_name(name)


def digest(content: bytes) -> str:
    """Checksum of weights, by which figures of a test know the plug-in that they are of."""
    return hashlib.sha256(content).hexdigest()


def read_results(path: Path) -> dict[str, Any] | None:
    """Figures of a test, see `Plugin.results`; None if there are none, or none that can be read."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"weights": str, "data": str, "date": str, "figures": dict}
    known = isinstance(results, dict) and all(isinstance(results.get(key), kind) for key, kind in needed.items())
    return results if known else None


def find_folder(name: str | Path, options: dict[str, Any]) -> Path:
    """Folder of a plug-in: local, or downloaded from the hub.

    Args:
        name: a folder, or `OWNER/NAME[/SUBFOLDER][:REVISION]`.
        options: see `HUB_OPTIONS`; those given win.
    """
    repository, named = hub_place(name)
    hub = named | hub_options(options, name)
    subfolder = str(hub.pop("subfolder", ""))
    if Path(repository).expanduser().is_dir():
        return Path(repository).expanduser() / subfolder
    try:
        patterns = [f"{subfolder}/{file}" if subfolder else file for file in (SETTINGS, WEIGHTS, RESULTS)]
        offline = not hub_answers()
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=offline, **hub)) / subfolder
    except RevisionNotFoundError as error:
        raise LitPruneError(f"plug-in {name}: {repository} has no revision {hub.get('revision')}") from error
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LitPruneError(f"plug-in {name}: no such folder, and no such repository could be reached") from error


def holds_model(folder: Path) -> bool:
    """True if a folder has the configuration of a model; plug-ins had a `config.json` of their own before 2026-12."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def has_own_card(repository: str, revision: str | None, token: Any) -> bool:
    """True if a repository has a model card that its owner wrote."""
    try:
        path = hf_hub_download(repository, "README.md", revision=revision, token=token)
        return MARK not in Path(path).read_text(encoding="utf-8", errors="replace")
    except (HfHubHTTPError, OSError):  # there is none, or no repository yet
        return False
