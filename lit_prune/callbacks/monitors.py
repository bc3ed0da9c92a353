"""Names of metrics that callbacks watch."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from lightning import Callback, LightningModule, Trainer

from lit_prune.errors import LitPruneError
from lit_prune.training.logging import NAMES

ALWAYS = ("epoch", "step")  # `ModelCheckpoint` knows these by itself
EXAMPLES = {"*": "total", "accuracy/*": "accuracy/all", "layer_*": "layer_0"}
NEAR, ALIKE = 3, 0.5
OURS = ("lightning.", "lit_prune.")


class Monitors(Callback):
    """Refuses a callback that watches a metric which nothing logs: `EarlyStopping`, `ModelCheckpoint` and their like.

    When training starts, if all that logs is ours, by the names that a run may log; after the first validation by those
    that it did log. Lightning would fail at the end of an epoch, or warn and never save. It stands before the callbacks
    that it checks.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `LitPruneError` for a name that no part of a run logs."""
        parts = [type(part).__module__ for part in (pl_module, *trainer.callbacks)]
        if not all(name.startswith(OURS) for name in parts):  # another's may log anything
            return
        for name, metric in _watched(trainer):
            if not any(fnmatchcase(metric, pattern) for pattern in (*NAMES, *ALWAYS)):
                raise LitPruneError(_unknown(name, metric, map(_example, NAMES)))
            if metric.startswith("val") and not trainer.limit_val_batches:
                raise LitPruneError(
                    f"{name} watches `{metric}`, which validation measures, and trainer.limit_val_batches is 0"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `LitPruneError` for a name that was not logged up to the first validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for name, metric in _watched(trainer):
            if metric not in trainer.callback_metrics and metric not in ALWAYS:
                raise LitPruneError(_unknown(name, metric, trainer.callback_metrics))


def _watched(trainer: Trainer) -> list[tuple[str, str]]:
    """Callbacks by name and what they watch, without those that put up with a missing metric."""
    found = [(callback, getattr(callback, "monitor", None)) for callback in trainer.callbacks]
    return [(type(c).__name__, metric) for c, metric in found if metric and getattr(c, "strict", True)]


def _unknown(name: str, metric: str, known: Iterable[str]) -> str:
    """A message with the metrics that were probably meant."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(metric, known, n=NEAR, cutoff=ALIKE)
    near = near or [found for found in known if found.startswith(("val/accuracy", "loss/total"))][:NEAR]
    return f"{name}: no metric `{metric}` is logged; there is {', '.join(f'`{found}`' for found in near)}"


def _example(pattern: str) -> str:
    """Example of a name that matches a pattern."""
    for part, example in EXAMPLES.items():
        if part != "*":
            pattern = pattern.replace(part, example)
    return pattern.replace("*", EXAMPLES["*"])
