"""A pruner with its repair, as one thing: trained, saved, loaded and attached together.

A folder holds `plugin.safetensors` and `plugin.json`; nothing in it is executed, and only classes of this project, or
ones already imported, are built from it.
"""

import copy
import importlib
import json
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prune import __version__
from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import translated
from lit_prune.host.options import HostOptions
from lit_prune.ops.budget import Schedule, as_json, parse_budget, scale_layers
from lit_prune.pruners.base import Dims, Full, PruningMethod, spec
from lit_prune.repair import RepairAdapter

SETTINGS, WEIGHTS = "plugin.json", "plugin.safetensors"


CARD = """---
{{ card_data }}
---

# {{ title }}

A visual-token pruning plug-in of `lit_prune` for {{ base }}; the model's own weights are not in it.

{{ summary }}

Attach it, with this folder in place of FOLDER:

```python
import lit_prune

vlm = lit_prune.load("{{ base }}")
vlm.attach("FOLDER")
```
"""


class Plugin(
    nn.Module, ModelHubMixin, library_name="lit_prune", tags=["visual-token-pruning"], model_card_template=CARD
):
    """Everything beside the frozen model: pruner, repair adapter and budget.

    Args:
        pruner: the method.
        repair: repair adapter, or None.
        keep: budget, visual tokens averaged over the decoder layers' inputs, or whatever else `parse_budget` reads.
        base: name of the model it was made for.
        options: settings that every method has alike.
    """

    def __init__(
        self,
        pruner: PruningMethod,
        repair: RepairAdapter | None = None,
        keep: Any = None,
        base: str = "",
        options: HostOptions = HostOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.options = options
        self.pruner, self.repair, self.base = pruner, repair, base
        self.keep = None if keep is None else parse_budget(keep)
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

    def summary(self, schedule: Schedule | None = None) -> list[str]:
        """Lines for people: method, budget, the `schedule` solved from it, repair, options, and how much trains."""
        lines = [f"pruner: {type(self.pruner).__name__}"]
        if self.keep is not None and not isinstance(self.keep, dict):
            total = "the" if self.dims is None or self.dims.varies else self.dims.visual
            lines.append(f"budget: {self.keep} of {total} visual tokens, averaged over the decoder layers' inputs")
        if schedule:
            stages = ", ".join(f"{count} from layer {layer}" for layer, count in schedule.items())
            lines.append(f"schedule: {stages}")
        if self.repair is not None:
            layers = self.repair.layers
            if self.dims is not None:
                layers = scale_layers(tuple(layers), self.repair.depth, self.dims.depth)
            lines.append(f"repair: {type(self.repair).__name__} at layers {', '.join(map(str, layers))}")
        lines += [f"{name}: {value}" for name, value in self.options.changed().items()]
        parts = [(name, sum(p.numel() for p in part.parameters())) for name, part in self.named_children()]
        trained = [f"{count:,} parameters of the {name}" for name, count in parts if count]
        return [*lines, f"trains: {' and '.join(trained) or 'nothing'}"]

    @property
    def title(self) -> str:
        """The method's name for people, with what was added to it; "" where the method has none."""
        if not self.pruner.title:
            return ""
        repair = " + repair" if self.repair is not None and not self.pruner.repairs else ""
        return "".join([self.pruner.title, repair, *(f", {added}" for added in self.options.described())])

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The folder's README.md: the method, its budget, what is in it, how to attach it."""
        info = self._hub_mixin_info
        found = {
            "title": self.title or type(self.pruner).__name__,
            "base": self.base or "MODEL",
            "summary": "\n".join(f"- {line}" for line in self.summary(self.settings()["schedule"])),
        }
        return ModelCard.from_template(info.model_card_data, template_str=info.model_card_template, **found)

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
            "keep": as_json(self.keep),
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
            tensors = load_file(path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise LitPruneError(f"{path / WEIGHTS} can't be read: {error}") from error
        return cls._made(settings, tensors, path / SETTINGS, path / WEIGHTS)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "Plugin":
        """The plug-in of a training run's checkpoint: Lightning's file, or the folder that DeepSpeed wrote.

        Raises `LitPruneError` if it is missing or damaged, or holds no plug-in. Nothing in it is executed.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_pretrained(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise LitPruneError(f"{path}: {error.strerror}") from error
        except (RuntimeError, UnpicklingError, EOFError) as error:
            raise LitPruneError(f"{path} is no checkpoint that can be read safely: {error}") from error
        if not isinstance(checkpoint, dict) or not {"plugin", "state_dict"} <= checkpoint.keys():
            raise LitPruneError(
                f"{path} holds no plug-in: it is no checkpoint of this project, or one before 2026-11-21"
            )
        _check_settings(checkpoint["plugin"], path)
        prefix = "plugin."
        tensors = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
        return cls._made(checkpoint["plugin"], tensors, path, path)

    @classmethod
    def _made(cls, settings: dict[str, Any], tensors: dict[str, Tensor], told: Path, found: Path) -> "Plugin":
        """From settings that stood in the file `told` and weights of the file `found`."""
        try:
            pruner = _build(settings["pruner"], PruningMethod, told)
            repair = None if settings["repair"] is None else _build(settings["repair"], RepairAdapter, told)
            plugin = cls(pruner, repair, settings["keep"], settings["base"], _options(settings, told))
            if settings["dims"] is not None:
                plugin.build(Dims(**settings["dims"]), [])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LitPruneError(f"{told} can't be used: {error}") from error
        plugin.fingerprint = settings["fingerprint"]
        try:  # plug-ins of before 2026-11-21 have numbers where there are vectors of one element now
            plugin.load_state_dict({name: value if value.ndim else value[None] for name, value in tensors.items()})
        except RuntimeError as error:
            raise LitPruneError(f"{found} doesn't fit {told.name}: {error}") from error
        return plugin.eval()


def unpruned() -> Plugin:
    """The plug-in of the full model, which prunes nothing."""
    return Plugin(Full()).eval()


def learns(plugin: Plugin, dims: Dims) -> bool:
    """True if a plug-in has weights once it is built for such a model; it is left as it is."""
    made = copy.deepcopy(plugin)
    try:
        with torch.device("meta"):
            made.build(dims, [])
    except LitPruneError:  # it doesn't fit this model: whoever attaches it says so
        return False
    return made.trained


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


def _build(spec: dict[str, Any], kind: type, told: Path) -> Any:
    """A pruner or adapter from its class path; never imports a module outside this project."""
    module, _, name = spec["class_path"].rpartition(".")
    if module.startswith("lit_prune.") and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LitPruneError(f"{told}: this version has no {spec['class_path']}") from error
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise LitPruneError(
            f"{told} names {spec['class_path']}, which is no {kind.__name__} that is imported here; "
            f"import its module first, if you trust it"
        )
    arguments = translated(found, spec["init_args"])
    parts = {name: a for name, a in arguments.items() if isinstance(a, dict) and "class_path" in a}
    return found(**arguments | {name: _build(part, PruningMethod, told) for name, part in parts.items()})


def _options(settings: dict[str, Any], told: Path) -> HostOptions:
    """Those that the file names; older files name none."""
    given = translated(HostOptions, settings)
    try:
        return HostOptions(**{name: given[name] for name in vars(HostOptions()) if name in given})
    except LitPruneError as error:
        raise LitPruneError(f"{told}: {error}") from error


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitPruneError(
            f"{path.parent} is no plug-in folder: {SETTINGS} can't be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise LitPruneError(f"{path} is not JSON: {error}") from error
    _check_settings(settings, path)
    return settings


def _check_settings(settings: Any, path: Path) -> None:
    needed = {"pruner", "repair", "keep", "base", "dims", "fingerprint"}
    if missing := needed.difference(settings if isinstance(settings, dict) else ()):
        raise LitPruneError(f"{path} lacks {', '.join(sorted(missing))}: not a plug-in of this project")


def _download(name: str, options: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS], **options))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LitPruneError(f"plug-in {name}: no such folder, and no such repository could be reached") from error
