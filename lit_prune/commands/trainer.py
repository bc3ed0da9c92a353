"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with configurations that follow their overrides.

Configurations are OmegaConf: ``${model.keep}`` anywhere in a file is resolved after all files and all options have been
read, so an override moves everything that refers to it. Interpolation works in files, not in values on the command
line. A file or option that swaps a ``class_path`` starts from the defaults of the new class.
"""

import importlib
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from transformers.utils import logging as transformers_logging

from lit_prune.callbacks import NanGuard, SaveLast, StopOnSignal, Stopped, WriteAnswers
from lit_prune.checkpoints import SafeTrainer, newest, saving_folder, verify
from lit_prune.cli import LIGHTNING_VERBS, UsageError
from lit_prune.commands.explain import explain, explain_interpolation, explain_unexpected
from lit_prune.commands.overlays import check_files, config_files, with_resets
from lit_prune.data import InstructData, MicroData, StreamedData  # noqa: F401 (configurations may use short names)
from lit_prune.data.loader import dead_workers_explained
from lit_prune.errors import LitPruneError
from lit_prune.files import written_whole
from lit_prune.strategies import refuse_foreign, refuse_unusable

MODEL = "lit_prune.training.PruneModule"
DATA = "lit_prune.data.InstructData"
SEED = 0
WANDB_RUN = "wandb_run_id"  # beside the checkpoints: the id of the run that wrote them
EVERY_VERB = ("seed_everything", "trainer", "model", "data")
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"Found \d+ module\(s\) in eval mode",  # the frozen model always is
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # DeepSpeed calls it
    r"You are using a custom batch sampler `EvalBatches` for prediction",  # which gives every sample
    r"Checkpoint directory .* exists and is not empty",  # so it is when a run is resumed
)


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved configuration beside the run, as ``config_<verb>.yaml``, and in W&B or TensorBoard.

    A rerun overwrites it, once its checkpoint is loaded: one that is refused leaves the settings of the run before.

    The folder is ``trainer.default_root_dir`` where the configuration sets it, else that of the checkpoints, else the
    logger's.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, on every rank: ``log_dir`` is a broadcast."""
        log_dir = trainer.log_dir
        self.folder = Path(self.config.get("trainer.default_root_dir") or saving_folder(trainer) or log_dir or ".")

    def _save_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when the verb's own loop begins; a validation within `fit` comes here too."""
        super().setup(trainer, pl_module, trainer.state.fn.value)

    on_train_start = on_validation_start = on_test_start = on_predict_start = _save_once

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, without what belongs to one verb only (`ckpt_path`): any verb reads it. Rank zero only."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config = {key: value for key, value in config.items() if key in EVERY_VERB}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"config_{trainer.state.fn.value}.yaml"
        if stage == "fit" and trainer.ckpt_path and file.is_file():
            _tell_changes(yaml.safe_load(file.read_text(encoding="utf-8")), config)
        with written_whole(file) as aside:  # the next start reads it, whatever becomes of this one
            aside.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(config)
                if stage == "fit" and (checkpoints := saving_folder(trainer)):
                    checkpoints.mkdir(parents=True, exist_ok=True)
                    (checkpoints / WANDB_RUN).write_text(f"{logger.experiment.id}\n", encoding="utf-8")
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")


