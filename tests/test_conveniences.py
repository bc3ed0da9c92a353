"""Training conveniences: the best checkpoint, curves without a logger, MLflow and trackio."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from test_logging import fit
from tiny import ROOT, trainer

from lit_prune.callbacks import Curves, ExportBest
from lit_prune.callbacks.curves import MOST, bars
from lit_prune.commands.trainer import build
from lit_prune.errors import LitPruneError, UsageError
from lit_prune.files.yaml_files import read_yaml
from lit_prune.plugin import Plugin
from lit_prune.training import PruneModule
from lit_prune.training.loggers import MLflow, Trackio
from lit_prune.training.step import StepKey
from lit_prune.training.strategies import refuse_unusable

OVERLAYS = ROOT / "configs"


# -- the best checkpoint --------------------------------------------------------------------------------------------
def test_the_best_plugin_is_that_of_the_best_validation_and_training_stops_early(micro_folder, tmp_path, monkeypatch):
    """At hardly any learning rate no validation is better than the first: of eight steps four are run."""
    overlay, run = tmp_path / "best.yaml", tmp_path / "run"
    overlay.write_text((OVERLAYS / "training/best.yaml").read_text().replace("patience: 3", "patience: 1"))
    monkeypatch.setattr("test_logging.STEPS", 8)
    options = ["-c", str(OVERLAYS / "loggers/csv.yaml"), "-c", str(overlay), "--model.lr=1e-12"]
    _, said = fit(run, micro_folder, tmp_path / "world", *options)
    assert any(line.startswith("fit ended at step 4 ") for line in said)
    (best,) = (run / "best").glob("*.ckpt")
    assert best.name == "step-step=2.ckpt"
    expected = Plugin.from_checkpoint(best).state_dict()
    found = Plugin.from_pretrained(run / "plugin_best").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any("best plug-in: " in line and "val/accuracy/all 0." in line for line in said)
    assert any(re.search(r"best plug-in +\S+plugin_best", line) for line in said)


def test_the_best_needs_a_saver_that_looks_for_it(student, world, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run = trainer(tmp_path, [saver, ExportBest(str(tmp_path / "plugin"))], max_steps=1)
    with pytest.raises(LitPruneError, match="ExportBest needs a ModelCheckpoint with a `monitor`"):
        run.fit(student(), world())


# -- curves ---------------------------------------------------------------------------------------------------------
def test_curves_without_any_logger_continue_after_a_resume(student, world, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(steps: int, **more):
        curves = Curves(str(tmp_path))
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
        options = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1, "val_check_interval": 1}
        trainer(tmp_path, [curves, saver], **options).fit(student(), world(), **more)
        return curves

    first = run(2)
    assert [step for step, _ in first.curves["loss/total"]] == [1, 2]
    assert [step for step, _ in first.curves["val/accuracy/all"]] == [1, 2]
    resumed = run(3, ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, _ in resumed.curves["loss/total"]] == [1, 2, 3]
    assert resumed.curves["loss/total"][:2] == first.curves["loss/total"]
    assert Image.open(tmp_path / "curves.png").size[0] > 800


def test_long_curves_are_thinned_and_a_line_shows_their_course():
    now, curves = SimpleNamespace(callback_metrics={"loss/total": torch.tensor(1.0)}), Curves()
    for step in range(1, 3 * MOST):
        curves._note(now, step, "loss/")
    kept = [step for step, _ in curves.curves["loss/total"]]
    assert len(kept) <= MOST
    assert kept[-1] == 3 * MOST - 1
    assert kept == sorted(kept)
    assert bars([(i, float(8 - i)) for i in range(8)]) == "8 █▇▆▅▄▃▂▁ 1"
    assert bars([(1, 2.0), (2, 2.0)]) == "2 ▁▁ 2"


# -- other trackers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kind"), [("mlflow", MLflow), ("trackio", Trackio)])
def test_a_missing_tracker_is_one_sentence_with_the_command(name, kind, monkeypatch):
    monkeypatch.setattr("lit_prune.training.loggers.find_spec", lambda _: None)
    with pytest.raises(LitPruneError, match=rf"{name}, which is not installed: pip install .*{name}") as caught:
        kind()
    assert "\n" not in str(caught.value)


TRAIN = """
import sys
from test_logging import fit
from pathlib import Path
fit(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "-c", sys.argv[4])
"""


def trained(name: str, tmp_path: Path, base: Path) -> Path:
    """A run of a few steps with the shipped overlay of a logger, in a process of its own."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    run, places = tmp_path / "run", [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = [run, base, tmp_path / "world", OVERLAYS / f"loggers/{name}.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_mlflow_has_figures_and_settings(micro_folder, tmp_path, monkeypatch):
    run = trained("mlflow", tmp_path, micro_folder)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{run / 'mlruns'}")
    experiment = client.get_experiment_by_name("lit_prune")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "keep-16"
    assert found.data.params["trainer/max_steps"] == "4"
    assert [point.step for point in client.get_metric_history(found.info.run_id, "loss/total")] == [1, 3]
    assert "val/accuracy/all" in found.data.metrics


