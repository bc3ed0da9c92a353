"""Finders of learning rates and batch sizes, and settings that change on resume: what is said is what is used."""

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from tiny import trainer

from lit_prune.commands._support.trainer_options import prepare_finders
from lit_prune.errors import LitPruneError
from lit_prune.training.optimizer import warm_cosine


class Steps(Callback):
    """Samples, learning rates and loss of each step."""

    def __init__(self) -> None:
        self.records: list[list[int]] = []
        self.rates: list[list[float]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.records.append(list(batch["records"]))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(student, world, folder, *callbacks: Callback, options=(), **limits):
    """A run; what its steps used, and its module and data."""
    steps, module, data = Steps(), student(**dict(options)), world()
    trainer(folder, [*callbacks, steps], **limits).fit(module, data)
    return steps, module, data


def test_the_learning_rate_that_is_found_is_the_one_that_is_used(student, world, tmp_path):
    finder = LearningRateFinder(min_lr=1e-6, max_lr=1e-3, num_training_steps=15)
    steps, module, _ = fit(student, world, tmp_path, finder, max_steps=4)
    found = finder.optimal_lr.suggestion()
    assert module.lr == found != 3e-3
    course = warm_cosine(4, module.warmup, module.final_lr)
    assert steps.rates == [[pytest.approx(found * course(step))] * 2 for step in range(4)]


def test_looking_for_a_rate_changes_nothing_else(student, world, tmp_path):
    """The same samples, noise and weights as without the search."""
    plain, *_ = fit(student, world, tmp_path / "plain", max_steps=3)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    searched, *_ = fit(student, world, tmp_path / "searched", finder, max_steps=3)
    for name in ("records", "rates", "losses"):
        assert getattr(plain, name) == getattr(searched, name), name
    assert list((tmp_path / "searched").iterdir()) == []


@pytest.mark.parametrize(("trials", "size"), [(2, 4), (9, 12)])
def test_the_batch_size_that_is_found_is_the_one_that_is_used(student, world, tmp_path, trials, size):
    """Doubled from 2; at most one batch of all 12 samples. The learning rate's course follows the number of steps."""
    finder = BatchSizeFinder(max_trials=trials, steps_per_trial=1)
    steps, module, data = fit(student, world, tmp_path, finder, max_epochs=1)
    assert finder.optimal_batch_size == data.batch_size == size
    assert [len(records) for records in steps.records] == [size] * (12 // size)
    course = warm_cosine(12 // size, module.warmup, module.final_lr)
    assert [rates[0] for rates in steps.rates] == [pytest.approx(3e-3 * course(i)) for i in range(12 // size)]


def test_a_verb_that_measures_looks_for_its_own_batch_size():
    for verb, name in (("fit", "batch_size"), ("validate", "eval_batch_size"), ("predict", "eval_batch_size")):
        finder = BatchSizeFinder()
        prepare_finders([finder], verb, streamed=False)
        assert finder._batch_arg_name == name
    with pytest.raises(LitPruneError, match="a stream makes its batches as it is opened"):
        prepare_finders([BatchSizeFinder()], "fit", streamed=True)


def test_settings_on_resume_are_the_ones_that_are_used(student, world, tmp_path):
    """A checkpoint brings a place in the schedule, no rates and no weight decay."""
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
    fit(student, world, tmp_path, saver, max_steps=2)
    for options in ({}, {"lr": 1e-3, "repair_lr": 2e-3, "weight_decay": 0.5, "final_lr": 0.2}):
        steps, module = Steps(), student(**options)
        run = trainer(tmp_path, [steps], max_steps=4)
        run.fit(module, world(), ckpt_path=tmp_path / "last.ckpt")
        course = warm_cosine(4, module.warmup, module.final_lr)
        repair = module.lr if module.repair_lr is None else module.repair_lr
        expected = [[module.lr * course(step), repair * course(step)] for step in (2, 3)]
        assert steps.rates == [pytest.approx(rates) for rates in expected]
        assert {group["weight_decay"] for group in run.optimizers[0].param_groups} == {module.weight_decay}
