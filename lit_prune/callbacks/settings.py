"""Save the resolved configuration of a run in its folder."""

from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.errors import LitPruneError
from lit_prune.files.writing import written_whole
from lit_prune.files.yaml_files import read_yaml
from lit_prune.training.checkpoints import saving_folder
from lit_prune.training.loggers import MLflow, Trackio

WANDB_RUN = "wandb_run_id"  # file next to the checkpoints with the W&B id of their run
LONGEST_HEAD = 5000  # bytes of the first line, which may hold a long path
EVERY_VERB = ("seed_everything", "trainer", "model", "data")


class SaveConfig(SaveConfigCallback):
    """Save the resolved configuration of a run as ``config_<verb>.yaml``, and in W&B or TensorBoard.

    It is written at the first batch, so a run that fails before keeps the previous file. `fit` overwrites its own file,
    like its plug-in. Other verbs only overwrite a file with the same settings and checkpoint; other settings, for
    example of another method, are written as ``config_test_2.yaml``, and further outputs get the same number.

    The folder is ``trainer.default_root_dir`` if the configuration sets it, otherwise that of the checkpoints or of the
    logger.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False, **kwargs)
        self.checkpoint: str | None = None  # loaded by the verb; set before it runs
        self.file: Path | None = None
        self.suffix = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the file; on every rank, since ``log_dir`` is a broadcast."""
        log_dir = trainer.log_dir
        folder = Path(self.config.get("trainer.default_root_dir") or saving_folder(trainer) or log_dir or ".")
        verb = trainer.state.fn.value
        content = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        self.content = {key: value for key, value in content.items() if key in EVERY_VERB}  # what any verb reads
        self.head = "" if verb == "fit" else f"# checkpoint: {self.checkpoint or 'none'}\n"
        self.suffix = trainer.strategy.broadcast("" if verb == "fit" else self._free_suffix(folder, verb))
        self.file = folder / f"config_{verb}{self.suffix}.yaml"

    def _free_suffix(self, folder: Path, verb: str) -> str:
        """Suffix of the first file that doesn't exist or has the same settings."""
        suffixes = ("" if number == 1 else f"_{number}" for number in count(1))
        return next(suffix for suffix in suffixes if self._may_write(folder / f"config_{verb}{suffix}.yaml"))

    def _may_write(self, file: Path) -> bool:
        """True unless the file exists with other settings or another checkpoint."""
        if not file.is_file():
            return True
        head = file.read_bytes()[:LONGEST_HEAD].decode(errors="replace").partition("\n")[0]
        same_weights = f"{head}\n" == self.head or not head.startswith("#")  # files of before 2026-12 don't say
        return same_weights and _settings(file) == self.content

    def _save_once(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save at the first batch of the verb; also called by validation within `fit`."""
        super().setup(trainer, pl_module, trainer.state.fn.value)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _save_once

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file. Rank zero only."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if stage == "fit" and trainer.ckpt_path and self.file.is_file():
            _report_changes(_settings(self.file), self.content)
        text = yaml.safe_dump(self.content, sort_keys=False)
        with written_whole(self.file) as aside:  # atomic, since the next start reads it
            aside.write_text(self.head + text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(self.content)
                if stage == "fit" and (checkpoints := saving_folder(trainer)):
                    checkpoints.mkdir(parents=True, exist_ok=True)
                    (checkpoints / WANDB_RUN).write_text(f"{logger.experiment.id}\n", encoding="utf-8")
            elif isinstance(logger, MLflow | Trackio):
                logger.log_hyperparams(self.content)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", f"```yaml\n{text}```")


def settings_of(trainer: Trainer) -> SaveConfig | None:
    """Find the callback that saves the configuration; None outside the command line and in debug runs."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, SaveConfig)), None)


def output_suffix(trainer: Trainer) -> str:
    """Suffix of a verb's output files: the number of its settings, such as `_2`; empty for the first."""
    settings = settings_of(trainer)
    return "" if settings is None else settings.suffix


def _settings(file: Path) -> dict[str, Any]:
    """The settings in a file; empty if it can't be read."""
    try:
        return read_yaml(file)
    except LitPruneError:
        return {}


def _report_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Log the settings that changed since the run was last started."""
    old, new = _flat(before), _flat(now)
    changed = [(key, f"{key} {old.get(key)} -> {new.get(key)}") for key in old | new if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(text if len(text) < 100 else key for key, text in changed)  # a list of loggers is long
        rank_zero_info(f"resumed with other settings than before: {listed}")


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Flatten to leaves by dotted key."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {k: v for name, value in node.items() for k, v in _flat(value, f"{key}.{name}" if key else name).items()}
