"""Places of models: this package, a folder, the hub and its cache, and what would help where one isn't found."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors import SafetensorError

from lit_prune.cost.shapes import names
from lit_prune.errors import LitPruneError, extra

MICRO = Path(__file__).parents[1] / "micro" / "weights"
PROBE_SECONDS = 3.0  # for the one request that tells whether the hub can be reached


def resolve(base: str | Path) -> str:
    """Folder or hub id that a model's name stands for; `micro` is the one shipped with this package.

    A folder holds `config.json`, or `adapter_config.json`: an adapter of peft, which names its base model.
    """
    if str(base) == "micro":
        if not (MICRO / "config.json").is_file():
            raise LitPruneError(
                f"the weights of micro-LLaVA are missing from {MICRO}: reinstall, or run jobs/pretrain_micro.sh"
            )
        return str(MICRO)
    path = Path(base).expanduser()
    looks_local = path.is_absolute() or str(base).startswith((".", "~")) or path.is_dir()
    if looks_local and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise LitPruneError(f"{base} is no model folder: it has no config.json")
    return str(path) if looks_local else str(base)


def adapted_from(base: str | Path) -> str | None:
    """The base model that a folder of an adapter alone names; None for any other."""
    folder = Path(resolve(base))
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    try:
        return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise LitPruneError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path") from error


def is_shipped(base: str | Path) -> bool:
    """Whether a name is that of a shipped shape, and of no folder here."""
    return str(base) in names() and not Path(base).is_dir()


def fetch(function: Callable, base: str | Path, local: bool = False, **options: Any) -> Any:
    """Call one of the library's `from_pretrained`, and say what would help where it fails."""
    folder = place_of(base, local, {name: options[name] for name in ("revision", "cache_dir") if name in options})
    options.setdefault("trust_remote_code", False)
    try:
        return function(folder, **options)
    except OSError as error:
        raise LitPruneError(f"{base} can't be loaded ({first_line(error)}). {advice(base)}") from error
    except ImportError as error:
        raise LitPruneError(
            f"{base} can't be loaded so ({first_line(error)}): install what is missing, such as "
            f"{extra('quantized', 'peft')}"
        ) from error
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise LitPruneError(f"{base} can't be loaded: {first_line(error)}") from error


def place_of(base: str | Path, local: bool, version: dict[str, Any]) -> str:
    """Folder of a model, or its hub id where the hub is to be asked: not if `local`, nor if it doesn't answer."""
    name = resolve(base)
    if Path(name).is_dir():
        return name
    if "/" not in name and (likely := closest_model(name)):  # one word: the hub's models have an owner
        raise LitPruneError(f"no model `{base}`; did you mean `{likely}`?")
    if not local and hub_answers():
        return name
    try:
        return snapshot_download(name, local_files_only=True, **version)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        reason = "" if local else ", and the hub can't be reached"
        raise LitPruneError(f"{base} is no folder and not in the hub's cache{reason}. {advice(base)}") from error


def closest_model(name: str) -> str | None:
    """The model of this package, or the shipped shape, that a name is nearly spelt like; None for its own name."""
    known = {model.rpartition("/")[2].lower(): model for model in names()}
    known |= {model.lower(): model for model in names()} | {"micro": "micro", "micro-llava": "micro"}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return known[found[0]] if found and known[found[0]] != name else None


def hub_answers() -> bool:
    """Whether the hub can be reached: one request, since the library's own retries take most of a minute."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the client's errors are its own affair: any of them means no
        return False
    return True


def advice(base: str | Path) -> str:
    if Path(base).expanduser().is_dir():
        text = "A model folder holds config.json, *.safetensors and the processor's files."
    else:
        text = (
            f"Give a local folder with config.json and *.safetensors, or fetch it on a machine with network: "
            f"hf download {base} --local-dir FOLDER, then --model.base=FOLDER (`lit-prune` verbs: --model FOLDER)"
        )
    if likely := closest_model(str(base)):
        text = f"Did you mean `{likely}`? {text}"
    if str(base) in names() or (Path(base).expanduser() / "config.json").is_file():
        text += f". Benchmarks need no weights: lit_prune.load({str(base)!r}, random_weights=True)"
    return text


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
