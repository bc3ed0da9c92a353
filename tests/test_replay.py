"""A NaN or infinite loss stops a run with its weights untouched and the step kept; the step runs again the same."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import ROOT, trainer
from torch.utils.data import DataLoader

from lit_prune.callbacks import NanGuard
from lit_prune.cli import main
from lit_prune.errors import LitPruneError
from lit_prune.micro.model import build
from lit_prune.training.losses import LossWeights
from lit_prune.training.replay import load_step, replay


class KeepEvery(NanGuard):
    """Keeps every step, though nothing is wrong with it."""

    def on_after_backward(self, trainer, pl_module) -> None:
        self._save(trainer, pl_module)
        super().on_after_backward(trainer, pl_module)


@pytest.fixture(scope="module")
def data(world):
    made = world()
    made.prepare_data()
    made.setup("fit")
    return next(iter(made.train_dataloader()))


def spoilt(batch: dict, sample: int) -> dict:
    """A batch with an infinite pixel in one sample."""
    pixels = batch["inputs"]["pixel_values"].clone()
    pixels[sample, 0, 5, 5] = float("inf")
    return {**batch, "inputs": {**batch["inputs"], "pixel_values": pixels}}


def fit(folder, module, batches, guard=None, **options):
    run = trainer(folder, [guard or NanGuard()], max_steps=len(batches), **options)
    run.fit(module, DataLoader(batches, batch_size=None))
    return run


def test_a_kept_step_gives_the_same_losses_bit_for_bit(student, world, tmp_path):
    """With noise and dropout, of the second step, in a module made anew."""
    module = student(loss=LossWeights(distill=1.0))
    run = trainer(tmp_path, [KeepEvery()], max_steps=2, log_every_n_steps=1)
    run.fit(module, world())
    saved = load_step(tmp_path / "nonfinite" / "step-000001-rank-0.safetensors")
    found = replay(student(loss=LossWeights(distill=1.0), seed=5), saved)
    assert found.finite
    assert found.total == saved.loss
    logged = {k.removeprefix("loss/"): v.item() for k, v in run.callback_metrics.items() if k.startswith("loss/")}
    assert {**found.losses, "total": found.total} == {k: pytest.approx(v, rel=1e-7) for k, v in logged.items()}


def test_an_infinite_pixel_stops_the_run_before_it_changes_a_weight(student, data, tmp_path):
    module, healthy = student(), student()
    fit(tmp_path / "healthy", healthy, [data])
    name = data["ids"][2]
    with pytest.raises(LitPruneError, match=rf"loss is not finite at step 1 .*{name}.*lit-prune replay .*000001"):
        fit(tmp_path, module, [data, spoilt(data, 2)])
    for one, other in zip(module.plugin.parameters(), healthy.plugin.parameters(), strict=True):
        assert torch.equal(one, other)
    found = replay(student(), load_step(tmp_path / "nonfinite" / "step-000001-rank-0.safetensors"))
    assert not found.finite
    assert found.first == f"the batch's pixel_values, sample {name}"


def test_a_gradient_alone_stops_the_run_too(student, data, tmp_path):
    """The loss is fine, and the step would leave NaN behind."""
    module = student()
    module.plugin.repair.adapters[0].alpha.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(LitPruneError, match="gradient is not finite at step 0"):
        fit(tmp_path, module, [data])
    assert all(p.isfinite().all() for p in module.plugin.parameters())


def test_the_first_part_that_fails_is_named(student, data, tmp_path):
    """Finite inputs and weights, too large for one another."""
    module = student()
    with torch.no_grad():
        module.plugin.pruner.scorers[1].visual.weight.fill_(3e38)
    with pytest.raises(LitPruneError, match="not finite"):
        fit(tmp_path, module, [data])
    found = replay(student(), load_step(tmp_path / "nonfinite" / "step-000000-rank-0.safetensors"))
    assert found.first.startswith("the student's plugin.pruner.scorers.1.visual")


def test_a_step_of_another_plug_in_and_other_files_are_refused(student, data, tmp_path):
    with pytest.raises(LitPruneError):
        fit(tmp_path, student(), [spoilt(data, 0)])
    file = tmp_path / "nonfinite" / "step-000000-rank-0.safetensors"
    with pytest.raises(LitPruneError, match="another plug-in"):
        replay(student(queries=8), load_step(file))
    (tmp_path / "x").write_bytes(file.read_bytes()[:-100])
    for wrong in ("x", "missing"):
        with pytest.raises(LitPruneError, match="is no step that `fit` has saved"):
            load_step(tmp_path / wrong)


def test_by_the_commands(tmp_path, capsys):
    """A base with a broken weight: `fit` stops by itself, `replay FILE` finds it by the run's own configuration."""
    model, processor = build(seed=0)
    with torch.no_grad():
        model.model.language_model.layers[3].mlp.down_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = {"train_samples": 4, "val_samples": 2, "test_samples": 2, "batch_size": 4, "root": str(tmp_path / "world")}
    config = yaml.safe_load((ROOT / "configs" / "micro.yaml").read_text())
    config["data"]["init_args"] = data
    config["model"] |= {"base": str(tmp_path / "base")}
    config["trainer"] = {"default_root_dir": str(tmp_path), "logger": False, "accelerator": "cpu", "max_steps": 1}
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(tmp_path / "micro.yaml")])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    file = said.split("lit-prune replay ")[1].strip().replace("\n", "")
    with pytest.raises(SystemExit) as stop:
        main(["replay", file])
    assert stop.value.code == 1
    assert "language_model.layers.3.mlp.down_proj.weight" in capsys.readouterr().err.replace("\n", "")


TWO_RANKS = """
import sys
from pathlib import Path
from tiny import trainer
from torch.utils.data import DataLoader
from lit_prune.callbacks import NanGuard
from lit_prune.data import MicroData
from lit_prune.pruners.rcp import RCP
from lit_prune.training.module import PruneModule

class Spoilt(PruneModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_rank else 1.0)


base, root = sys.argv[1:]
data = MicroData(base, root, train_samples=12, val_samples=6, test_samples=6, questions_per_image=3, batch_size=4)
module = Spoilt(base, RCP(layers=[1], stage_ratios=[1.0], inner=16, select="topk"), keep=16)
run = trainer(Path(root), [NanGuard()], max_steps=2, devices=2, strategy="ddp", accumulate_grad_batches=2)
run.fit(module, data)
"""


@pytest.mark.slow
def test_ranks_stop_together_though_one_of_them_is_fine(micro_folder, tmp_path):
    """While gradients are gathered over two batches, a rank knows of its own alone."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(tmp_path / "two.py"), str(micro_folder), str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=250
    )
    assert ended.returncode != 0
    assert "is not finite at step 0" in ended.stderr
    files = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert files == [f"step-000000-rank-{rank}.safetensors" for rank in (0, 1)]
