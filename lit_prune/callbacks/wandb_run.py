"""Features of Weights & Biases: names, tags, charts by layer, artifacts."""

import os
import re
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_prune.callbacks.export import ExportPlugin
from lit_prune.ops.budget import as_json, format_budget
from lit_prune.pruners.base import spec
from lit_prune.training.logging import logged_step

CHARTS = {  # validation metrics by layer, `NAME/layer_0` and so on, and titles of their charts
    "w2": "W2² of student and teacher per decoder layer",
    "w2_relative": "W2² per decoder layer, relative to the teacher's mean square",
    "w2_without_repair": "W2² per decoder layer, repair off",
    "kept": "visual tokens per decoder layer",
}


class WandbRun(Callback):
    """Name and tag the run, draw metrics per decoder layer as one chart, log the plug-in as an artifact.

    A chart has a line for each validation, including those before a resume. The artifact, of type `model`, is the
    folder written by `ExportPlugin`, with method, budget, base and accuracy as metadata. Without a `WandbLogger` this
    callback does nothing.

    Args:
        name: of the run, by default method-budget-base-seed; a name given to the logger, by WANDB_NAME or by a sweep
            stays.
        artifact: log the plug-in.
    """

    def __init__(self, name: str | None = None, artifact: bool = True) -> None:
        self.name, self.artifact = name, artifact
        self.lines: dict[str, dict[int, list[float]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Name and tag the run."""
        for logger in _loggers(trainer):
            run = logger.experiment
            # Lightning keeps no other sign of where a name comes from.
            named = logger._wandb_init.get("name") or {"WANDB_NAME", "WANDB_SWEEP_ID"} & set(os.environ)
            if self.name or not named:
                run.name = self.name or run_name(pl_module)
            own = (_method(pl_module), f"keep-{format_budget(pl_module.keep)}", _base(pl_module))
            run.tags = tuple(dict.fromkeys([*(run.tags or ()), *(tag[:64] for tag in own)]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a line to each chart."""
        if trainer.sanity_checking:
            return
        for name, title in CHARTS.items():
            values = _layers(trainer, f"val/{name}")
            if values:
                lines = self.lines.setdefault(name, {})
                lines[trainer.global_step] = values
                _chart(trainer, f"val/{name}_by_layer", title, lines)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the plug-in written by `fit`; not called if the run fails."""
        folders = [c.folder for c in trainer.callbacks if isinstance(c, ExportPlugin) and c.written]
        if stage == "fit" and self.artifact and folders:
            for logger in _loggers(trainer):
                _keep(logger, folders[0], pl_module, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the lines of the charts so far."""
        return {"lines": self.lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lines of the resumed run."""
        self.lines = state_dict["lines"]


def run_name(module: LightningModule) -> str:
    """Method, budget, base and seed, such as `rcp-16-micro-seed0`."""
    return f"{_method(module)}-{format_budget(module.keep)}-{_base(module)}-seed{module.seed}"


def _method(module: LightningModule) -> str:
    return type(module.plugin.pruner).__name__.lower()


def _base(module: LightningModule) -> str:
    return Path(module.plugin.base).name or "model"


def _loggers(trainer: Trainer) -> list[WandbLogger]:
    """W&B loggers; none except on rank zero."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def _layers(trainer: Trainer, name: str) -> list[float]:
    """Values of a metric in the last validation, by layer."""
    found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(f"{name}/layer_")}
    return [float(found[key]) for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]


def _chart(trainer: Trainer, name: str, title: str, lines: dict[int, list[float]]) -> None:
    for logger in _loggers(trainer):
        import wandb

        layers, keys = list(range(len(next(iter(lines.values()))))), [f"step {step}" for step in lines]
        chart = wandb.plot.line_series(layers, list(lines.values()), keys=keys, title=title, xname="decoder layer")
        logger.log_metrics({name: chart}, step=logged_step(trainer))


def _keep(logger: WandbLogger, folder: Path, module: LightningModule, trainer: Trainer) -> None:
    import wandb

    plugin, run = module.plugin, logger.experiment
    accuracy = trainer.callback_metrics.get("val/accuracy/all")
    metadata = {
        "method": spec(plugin.pruner)["class_path"],
        "keep": as_json(plugin.keep),
        "base": plugin.settings()["base"],
        "schedule": plugin.settings()["schedule"],
        "step": trainer.global_step,
        "val/accuracy/all": None if accuracy is None else float(accuracy),
    }
    name = re.sub(r"[^\w.-]", "_", f"plugin-{run.name or run.id}")
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)
