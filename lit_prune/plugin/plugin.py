"""A plug-in: a pruner and its repair adapter, trained, saved, loaded and attached together.

A saved folder holds `plugin.safetensors`, `plugin.json`, a model card and, if it was tested, `results.json`. Nothing in
it is executed, and only classes of this project, or ones already imported, are instantiated from it.
"""

import copy
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lit_prune import __version__
from lit_prune.errors import LitPruneError
from lit_prune.host.lora import LoRA, save_for_peft
from lit_prune.host.options import HostOptions
from lit_prune.loading.locations import LOCAL, first_line, public_name
from lit_prune.ops.budget import Schedule, as_json, parse_budget, scale_layers
from lit_prune.plugin import reading
from lit_prune.plugin.bases import same_weights
from lit_prune.plugin.card import LICENSE, MARK, model_card
from lit_prune.plugin.reading import RESULTS, SETTINGS, WEIGHTS
from lit_prune.pruners.base import Dims, Full, PruningMethod, spec
from lit_prune.repair import RepairAdapter


class Plugin(nn.Module, ModelHubMixin, library_name="lit_prune"):
    """Everything but the frozen model: pruner, repair adapter and budget.

    `results`: figures of a test, as `results.json` holds them: `figures` by name, `data` and `date`, and `weights` and
    `keep` that they hold for. They are left out of a saved folder whose weights or budget are others.

    Args:
        pruner: the method.
        repair: repair adapter, or None.
        keep: budget, visual tokens averaged over the decoder layers' inputs, in any form that `parse_budget` accepts.
        base: name of the base model.
        options: settings common to all methods.
        lora: adapters on the decoder's linear layers, or None.
    """

    def __init__(
        self,
        pruner: PruningMethod,
        repair: RepairAdapter | None = None,
        keep: Any = None,
        base: str = "",
        options: HostOptions = HostOptions(),  # noqa: B008 (frozen)
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.pruner, self.repair, self.lora, self.base = pruner, repair, lora, base
        self.keep = None if keep is None else parse_budget(keep)
        self.dims: Dims | None = None
        self.fingerprint: list[float] = []
        self.results: dict[str, Any] | None = None
        self._hub_mixin_config = None  # no config.json: it would repeat plugin.json

    def build(self, dims: Dims, fingerprint: list[float], model: nn.Module | None = None) -> None:
        """Create the parameters for a host's sizes; raises `LitPruneError` if they exist for another host.

        `model`: the host, where linear layers are adapted.
        """
        if self.dims is not None and (self.dims.width, self.dims.depth) != (dims.width, dims.depth):
            raise LitPruneError(
                f"this plug-in was made for {self._base_text or 'a model'} with {self.dims.depth} decoder layers of "
                f"width {self.dims.width}, the model here has {dims.depth} of width {dims.width}"
            )
        if self.trained and self.fingerprint and fingerprint and not same_weights(self.fingerprint, fingerprint):
            raise LitPruneError(
                f"this plug-in was trained for the weights of {self._base_text or 'another model'}, which differ from "
                f"the model's here: load that base model, or train again for this one"
            )
        self.pruner.build(dims)
        if self.repair is not None:
            self.repair.build(dims)
        if self.lora is not None and model is not None:
            self.lora.build(model)
        self.train(self.training)  # new modules take the mode of the rest
        self.dims, self.fingerprint = dims, fingerprint or self.fingerprint

    @property
    def trained(self) -> bool:
        """True if there are parameters, which depend on the model they were trained with."""
        return any(True for _ in self.parameters())

    @property
    def _base_text(self) -> str:
        return "a local model" if self.base == LOCAL else self.base

    def summary(self, schedule: Schedule | None = None) -> list[str]:
        """Summary lines: method, budget, the `schedule` solved from it, repair, options, and trainable parameters."""
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
        if self.lora is not None:
            lines.append(f"lora: rank {self.lora.r} at {', '.join(self.lora.target_modules)}")
        lines += [f"{name}: {value}" for name, value in self.options.changed().items()]
        parts = [(name, sum(p.numel() for p in part.parameters())) for name, part in self.named_children()]
        trained = [f"{count:,} parameters of the {name}" for name, count in parts if count]
        return [*lines, f"trains: {' and '.join(trained) or 'nothing'}"]

    @property
    def title(self) -> str:
        """Published name of the method, with repair and options added; "" if the method has none."""
        if not self.pruner.title:
            return ""
        repair = " + repair" if self.repair is not None and not self.pruner.repairs else ""
        return ", ".join([self.pruner.title + repair, *self.options.described(self.pruner.positions)])

    def generate_model_card(self, place: str = "FOLDER", license: str = LICENSE, **_: Any) -> ModelCard:
        """Generate the folder's README.md: method, budget, contents, usage, and figures of a test.

        Args:
            place: the folder or repository that the card is for.
            license: of the plug-in's weights, as the hub spells it.
        """
        title = self.title or type(self.pruner).__name__
        return model_card(self, title, self.summary(self.settings()["schedule"]), place, license)

    def settings(self) -> dict[str, Any]:
        """Contents of `plugin.json`: everything needed to rebuild the plug-in, and the model it belongs to."""
        schedule = None
        if self.dims is not None and self.keep is not None:
            schedule = self.pruner.nominal_schedule(self.keep, self.dims)
        return {
            "format": 1,
            "lit_prune": __version__,
            "base": public_name(self.base) if self.base else "",
            "fingerprint": self.fingerprint,
            "dims": None if self.dims is None else vars(self.dims),
            "keep": as_json(self.keep),
            "schedule": schedule,
            **vars(self.options),
            "pruner": spec(self.pruner),
            "repair": None if self.repair is None else spec(self.repair),
            **({} if self.lora is None else {"lora": {**spec(self.lora), "sizes": self.lora.sizes()}}),
        }

    def save_pretrained(self, save_directory: str | Path, *, license: str | None = None, **options: Any) -> str | None:
        """Save as a folder. A model card that was edited, so that it lacks the line that says so, is left as it is.

        Args:
            save_directory: the folder, created if it doesn't exist.
            license: of the weights, for the model card; by default that of this project.
            options: of `ModelHubMixin.save_pretrained`.

        Raises:
            LitPruneError: the folder holds a model.
        """
        folder = Path(save_directory)
        if reading.holds_model(folder):  # whose configuration the mixin would delete
            raise LitPruneError(f"{folder} is the folder of a model: give the plug-in one of its own")
        if license is not None:
            options["model_card_kwargs"] = {**(options.get("model_card_kwargs") or {}), "license": license}
        return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / SETTINGS).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")
        content = self.content()
        (save_directory / WEIGHTS).write_bytes(content)
        base = self.settings()["base"]
        save_for_peft(self.lora, save_directory / "lora", None if base in ("", LOCAL) else base)
        results = self.results
        if results is not None and (results["weights"], results.get("keep")) == (
            reading.digest(content),
            as_json(self.keep),
        ):
            (save_directory / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        else:
            self.results = None
            (save_directory / RESULTS).unlink(missing_ok=True)
        card = save_directory / "README.md"
        if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
            card.unlink()  # the mixin writes one if there is none

    def content(self) -> bytes:
        """Content of `plugin.safetensors`."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        return save(tensors, metadata={"format": "pt"})

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Upload to a repository of the hub, created if it doesn't exist; returns the commit's URL.

        Args:
            repo_id: `OWNER/NAME`.
            license: of the weights, for the model card; by default that of this project.
            options: of `ModelHubMixin.push_to_hub`: `private`, `token`, `branch`, `create_pr`, `commit_message`.

        Raises:
            LitPruneError: the hub refuses it, or can't be reached.
        """
        card = {"place": repo_id} | ({} if license is None else {"license": license})
        stale = [RESULTS, "config.json", "lora/*"]  # of an earlier push
        try:
            if reading.has_own_card(repo_id, options.get("branch"), options.get("token")):
                options["ignore_patterns"] = ["README.md"]
            return super().push_to_hub(repo_id, model_card_kwargs=card, **{"delete_patterns": stale} | options)
        except Exception as error:  # of the client's network library too
            raise LitPruneError(f"{repo_id} can't be published: {first_line(error)}") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "Plugin":
        """Load a plug-in from a local folder, or from the hub by `OWNER/NAME[/SUBFOLDER][:REVISION]`.

        Args:
            folder: the folder or repository.
            hub: `revision`, `token`, `subfolder`, `cache_dir`.

        Raises:
            LitPruneError: the folder is missing, incomplete or damaged.
        """
        path = reading.find_folder(folder, hub)
        settings = reading.read_settings(path / SETTINGS)
        try:
            tensors = load_file(path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise LitPruneError(f"{path / WEIGHTS} can't be read: {error}") from error
        plugin = cls._from_parts(settings, tensors, path / SETTINGS, path / WEIGHTS)
        plugin.results = reading.read_results(path / RESULTS)
        return plugin

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "Plugin":
        """Load the plug-in from a training checkpoint, Lightning's file or DeepSpeed's folder.

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
        reading.check_settings(checkpoint["plugin"], path)
        prefix = "plugin."
        tensors = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
        return cls._from_parts(checkpoint["plugin"], tensors, path, path)

    @classmethod
    def _from_parts(cls, settings: dict[str, Any], tensors: dict[str, Tensor], source: Path, weights: Path) -> "Plugin":
        """Build a plug-in from the settings in the file `source` and the tensors in the file `weights`."""
        try:
            pruner = reading.build(settings["pruner"], PruningMethod, source)
            repair = None if settings["repair"] is None else reading.build(settings["repair"], RepairAdapter, source)
            base = reading.known_base(settings["base"])
            plugin = cls(pruner, repair, settings["keep"], base, reading.options(settings, source))
            if settings["dims"] is not None:
                plugin.build(Dims(**settings["dims"]), [])
            if (adapted := settings.get("lora")) is not None:
                plugin.lora = reading.build(adapted, LoRA, source)
                plugin.lora.create(adapted["sizes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LitPruneError(f"{source} can't be used: {error}") from error
        plugin.fingerprint = settings["fingerprint"]
        try:  # plug-ins before 2026-11-21 have scalars where there are vectors of one element now
            plugin.load_state_dict({name: value if value.ndim else value[None] for name, value in tensors.items()})
        except RuntimeError as error:
            raise LitPruneError(f"{weights} doesn't fit {source.name}: {error}") from error
        return plugin.eval()


def unpruned() -> Plugin:
    """Create the plug-in of the full model, which prunes nothing."""
    return Plugin(Full()).eval()


def learns(plugin: Plugin, dims: Dims) -> bool:
    """True if a plug-in has weights once it is built for such a model; the plug-in itself is not changed."""
    built = copy.deepcopy(plugin)
    try:
        with torch.device("meta"):
            built.build(dims, [])
    except LitPruneError:  # it doesn't fit this model; attaching it raises the error
        return False
    return built.trained
