"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with configurations that follow their overrides.

Configurations are OmegaConf: ``${model.keep}`` anywhere in a file is resolved after all files and all options have been
read, so an override moves everything that refers to it. Interpolation works in files, not in values on the command
line. A file or option that swaps a ``class_path`` starts from the defaults of the new class.
"""

import importlib
import logging
import re
import signal
import warnings
from enum import Enum
from importlib.util import find_spec
from typing import Any

import lightning
import yaml
from jsonargparse import set_parsing_settings
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_prune.callbacks import (
    Limits,
    Monitors,
    NanGuard,
    PrintResults,
    SaveConfig,
    SaveLast,
    StopOnSignal,
    Stopped,
    WriteAnswers,
    WriteScores,
    WriteSubmissions,
)
from lit_prune.callbacks.settings import settings_of
from lit_prune.commands import LIGHTNING_VERBS
from lit_prune.commands._support import trainer_options, yaml_loader
from lit_prune.commands._support.diagnosis import explain
from lit_prune.commands._support.options import HelpFormatter, check_values
from lit_prune.commands._support.resuming import choose_checkpoint, note_untrained
from lit_prune.commands._support.suggest import in_short
from lit_prune.commands._support.traces import Traces
from lit_prune.commands._support.trainer_parser import ConfigFile, PruneParser
from lit_prune.data import BenchmarkData, InstructData, MicroData, StreamedData  # noqa: F401 (configurations may use short names)
from lit_prune.data.loader import dead_workers_explained
from lit_prune.errors import LitPruneError, UsageError, extra
from lit_prune.loading import hide_progress
from lit_prune.training.averaging import of_plugin
from lit_prune.training.checkpoints import SafeTrainer
from lit_prune.training.debug_modes import DEBUG_MODES
from lit_prune.training.strategies import refuse_unusable

MODEL = "lit_prune.training.PruneModule"
DATA = "lit_prune.data.InstructData"
SEED = 0
DEFAULT_CALLBACKS = (
    StopOnSignal,
    NanGuard,
    Limits,
    SaveLast,
    WriteAnswers,
    WriteSubmissions,
    WriteScores,
    PrintResults,
)
EXAMPLES = {
    "fit": [
        "lightning fit -c micro.yaml",
        "lightning fit -c micro.yaml --ckpt_path last --trainer.max_steps 400",
        "lightning fit -c micro.yaml -c pruners/dcp_rcp.yaml --model.keep 8 --trainer.default_root_dir runs/dcp_rcp",
    ],
    "validate": ["lightning validate -c micro.yaml --ckpt_path last"],
    "test": [
        "lightning test -c micro.yaml --ckpt_path last",
        "lightning test -c micro.yaml -c pruners/fastv.yaml --trainer.default_root_dir runs/fastv",
    ],
    "predict": ["lightning predict -c micro.yaml --ckpt_path last"],
}
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))  # of defaults
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"Found \d+ module\(s\) in eval mode",  # the frozen model always is
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # DeepSpeed calls it
    r"You are using a custom batch sampler `EvalBatches` for prediction",  # which gives every sample
    r"Total length of `Loader` across ranks is zero",  # all questions of a benchmark are answered already
    r"Checkpoint directory .* exists and is not empty",  # so it is when a run is resumed
)
SPEAKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
UNSAID = re.compile(  # settings that are as they were given, and hardware that is not there
    r"(\[rank: \d+\] )?Seed set to|GPU available: False|TPU available: False|💡 Tip"
    r"|Loading `train_dataloader` to estimate|`Trainer\(\w+=[\d.]+\)` was configured so|`weights_only` was not set"
)


class PruneCLI(LightningCLI):
    """LightningCLI of one verb, or of none: then model, data module and trainer are made and nothing runs.

    Args:
        verb: fit, validate, test or predict; None to build only.
        args: The command line after the verb.
        reads: The verb whose data are checked before a model is loaded; by default the one that runs.
    """

    def __init__(self, verb: str | None, args: list[str], reads: str | None = None) -> None:
        self.verb, self.reads = verb, reads or verb
        self.refused: list[tuple[type, Exception]] = []
        if find_spec("wandb") is None:  # the options of its logger would be unknown keys
            raise LitPruneError(f"this verb needs wandb, which is not installed: {extra('train')}")
        _hush()
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        yaml_loader.install("omegaconf+")
        kwargs = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
        main = {"prog": "lightning", "formatter_class": HelpFormatter}
        super().__init__(
            _load(MODEL),
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            trainer_class=SafeTrainer,
            parser_class=PruneParser,
            trainer_defaults={
                "callbacks": [kind() for kind in DEFAULT_CALLBACKS],
                "enable_model_summary": False,  # it would count no FLOPs; `fit` says what trains and what is frozen
            },
            seed_everything_default=SEED,
            parser_kwargs={**kwargs, **main, **({verb: {**kwargs, **_help(verb)}} if verb else {})},
            auto_configure_optimizers=False,
            args=[verb, *args] if verb else args,
            run=verb is not None,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the verb that runs: a parser takes half a second to build."""
        return {verb: skip for verb, skip in LightningCLI.subcommands().items() if verb == self.verb}

    def init_parser(self, **kwargs: Any) -> PruneParser:
        """A parser that looks configuration files up."""
        parser = PruneParser(dump_header=[f"lightning.pytorch=={lightning.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="Path to a configuration file in YAML or JSON.")
        return parser

    def add_arguments_to_parser(self, parser: PruneParser) -> None:
        """The data module prepares what the base model reads."""
        parser.watch_options()
        parser.set_defaults({"data": {"class_path": DATA}})
        parser.link_arguments("model.base", "data.init_args.base")

    def parse_arguments(self, parser: PruneParser, args: list[str]) -> None:
        """Parse; explain what cannot be read."""
        own = self._subcommand_parsers[self.verb] if self.verb else parser
        try:
            self.config = parser.parse_args(args)
        except UsageError:
            raise
        except Exception as error:  # nothing but the user's input is read here
            raise explain(error, own) from error
        chosen = self.config[self.verb] if self.verb else self.config
        check_values(chosen)
        trainer_options.restore_defaults(chosen)
        trainer_options.check(chosen, fit=self.verb == "fit")

    def instantiate_classes(self) -> None:
        """Make what the configuration names; explain what its constructors refuse."""
        try:
            self.parser.add_instantiator(self._make, object, subclasses=True, prepend=False)
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            if not self.refused:
                raise
            kind, refusal = self.refused[-1]
            if isinstance(refusal, LitPruneError):
                raise refusal from error
            raise UsageError(f"`{kind.__name__}`: {in_short(refusal)}") from error

    def _make(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        """Make a part of the model or the trainer; remember what refuses to be made."""
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            self.refused.append((kind, error))
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Make the Trainer with the callbacks and loggers that its options allow."""
        given = [of_plugin(callback) for callback in trainer_options.as_list(config.get("callbacks"))]
        config["callbacks"] = [Monitors(), *given]
        self.checkpoints = trainer_options.checkpoint_folders(config)
        trainer_options.apply_switches(config)
        trainer_options.prepare_finders(config["callbacks"], self.verb, isinstance(self.datamodule, StreamedData))
        if any(config.get(mode) for mode in DEBUG_MODES):
            self.save_config_callback = None
        return super()._instantiate_trainer(config, callbacks)

    def before_instantiate_classes(self) -> None:
        """Data that are missing end a run here, before a model is loaded and a logger has begun anything."""
        self.checked: InstructData | None = None
        spec = (self.config[self.verb] if self.verb else self.config).data
        kind = _load(spec.class_path)
        if self.reads and isinstance(kind, type) and issubclass(kind, InstructData):
            self.checked = kind(**spec.init_args.as_dict())
            self.checked.check(self.reads)

    def after_instantiate_classes(self) -> None:
        """Reuse the data opened by the check."""
        if self.checked is not None:
            self.datamodule.opened = self.checked.opened

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put right what Lightning's own parts make of our configurations."""
        trainer = super().instantiate_trainer(**kwargs)
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
        if "verbose" in kwargs:  # for our own table
            for callback in self.trainer.callbacks:
                if isinstance(callback, PrintResults):
                    callback.on = kwargs["verbose"]
            kwargs["verbose"] = False
        kwargs["ckpt_path"] = choose_checkpoint(self.trainer, self.checkpoints, subcommand, kwargs.get("ckpt_path"))
        if kwargs["ckpt_path"] is None and subcommand != "fit" and getattr(self.model, "untrained", False):
            note_untrained(self.trainer, self.checkpoints)
        if settings := settings_of(self.trainer):
            settings.checkpoint = kwargs["ckpt_path"]
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb. A run that never has a batch leaves no logs.

        Where Lightning itself heeds SIGTERM, outside of training, it exits with 0: say so here too.
        """
        traces, settings = Traces(self.trainer), settings_of(self.trainer)
        try:
            with dead_workers_explained():
                super()._run_subcommand(subcommand)
        except SIGTERMException as stop:
            raise Stopped(128 + signal.SIGTERM) from stop
        finally:
            if settings is not None and not settings.already_saved:
                traces.remove()


def build(config: str | list[str], overrides: list[str] | None = None, reads: str | None = None) -> PruneCLI:
    """Model, data module and trainer of a configuration (``.model``, ``.datamodule``, ``.trainer``), not run.

    Args:
        config: One or several files, the later ones override.
        overrides: As on the command line: ``["--model.keep=16"]``.
        reads: The verb whose data are checked before the model is loaded, if any.
    """
    files = [config] if isinstance(config, str) else config
    return PruneCLI(None, [*(f"--config={file}" for file in files), *(overrides or [])], reads)


def _help(verb: str) -> dict[str, Any]:
    """Beginning and end of a verb's `--help`, which lists some hundred options in between."""
    about = f"{LIGHTNING_VERBS[verb]}\nLater files win over earlier ones, and options over files."
    more = [
        f"lightning {verb} -c FILE --print_config    shows what all files and options come to",
        "--data.help CLASS, --model.pruner.help CLASS    show the options of a class",
        "`lit-prune configs` lists the files that come with the package",
    ]
    lines = ["examples:", *(f"  {line}" for line in EXAMPLES[verb]), "", *more]
    usage = f"lightning {verb} -c FILE [-c FILE ...] [--option value ...]"
    return {"usage": usage, "description": about, "epilog": "\n".join(lines)}


def _load(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _hush() -> None:
    """Silence what tells a user nothing."""
    hide_progress()
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in SPEAKERS:
        logging.getLogger(name).addFilter(lambda record: not UNSAID.match(record.getMessage()))


assert set(LightningCLI.subcommands()) == set(LIGHTNING_VERBS)
