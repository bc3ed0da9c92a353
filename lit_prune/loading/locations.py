"""Places of models and plug-ins: this package, a folder, the hub and its cache, and what helps where there is none."""

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors import SafetensorError

from lit_prune.cost.shapes import names
from lit_prune.errors import LitPruneError, extra

MICRO = Path(__file__).parents[1] / "micro" / "weights"
SHIPPED = {  # models in this package: folder of the weights, and the job that makes them
    "micro": (MICRO, "jobs/pretrain_micro.sh"),
    "micro-576": (MICRO.with_name("weights_576"), "jobs/pretrain_micro_576.sh"),
}
PROBE_SECONDS = 3.0  # for the one request that tells whether the hub can be reached
HUB_OPTIONS = ("revision", "token", "subfolder", "cache_dir")  # which version of a repository, and how to get it
WORD = r"\w[\w.-]*"
HUB_NAME = re.compile(rf"(?P<repo>{WORD}/{WORD})(?P<subfolder>(?:/{WORD})*)(?::(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")
SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)[/\\]snapshots(?:[/\\]|$)")
LOCAL = "local"  # in place of a folder's path, which nobody else has


def resolve(base: str | Path) -> str:
    """Resolve a model's name to a folder or hub id; `micro` and `micro-576` are shipped with this package.

    A folder holds `config.json`, or `adapter_config.json`: an adapter of peft, which names its base model.
    """
    if str(base) in SHIPPED:
        folder, job = SHIPPED[str(base)]
        if not (folder / "config.json").is_file():
            raise LitPruneError(f"the weights of {base} are missing from {folder}: reinstall, or run {job}")
        return str(folder)
    path = Path(base).expanduser()
    looks_local = path.is_absolute() or str(base).startswith((".", "~")) or path.is_dir()
    if looks_local and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise LitPruneError(f"{base} is no model folder: it has no config.json")
    return str(path) if looks_local else str(base)


def hub_place(name: str | Path) -> tuple[str, dict[str, str]]:
    """Repository and options of `OWNER/NAME[/SUBFOLDER][:REVISION]`; any other name, or a folder, as it is."""
    text = str(name)
    found = None if os.path.exists(os.path.expanduser(text)) else HUB_NAME.fullmatch(text)
    if found is None or not (found["subfolder"] or found["revision"]):
        return text, {}
    parts = {"subfolder": found["subfolder"].lstrip("/"), "revision": found["revision"]}
    return found["repo"], {key: value for key, value in parts.items() if value}


def hub_text(name: str | Path, hub: dict[str, Any]) -> str:
    """A name with its subfolder and revision; the reverse of `hub_place`."""
    repository, named = hub_place(name)
    parts = named | {key: str(value) for key, value in hub.items() if value is not None}
    folder = f"{repository}/{parts['subfolder']}" if parts.get("subfolder") else repository
    return f"{folder}:{parts['revision']}" if parts.get("revision") and not Path(folder).is_dir() else folder


def refuse_unnamed(base: str | Path) -> None:
    """Raise `LitPruneError` for the base model of a plug-in that was a folder where the plug-in was made."""
    if str(base) == LOCAL and not Path(LOCAL).is_dir():
        raise LitPruneError(
            "the base model of this plug-in was a folder where it was made, and isn't named: give your copy of it, "
            "lit_prune.load(BASE).attach(PLUGIN), or on the command line --model BASE --pruner PLUGIN"
        )


def hub_options(given: dict[str, Any], name: object) -> dict[str, Any]:
    """Those of `HUB_OPTIONS` that are given; raises `LitPruneError` for others, or an option of a wrong type."""
    for key, value in given.items():
        if key not in HUB_OPTIONS:
            raise LitPruneError(f"{name}: there is no option `{key}`; of the hub there are {', '.join(HUB_OPTIONS)}")
        if value is not None and not isinstance(value, str | Path) and not (key == "token" and isinstance(value, bool)):
            raise LitPruneError(f"{name}: {key}={value!r} must be text")
    return {key: value for key, value in given.items() if value is not None}


