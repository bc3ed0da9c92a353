"""A pruner with its repair, as one thing: trained, saved, loaded and attached together.

A folder holds `plugin.safetensors` and `plugin.json`; nothing in it is executed, and only classes of this project, or
ones already imported, are built from it.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lit_prune import __version__
from lit_prune.budget import Budget
from lit_prune.errors import LitPruneError
from lit_prune.host.options import HostOptions
from lit_prune.pruners.base import Dims, Pruner, spec
from lit_prune.repair import RepairAdapter

SETTINGS, WEIGHTS = "plugin.json", "plugin.safetensors"


class Plugin(nn.Module, ModelHubMixin, library_name="lit_prune", tags=["visual-token-pruning"]):
    """Everything beside the frozen model: pruner, repair adapter and budget.

    Args:
        pruner: the method.
        repair: repair adapter, or None.
        keep: budget, visual tokens averaged over the decoder layers' inputs, or a schedule {layer: count}.
        base: name of the model it was made for.
        options: settings that every method has alike.
    """

    def __init__(
        self,
        pruner: Pruner,
        repair: RepairAdapter | None = None,
        keep: Budget | None = None,
        base: str = "",
        options: HostOptions = HostOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.options = options
        self.pruner, self.repair, self.keep, self.base = pruner, repair, keep, base
        self.dims: Dims | None = None
        self.fingerprint: list[float] = []

    def build(self, dims: Dims, fingerprint: list[float]) -> None:
        """Create the parameters for a host's sizes; raises `LitPruneError` if they were made for another host."""
        if self.dims is not None and (self.dims.width, self.dims.depth) != (dims.width, dims.depth):
            raise LitPruneError(
                f"this plug-in was made for {self.base or 'a model'} with {self.dims.depth} decoder layers of width "
                f"{self.dims.width}, the model here has {dims.depth} of width {dims.width}"
            )
        if self.trained and self.fingerprint and fingerprint and not _same(self.fingerprint, fingerprint):
            raise LitPruneError(
                f"this plug-in was trained for the weights of {self.base or 'another model'}, which differ from the "
                f"model's here: load that base model, or train again for this one"
            )
        self.pruner.build(dims)
        if self.repair is not None:
            self.repair.build(dims)
        self.train(self.training)  # what was just made takes the mode of the rest
        self.dims, self.fingerprint = dims, fingerprint or self.fingerprint

    @property
    def trained(self) -> bool:
        """Whether there are parameters that depend on the model they were trained with."""
        return any(True for _ in self.parameters())

    def settings(self) -> dict[str, Any]:
        """What `plugin.json` says: enough to build the plug-in again, and what it was made for."""
        schedule = None
        if self.dims is not None and self.keep is not None:
            schedule = self.pruner.nominal_schedule(self.keep, self.dims)
        return {
            "format": 1,
            "lit_prune": __version__,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "dims": None if self.dims is None else vars(self.dims),
            "keep": self.keep,
            "schedule": schedule,
            **vars(self.options),
            "pruner": spec(self.pruner),
            "repair": None if self.repair is None else spec(self.repair),
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / SETTINGS).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "Plugin":
        """A saved plug-in from a local folder or a hub id (`hub`: options of `snapshot_download`).

        Raises `LitPruneError` if the folder is missing, incomplete or damaged.
        """
        path = Path(folder)
        if not path.is_dir():
            path = _download(str(folder), hub)
        settings = _read_settings(path / SETTINGS)
        try:
            pruner = _build(settings["pruner"], Pruner, path)
            repair = None if settings["repair"] is None else _build(settings["repair"], RepairAdapter, path)
            plugin = cls(pruner, repair, _budget(settings["keep"]), settings["base"], _options(settings, path))
            plugin._restore(settings, path)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LitPruneError(f"{path / SETTINGS} can't be used: {error}") from error
        return plugin.eval()

    def _restore(self, settings: dict[str, Any], folder: Path) -> None:
        if settings["dims"] is not None:
            self.build(Dims(**settings["dims"]), [])
        self.fingerprint = settings["fingerprint"]
        try:
            tensors = load_file(folder / WEIGHTS)
            self.load_state_dict({name: value if value.ndim else value[None] for name, value in tensors.items()})
        except (OSError, SafetensorError) as error:
            raise LitPruneError(f"{folder / WEIGHTS} can't be read: {error}") from error
        except RuntimeError as error:
            raise LitPruneError(f"{folder / WEIGHTS} doesn't fit {SETTINGS}: {error}") from error


def fingerprint(model: nn.Module) -> list[float]:
    """A few weights of a model, to tell it from another of the same shape; empty where weights can't be read."""
    values: list[float] = []
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "self_attn" in name]
    for _, weight in (named[0], named[len(named) // 2], named[-1]) if named else ():
        if weight.is_meta or not weight.is_floating_point() or weight.numel() < 8:
            return []
        values += weight.detach().flatten()[:8].float().cpu().tolist()
    return values


def _same(a: list[float], b: list[float]) -> bool:
    """Equal up to rounding to half precision."""
    if len(a) != len(b):
        return False
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-2 * max(map(abs, a)))


def _build(spec: dict[str, Any], kind: type, folder: Path) -> Any:
    """A pruner or adapter from its class path; never imports a module outside this project."""
    module, _, name = spec["class_path"].rpartition(".")
    if module.startswith("lit_prune.") and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LitPruneError(f"{folder}: this version has no {spec['class_path']}") from error
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise LitPruneError(
            f"{folder / SETTINGS} names {spec['class_path']}, which is no {kind.__name__} that is imported here; "
            f"import its module first, if you trust it"
        )
    parts = {name: a for name, a in spec["init_args"].items() if isinstance(a, dict) and "class_path" in a}
    return found(**spec["init_args"] | {name: _build(part, Pruner, folder) for name, part in parts.items()})


def _options(settings: dict[str, Any], folder: Path) -> HostOptions:
    """Those that the file names; older files name none."""
    try:
        return HostOptions(**{name: settings[name] for name in vars(HostOptions()) if name in settings})
    except LitPruneError as error:
        raise LitPruneError(f"{folder / SETTINGS}: {error}") from error


def _budget(keep: Any) -> Budget | None:
    """JSON has no numbers for keys."""
    return {int(layer): int(count) for layer, count in keep.items()} if isinstance(keep, dict) else keep


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitPruneError(
            f"{path.parent} is no plug-in folder: {SETTINGS} can't be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise LitPruneError(f"{path} is not JSON: {error}") from error
    needed = {"pruner", "repair", "keep", "base", "dims", "fingerprint"}
    if missing := needed.difference(settings if isinstance(settings, dict) else ()):
        raise LitPruneError(f"{path} lacks {', '.join(sorted(missing))}: not a plug-in of this project")
    return settings


def _download(name: str, options: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS], **options))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LitPruneError(f"plug-in {name}: no such folder, and no such repository could be reached") from error
