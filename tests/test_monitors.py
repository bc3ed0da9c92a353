"""Callbacks that watch a metric by a name that nothing logs: told in one line, when training starts if possible."""

from fnmatch import fnmatchcase

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import trainer

from lit_prune.callbacks import Monitors, Throughput
from lit_prune.errors import LitPruneError
from lit_prune.training.logging import NAMES
from lit_prune.training.losses import LossWeights

LIMITS = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1}


def fit(student, world, folder, *callbacks: Callback, **options):
    run = trainer(folder, [Monitors(), *callbacks], **{**LIMITS, **options})
    run.fit(student(), world())
    return run


def test_every_metric_that_a_run_logs_has_a_name_that_may_be_watched(student, world, tmp_path):
    module = student("threshold", loss=LossWeights(distill=1.0, attention=1.0), watch=[8])
    run = trainer(tmp_path, [Throughput()], **LIMITS)
    run.fit(module, world())
    unnamed = [name for name in run.callback_metrics if not any(fnmatchcase(name, pattern) for pattern in NAMES)]
    assert len(run.callback_metrics) > 80
    assert unnamed == []


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (EarlyStopping("val/accuracy"), r"^EarlyStopping: no metric `val/accuracy` .* `val/accuracy/all`"),
        (EarlyStopping("val_loss"), r"no metric `val_loss` is logged; there is `"),
        (EarlyStopping("train_loss"), "no metric `train_loss`"),
        (EarlyStopping("accuracy"), "`val/accuracy/all`"),
        (ModelCheckpoint(monitor="val/agrement"), "^ModelCheckpoint: no metric `val/agrement` .*`val/agreement`"),
        (ModelCheckpoint(monitor="loss_total"), "`loss/total`"),
    ],
    ids=lambda value: getattr(value, "monitor", ""),
)
def test_a_name_that_nothing_logs_is_refused_before_the_first_step(student, world, tmp_path, callback, says):
    stepped = []
    watcher = Callback()
    watcher.on_train_batch_start = lambda *_: stepped.append(1)
    with pytest.raises(LitPruneError, match=says) as caught:
        fit(student, world, tmp_path, watcher, callback)
    assert stepped == []
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_name_that_only_looks_right_is_refused_after_the_first_validation(student, world, tmp_path):
    says = r"no metric `val/.*` is logged; there is `val/(accuracy/all|w2/layer_9)`"
    for callback in (EarlyStopping("val/accuracy/al"), ModelCheckpoint(tmp_path, monitor="val/w2/layer_99")):
        with pytest.raises(LitPruneError, match=says):
            fit(student, world, tmp_path, callback)


def test_what_validation_measures_needs_validation(student, world, tmp_path):
    with pytest.raises(LitPruneError, match=r"which validation measures, and trainer\.limit_val_batches is 0"):
        fit(student, world, tmp_path, EarlyStopping("val/accuracy/all", mode="max"), limit_val_batches=0)


def test_right_names_train(student, world, tmp_path):
    """Also one that a callback of another project logs."""

    class Own(Callback):
        def on_validation_epoch_end(self, trainer, module) -> None:
            module.log("mine", 1.0)

    callbacks = [
        EarlyStopping("val/accuracy/all", mode="max"),
        EarlyStopping("loss/total"),
        EarlyStopping("nothing", strict=False),
        ModelCheckpoint(tmp_path, monitor="step", mode="max"),
    ]
    assert fit(student, world, tmp_path, *callbacks).global_step == 2
    Own.__module__ = "elsewhere"
    assert fit(student, world, tmp_path, Own(), EarlyStopping("mine")).global_step == 2