def public_name(base: str | Path) -> str:
    """Name by which others find a model: of this package, or a hub id; `LOCAL` for a folder of this machine."""
    text = str(base)
    if found := SNAPSHOT.search(text):
        return f"{found['owner']}/{found['name']}"
    path = os.path.expanduser(text)
    folder = os.path.isabs(path) or text.startswith((".", "~")) or "\\" in text or os.path.exists(path)
    repo, _ = (text, {}) if folder else hub_place(text)
    return LOCAL if folder or repo.count("/") > 1 else text


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
    """True if a name is that of a shipped shape, and no local folder."""
    return str(base) in names() and not Path(base).is_dir()


def fetch(function: Callable, base: str | Path, local: bool = False, **options: Any) -> Any:
    """Call one of the library's `from_pretrained`, and say what would help where it fails.

    `base` may be `OWNER/NAME/SUBFOLDER:REVISION`; `options` that are given win.
    """
    base, named = hub_place(base)
    options = named | {name: value for name, value in options.items() if value is not None or name not in HUB_OPTIONS}
    folder = place_of(base, local, {name: options[name] for name in HUB_OPTIONS if name in options})
    options.pop("subfolder", None)  # is part of the place
    options.setdefault("trust_remote_code", False)
    try:
        return function(folder, **options)
    except OSError as error:
        raise LitPruneError(f"{base} can't be loaded ({first_line(error)}). {advice(base)}") from error
    except ImportError as error:
        refuse_attention(base, options, error)
        raise LitPruneError(
            f"{base} can't be loaded so ({first_line(error)}): install what is missing, such as "
            f"{extra('quantized', 'peft')}"
        ) from error
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise LitPruneError(f"{base} can't be loaded: {first_line(error)}") from error


def refuse_attention(base: Any, options: dict[str, Any], error: Exception) -> None:
    """Raise `LitPruneError` if it is the chosen attention implementation whose package is missing."""
    if name := options.get("attn_implementation"):
        raise LitPruneError(
            f"{base} can't be loaded with attn_implementation={name} ({first_line(error)}): install the package that "
            f"it needs, or leave the option out for sdpa"
        ) from error


def place_of(base: str | Path, local: bool, hub: dict[str, Any]) -> str:
    """Folder of a model, or its hub id if the hub is to be queried: not if `local`, nor if it is unreachable."""
    subfolder = str(hub.get("subfolder", ""))
    if subfolder and Path(base).expanduser().is_dir():
        base, subfolder = Path(base).expanduser() / subfolder, ""
    name = resolve(base)
    if Path(name).is_dir():
        return name
    if "/" not in name and (likely := closest_model(name)):  # one word: the hub's models have an owner
        raise LitPruneError(f"no model `{base}`; did you mean `{likely}`?")
    online = not local and hub_answers()
    if online and not subfolder:
        return name
    try:
        patterns = [f"{subfolder}/*"] if subfolder else None
        version = {key: value for key, value in hub.items() if key != "subfolder"}
        found = Path(snapshot_download(name, local_files_only=not online, allow_patterns=patterns, **version))
        return resolve(found / subfolder) if subfolder else str(found)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        reason = "" if local else ", and the hub can't be reached"
        raise LitPruneError(f"{base} is no folder and not in the hub's cache{reason}. {advice(base)}") from error
    except HfHubHTTPError as error:
        raise LitPruneError(f"{base} can't be loaded ({first_line(error)})") from error


def closest_model(name: str) -> str | None:
    """The model of this package, or the shipped shape, that a name is nearly spelt like; None for its own name."""
    known = {model.rpartition("/")[2].lower(): model for model in names()}
    known |= {model.lower(): model for model in names()} | {"micro-llava": "micro"} | {name: name for name in SHIPPED}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return known[found[0]] if found and known[found[0]] != name else None


def hub_answers() -> bool:
    """True if the hub is reachable; a single request, since the library's own retries take most of a minute."""
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
