"""Options of the Trainer: validated, and applied to the callbacks and loggers that a configuration brings along."""

from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

from jsonargparse import Namespace
from lightning import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.callbacks import Parts
from lit_prune.commands._support.classes import defaults_of, find_class
from lit_prune.errors import LitPruneError, check_number

WHOLE = {  # smallest value of each option; Lightning would divide by some of them, or ignore a sign
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_nodes": 1,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "reload_dataloaders_every_n_epochs": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
}
SHARES = ("overfit_batches", *(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")))
LARGEST_SEED = 2**32 - 1
SWITCHED = [ProgressBar, ModelSummary, Checkpoint]  # what three options turn off
NEEDS_LOGGER = [LearningRateMonitor, DeviceStatsMonitor]
WRITTEN = (str, int, float, NoneType, list, tuple, dict, Namespace, Path, Enum)  # defaults that YAML has a form for
BAREBONES = (  # what this mode sets itself, and refuses to be given
    "logger",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "num_sanity_val_steps",
    "log_every_n_steps",
)


def check(config: Namespace, fit: bool) -> None:
    """Raise `LitPruneError` for numbers that the Trainer takes and fails at, or ignores, later."""
    seed, options = config.get("seed_everything"), config.get("trainer")
    if not isinstance(seed, bool):
        check_number("seed_everything", seed, least=0, most=LARGEST_SEED, whole=True)
    if not isinstance(options, Namespace):
        raise LitPruneError(f"`trainer`: expected the `key: value` lines of its options, got {options}")
    for name, least in WHOLE.items():
        check_number(f"trainer.{name}", options.get(name), least=least, whole=True)
    for name in SHARES:
        check_number(f"trainer.{name}", options.get(name), least=0)
    check_number("trainer.gradient_clip_val", options.get("gradient_clip_val"), least=0)
    if isinstance(every := options.get("val_check_interval"), int | float):
        check_number("trainer.val_check_interval", every, above=0)
    if not isinstance(tries := options.get("fast_dev_run"), bool):
        check_number("trainer.fast_dev_run", tries, least=0, whole=True)
    if fit and options.get("max_epochs") == -1 and options.get("max_steps") == -1:
        raise LitPruneError(
            "trainer.max_epochs and trainer.max_steps are both -1: learning rate and temperature follow the length of "
            "a run, so it needs one; set either, and trainer.max_time beside it where time is what matters"
        )


def restore_defaults(node: Any) -> None:
    """Put back, in place, defaults that YAML has no form for: a word as itself, others by leaving them out.

    jsonargparse writes a sentence that ends in such a default. An argument with one takes a text too, or the parser
    would have refused the sentence: `torch.device("cpu")` becomes "cpu".
    """
    if isinstance(node, Namespace) and isinstance(arguments := node.get("init_args"), Namespace):
        defaults = defaults_of(find_class(node.get("class_path")))
        for name, value in list(vars(arguments).items()):
            default = defaults.get(name)
            if isinstance(value, str) and not isinstance(default, WRITTEN) and value.endswith(f" {default}"):
                if str(default).replace(":", "").replace("_", "").isalnum():
                    arguments[name] = str(default)
                else:
                    del arguments[name]
    parts = vars(node) if isinstance(node, Namespace) else node
    for value in parts.values() if isinstance(parts, dict) else parts if isinstance(parts, list) else ():
        restore_defaults(value)


def apply_switches(options: dict[str, Any]) -> None:
    """Make the Trainer's options and its callbacks agree, in place: an option that turns a part off removes it.

    Lightning refuses to build a Trainer whose callbacks its options exclude, and our files bring callbacks along.
    """
    if options.get("barebones"):
        options.update(dict.fromkeys(BAREBONES))
        excluded = SWITCHED + NEEDS_LOGGER
    else:
        if options.get("overfit_batches"):
            rank_zero_info("overfit_batches: a run for debugging; it writes no checkpoint, no plug-in and no log")
            options["logger"] = False
        if options.get("overfit_batches") or options.get("fast_dev_run"):
            options["enable_checkpointing"] = False
        switches = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        excluded = [kind for name, kind in zip(switches, SWITCHED, strict=True) if options.get(name) is False]
        excluded += NEEDS_LOGGER if options.get("logger") in (False, []) else []
        _choose_summary(options)
    callbacks = [callback for callback in options["callbacks"] if not isinstance(callback, tuple(excluded))]
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    options["callbacks"] = [callback for callback in callbacks if callback not in bars[:-1]]  # the last one replaces


def _choose_summary(options: dict[str, Any]) -> None:
    """Our table of the model's parts where a table is asked for; by default `fit` says in a line what trains."""
    if options.get("enable_model_summary") and not any(isinstance(c, ModelSummary) for c in options["callbacks"]):
        options["callbacks"].append(Parts())
    options["enable_model_summary"] = False  # or Lightning adds its own


def prepare_finders(callbacks: list[Callback], verb: str | None, streamed: bool) -> None:
    """Let a finder of batch sizes change the size that the verb uses; raises `LitPruneError` where nothing would."""
    finders = [callback for callback in callbacks if isinstance(callback, BatchSizeFinder)]
    if finders and streamed:
        raise LitPruneError("BatchSizeFinder: a stream makes its batches as it is opened; take InstructData to find it")
    for finder in finders:
        if verb not in (None, "fit") and finder._batch_arg_name == "batch_size":
            finder._batch_arg_name = "eval_batch_size"


def checkpoint_folders(options: dict[str, Any]) -> list[Path]:
    """Where the configuration's callbacks save checkpoints, also those that an option turns off."""
    folders = [getattr(callback, "dirpath", None) for callback in options["callbacks"]]
    return [Path(folder) for folder in folders if folder]


def as_list(value: Callback | Logger | list | None) -> list:
    """One of a kind, several, or none, as a new list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