@pytest.mark.slow
def test_trackio_has_figures_and_settings(micro_folder, tmp_path, monkeypatch):
    trained("trackio", tmp_path, micro_folder)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("lit_prune")
    assert found.config["trainer/max_steps"] == 4
    logged = [row for row in SQLiteStorage.get_logs("lit_prune", found.name) if "loss/total" in row]
    assert [row["step"] for row in logged] == [1, 3]


def test_what_is_wrong_in_an_appended_callback_is_named(tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: lit_prune.callbacks.ExportBest, init_args: {fold: a}}]}")
    with pytest.raises(UsageError, match=r"more\.yaml: unknown key `trainer\.callbacks\.init_args\.fold` .*`folder`"):
        build([str(OVERLAYS / "micro.yaml"), str(overlay)])


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
def test_fsdp_is_refused_with_the_reason(kind):
    with pytest.raises(LitPruneError, match=r"FSDP would split the plug-in too.*take DDP, or DeepSpeed's ZeRO-3"):
        refuse_unusable(SimpleNamespace(strategy=kind(), precision="32-true"))


# -- attention implementations --------------------------------------------------------------------------------------
def first_loss(module: PruneModule, world) -> float:
    data = world()
    data.prepare_data()
    data.setup("fit")
    return float(module.train().step(next(iter(data.train_dataloader())), StepKey(0, 0.0)).total.detach())


@pytest.fixture
def stand_in() -> Iterator[list[str]]:
    """Another package's attention function: sdpa, with a note of each call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attention(*args, **kwargs):
        calls.append("attention")
        return plain(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["of_a_package"] = attention
    yield calls
    ALL_ATTENTION_FUNCTIONS.pop("of_a_package")


def test_the_attention_implementation_can_be_chosen(student, world, stand_in):
    """One that would not see the gates, a bias per key, is refused; the teacher has run by then."""
    usual = student()
    assert usual.model.config._attn_implementation == "sdpa"
    chosen = student(attn_implementation="sdpa")
    assert first_loss(chosen, world) == first_loss(usual, world)
    chosen.model.set_attn_implementation("of_a_package")
    with pytest.raises(LitPruneError, match="of_a_package attention takes no bias per key"):
        first_loss(chosen, world)
    assert stand_in


def test_eager_attention_evaluates_and_does_not_train(student, world):
    module = student(attn_implementation="eager")
    assert module.model.config._attn_implementation == "eager"
    with pytest.raises(
        LitPruneError, match="eager attention takes no bias per key; load with attn_implementation='sdpa'"
    ):
        first_loss(module, world)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is installed here")
@pytest.mark.parametrize("random", [False, True])
def test_an_attention_whose_package_is_missing(student, random):
    """By the overlay, with random weights too."""
    name = read_yaml(OVERLAYS / "training/flash.yaml")["model"]["attn_implementation"]
    with pytest.raises(
        LitPruneError, match=f"attn_implementation={name} .*install the package .* or leave the option out"
    ):
        student(attn_implementation=name, random_weights=random)
    with pytest.raises(LitPruneError, match='attn_implementation="nonsense"` is not supported'):
        student(attn_implementation="nonsense", random_weights=random)
