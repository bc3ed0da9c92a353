"""Averages of weights: of the plug-in alone, through checkpoints, validation, resume and export."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import Cut, PowerCut
from lightning import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny import same, trainer

from lit_prune.callbacks import ExportPlugin
from lit_prune.commands import export
from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.training.averaging import of_plugin

DECAY = 0.9
KINDS = {
    "EMA": lambda: EMAWeightAveraging(decay=DECAY),
    "mean": WeightAveraging,
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1),
}


def copied(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Notes(Callback):
    """The plug-in's weights after each step, and in each validation."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.validated: list[dict] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.steps.append(copied(module.plugin))

    def on_validation_batch_start(self, trainer, module, *args) -> None:
        self.validated.append(copied(module.plugin))


def moving_average(steps: list[dict]) -> dict[str, torch.Tensor]:
    """As EMAWeightAveraging makes it: the first step's weights, then a share of each further one's."""
    average = dict(steps[0])
    for weights in steps[1:]:
        average = {name: torch.lerp(value, weights[name], 1 - DECAY) for name, value in average.items()}
    return average


def near(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)


def test_a_moving_average_is_validated_saved_and_exported_and_the_frozen_model_stays(student, world, tmp_path, capsys):
    module, notes = student(), Notes()
    frozen = copied(module.model)
    callbacks = [of_plugin(EMAWeightAveraging(decay=DECAY)), notes, saver(tmp_path), ExportPlugin(tmp_path / "plugin")]
    run = trainer(tmp_path, callbacks, max_steps=3, limit_val_batches=1, val_check_interval=2)
    run.fit(module, world())
    average = moving_average(notes.steps)
    assert near(notes.validated[0], moving_average(notes.steps[:2]))
    assert near(copied(module.plugin), average)
    assert not near(average, notes.steps[-1])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == {f"plugin.{name}" for name in average}
    assert set(saved["averaging_state"]) == {"n_averaged"}
    assert near({f"plugin.{name}": value for name, value in average.items()}, saved["state_dict"])
    assert same({f"plugin.{name}": value for name, value in notes.steps[-1].items()}, saved["current_model_state"])
    assert near(copied(Plugin.from_pretrained(tmp_path / "plugin")), average)
    assert same(copied(module.model), frozen)
    export.run(tmp_path / "last.ckpt", tmp_path / "exported")
    assert near(copied(Plugin.from_pretrained(tmp_path / "exported")), average)
    assert "weights: the average of the run's weights" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_average_equals_an_uninterrupted_one(student, world, tmp_path, kind):
    """Two epochs of three steps, cut off in the second one, behind a validation."""
    ends = []
    for name in ("whole", "cut"):
        folder, module = tmp_path / name, student()
        options = {"max_epochs": 2, "limit_val_batches": 1, "val_check_interval": 2}
        if name == "cut":
            with pytest.raises(PowerCut):
                trainer(folder, [of_plugin(KINDS[kind]()), saver(folder), Cut(5)], **options).fit(module, world())
            module = student()
        path = folder / "last.ckpt"
        run = trainer(folder, [of_plugin(KINDS[kind]()), saver(folder)], **options)
        run.fit(module, world(), ckpt_path=path if path.exists() else None)
        assert run.global_step == 6
        saved = torch.load(path, weights_only=True)
        ends.append([copied(module.plugin), saved["state_dict"], saved.get("current_model_state")])
    assert same(*ends)


def test_a_run_that_is_stopped_during_validation_resumes_both(student, world, tmp_path):
    """Then the module has the average and the average the module's weights."""

    class SaveInside(Callback):
        def on_validation_batch_start(self, trainer, module, *args) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    notes = Notes()
    callbacks = [of_plugin(EMAWeightAveraging(decay=DECAY)), notes, SaveInside()]
    trainer(tmp_path, callbacks, max_steps=2, limit_val_batches=1, val_check_interval=2).fit(student(), world())
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert near({f"plugin.{k}": v for k, v in moving_average(notes.steps).items()}, saved["state_dict"])
    assert same({f"plugin.{k}": v for k, v in notes.steps[-1].items()}, saved["current_model_state"])


def test_an_average_that_never_began_is_not_what_training_ends_with(student, world, tmp_path):
    """Lightning would put back the weights of the start."""
    module, notes = student(), Notes()
    callbacks = [of_plugin(EMAWeightAveraging(update_starting_at_step=100)), notes, saver(tmp_path)]
    trainer(tmp_path, callbacks, max_steps=2, limit_val_batches=1, val_check_interval=2).fit(module, world())
    assert same(copied(module.plugin), notes.steps[-1])
    assert same(notes.validated[0], notes.steps[-1])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(saved["state_dict"], {f"plugin.{name}": value for name, value in notes.steps[-1].items()})


def test_a_plain_checkpoint_starts_an_average(student, world, tmp_path):
    trainer(tmp_path, [saver(tmp_path)], max_steps=1).fit(student(), world())
    module = student()
    run = trainer(tmp_path, [of_plugin(EMAWeightAveraging())], max_steps=2)
    run.fit(module, world(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 2
    run.test(module, world(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_the_whole_module_is_refused(student, world, tmp_path, kind):
    callback = KINDS[kind]()
    with pytest.raises(LitPruneError, match=r"would copy, average and save the frozen model: .*of_plugin\("):
        trainer(tmp_path, [callback], max_steps=1).fit(student(), world())
    strategy = object.__new__(DeepSpeedStrategy)
    with pytest.raises(LitPruneError, match="averages whole weights, which DeepSpeed splits"):
        of_plugin(callback).setup(SimpleNamespace(strategy=strategy), None, "fit")