class PruneCLI(LightningCLI):
    """LightningCLI of one verb, or of none: then model, data module and trainer are made and nothing runs.

    Args:
        verb: fit, validate, test or predict; None to build only.
        args: The command line after the verb.
    """

    def __init__(self, verb: str | None, args: list[str]) -> None:
        self.verb = verb
        self.args = args
        check_files(args)
        _hush()
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        kwargs = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            _load(MODEL),
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            trainer_class=SafeTrainer,
            trainer_defaults={"callbacks": [StopOnSignal(), NanGuard(), SaveLast(), WriteAnswers()]},
            seed_everything_default=SEED,
            parser_kwargs={**kwargs, "prog": "lightning", **({verb: dict(kwargs)} if verb else {})},
            auto_configure_optimizers=False,
            args=([verb] if verb else []) + with_resets(args, {"data": DATA}),
            run=verb is not None,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the verb that runs: a parser takes half a second to build."""
        return {verb: skip for verb, skip in LightningCLI.subcommands().items() if verb == self.verb}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data module prepares what the base model reads."""
        parser.set_defaults({"data": {"class_path": DATA}})
        parser.link_arguments("model.base", "data.init_args.base")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; explain what cannot be read."""
        own = self._subcommand_parsers[self.verb] if self.verb else parser
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UsageError(explain(str(error), own, config_files(self.args))) from error
        except OmegaConfBaseException as error:
            raise UsageError(explain_interpolation(error, own, config_files(self.args))) from error
        except Exception as error:  # jsonargparse lets some through: nothing but the user's input is read here
            raise UsageError(explain_unexpected(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put right what Lightning's own parts make of our configurations."""
        trainer = super().instantiate_trainer(**kwargs)
        if not trainer.loggers:  # where it would refuse to run
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, LearningRateMonitor)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
                logger._wandb_init.pop("anonymous", None)  # W&B warns that the setting has no effect, even as None
        return trainer

    def _parse_ckpt_path(self) -> None:
        """A checkpoint brings weights, never settings: those are the configuration's and the command line's."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Only a checkpoint that is whole is used; `last` is the newest one of the run, from wherever it was saved."""
        refuse_unusable(self.trainer)  # here too: before further processes are started
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        given = kwargs.get("ckpt_path")
        if given is None and subcommand == "fit" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            given = "last"  # a job that Slurm has put back into the queue
        if given == "last":
            kwargs["ckpt_path"] = self._newest(subcommand)
        elif given is not None and given not in ("best", "hpc") and "://" not in given:
            verify(Path(given))
        elif given is None and subcommand == "fit":
            self._tell_of_earlier()
        if kwargs.get("ckpt_path"):
            refuse_foreign(Path(kwargs["ckpt_path"]), self.trainer, fit=subcommand == "fit")
            if subcommand == "fit":
                self._go_on_in_wandb(Path(kwargs["ckpt_path"]).with_name(WANDB_RUN))
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb. Where Lightning itself heeds SIGTERM, outside of training, it exits with 0: say so here too."""
        try:
            with dead_workers_explained():
                super()._run_subcommand(subcommand)
        except SIGTERMException as stop:
            raise Stopped(128 + signal.SIGTERM) from stop

    def _go_on_in_wandb(self, file: Path) -> None:
        """A run that goes on from a checkpoint of its own folder is the same run in W&B, unless it was given an id."""
        own = saving_folder(self.trainer)
        if own and file.exists() and file.parent.samefile(own) and "WANDB_RUN_ID" not in os.environ:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger) and logger._wandb_init["id"] is None:
                    logger._wandb_init["id"] = file.read_text(encoding="utf-8").strip()

    def _tell_of_earlier(self) -> None:
        """Say it where a run begins anew beside the checkpoints of another."""
        folder = saving_folder(self.trainer)
        if folder is not None and any(folder.glob("*.ckpt")):
            rank_zero_info(
                f"{folder} has checkpoints of an earlier run, and this one begins anew beside them: to go on with that "
                "one, --ckpt_path last; to keep them apart, another --trainer.default_root_dir"
            )

    def _newest(self, subcommand: str) -> str | None:
        """Only ``fit`` may go on where ``--ckpt_path last`` finds nothing."""
        saving = [callback.dirpath for callback in self.trainer.checkpoint_callbacks if callback.dirpath]
        found = newest({Path(folder) for folder in (*saving, self.trainer.default_root_dir)})
        if found is not None:
            return str(found)
        if subcommand != "fit":
            raise LitPruneError(f"`{subcommand} --ckpt_path last`: no checkpoint has been written yet")
        rank_zero_info("--ckpt_path last: no checkpoint has been written yet; training begins")
        return None


def build(config: str | list[str], overrides: list[str] | None = None) -> PruneCLI:
    """Model, data module and trainer of a configuration (``.model``, ``.datamodule``, ``.trainer``), not run.

    Args:
        config: One or several files, the later ones override.
        overrides: As on the command line: ``["--model.keep=16"]``.
    """
    files = [config] if isinstance(config, str) else config
    return PruneCLI(None, [*(f"--config={file}" for file in files), *(overrides or [])])


def _tell_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say which settings of a run differ from those before it was resumed."""
    old, new = _flat(before), _flat(now)
    changed = [(key, f"{key} {old.get(key)} -> {new.get(key)}") for key in old | new if old.get(key) != new.get(key)]
    if changed:
        told = "; ".join(text if len(text) < 100 else key for key, text in changed)  # a list of loggers is long
        rank_zero_info(f"resumed with other settings than before: {told}")


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {k: v for name, value in node.items() for k, v in _flat(value, f"{key}.{name}" if key else name).items()}


def _load(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _hush() -> None:
    """Silence what tells a user nothing."""
    transformers_logging.disable_progress_bar()
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "💡 Tip" not in record.getMessage())


assert set(LightningCLI.subcommands()) == set(LIGHTNING_VERBS)
