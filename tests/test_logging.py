"""What a run logs, read back from the files of W&B (offline), CSV and TensorBoard after one real fit."""

import contextlib
import csv
import io
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml
from faults import Cut, PowerCut
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_syncs import looks
from tiny import ROOT, trainer
from wandb.proto.wandb_internal_pb2 import Record

from lit_prune import cli
from lit_prune.callbacks import RunSummary, SamplePictures, Throughput, WandbRun
from lit_prune.training import module as training
from lit_prune.training.logging import step_figures
from lit_prune.training.losses import Anneal, tokens_asked
from lit_prune.training.module import PruneModule
from lit_prune.training.step import StepKey

CONFIGS = ROOT / "configs"
STEPS, BATCH, KEEP, DEPTH = 4, 4, 16, 16
LOGGERS = ("csv", "tensorboard", "wandb")
SKILLS = {"colour", "counting", "digit", "existence", "position", "relation", "shape"}
STEP_FIGURES = {
    *("loss/total", "loss/task", "loss/repair", "loss/attention", "tau", "flops/sample", "budget/target"),
    *("budget/actual", "kept/layer_1", "kept/layer_5", "kept/layer_9", "shift/layer_11", "shift/layer_14"),
    *("lr-AdamW/pruner", "lr-AdamW/repair", "total/flops", "total/samples", "throughput/step_s"),
    "throughput/waiting_share",
    *(f"throughput/{name}_per_s" for name in ("samples", "text_tokens", "visual_tokens", "kept_tokens", "flops")),
}
VALIDATION_FIGURES = {
    *("val/agreement", "val/kappa", "val/visual_tokens", "val/flops", "val/kv_bytes", "val/accuracy/all"),
    *(f"val/accuracy/{skill}" for skill in SKILLS),
    *(f"val/{name}/layer_{i}" for name in ("w2", "w2_relative", "w2_without_repair", "kept") for i in range(DEPTH)),
}


def wandb_records(folder: Path) -> Iterator[Record]:
    """The records of an offline run: LevelDB's log format, a protobuf in each, in pieces where a block ends."""
    (file,) = folder.glob("*.wandb")
    data, place, piece = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # too short for a header
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):  # not all of it is written yet
            return
        piece += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(piece)
            piece = b""


def finished_records(folder: Path) -> list[Record]:
    """All records, once the last one is written: W&B's own process does that a little later."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        records = list(wandb_records(folder))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{folder} never ended")


def unpacked(items: Any) -> dict[str, Any]:
    """Keys and values of a history or configuration record."""
    return {"/".join(i.nested_key) if i.nested_key else i.key: json.loads(i.value_json) for i in items}


def fit(folder: Path, micro: Path, world: Path, *options: str) -> tuple[str, list[str]]:
    """Train four steps through the command line; what it prints, and what it says on the way."""
    arguments = {
        "trainer.max_steps": STEPS, "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 2, "trainer.accelerator": "cpu", "trainer.enable_model_summary": "false",
        "trainer.default_root_dir": folder, "model.base": micro, "data.init_args.root": world,
        "data.init_args.train_samples": 16, "data.init_args.val_samples": 7, "data.init_args.test_samples": 7,
        "data.init_args.batch_size": BATCH, "data.init_args.eval_batch_size": 7,
    }  # fmt: skip
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    words = [f"--{name}={value}" for name, value in arguments.items()]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli.main(["fit", "-c", str(CONFIGS / "micro.yaml"), *options, *words])
    finally:
        logger.removeHandler(handler)
        wandb.finish()
    return out.getvalue(), said


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Folders, and an environment without a W&B account."""
    root = tmp_path_factory.mktemp("logging")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(root / "staging"))
        patch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
        yield SimpleNamespace(root=root, world=root / "world")


@pytest.fixture(scope="module")
def run(places, micro_folder) -> SimpleNamespace:
    """One fit with all three loggers, chosen in YAML."""
    overlays = [yaml.safe_load((CONFIGS / "loggers" / f"{name}.yaml").read_text()) for name in LOGGERS]
    all_of_them = [logger for overlay in overlays for logger in overlay["trainer"]["logger"]]
    (places.root / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": all_of_them}}))
    folder = places.root / "run"
    out, said = fit(folder, micro_folder, places.world, "-c", str(places.root / "loggers.yaml"))
    (wandb_folder,) = folder.glob("wandb/offline-run-*")
    records = finished_records(wandb_folder)
    return SimpleNamespace(folder=folder, out=out, said=said, wandb=wandb_folder, records=records)


@pytest.fixture(scope="module")
def history(run) -> list[dict[str, Any]]:
    """Rows of the W&B run."""
    return [unpacked(record.history.item) for record in run.records if record.HasField("history")]


@pytest.fixture(scope="module")
def rows(run) -> list[dict[str, float]]:
    """Rows of the CSV file, without their empty cells."""
    with next(run.folder.glob("logs/*/metrics.csv")).open() as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def board(run) -> EventAccumulator:
    """The TensorBoard events."""
    found = EventAccumulator(str(next(run.folder.glob("tensorboard/version_0"))), {"images": 0, "tensors": 0})
    return found.Reload()


def series(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


# -- every figure, in every logger ----------------------------------------------------------------------------------
@pytest.mark.parametrize("figures", [STEP_FIGURES, VALIDATION_FIGURES], ids=["step", "validation"])
def test_every_figure_is_in_every_logger(history, rows, board, figures):
    """Twice each, with the same values; they are logged every second step, and validation is every second step."""
    for name in figures:
        logged = series(rows, name)
        assert len(logged) == 2, name
        assert all(math.isfinite(value) for value in logged), name
        assert series(history, name) == pytest.approx(logged, rel=1e-6), name
        assert [event.value for event in board.Scalars(name)] == pytest.approx(logged, rel=1e-6), name


def test_figures_say_what_ran(rows):
    assert series(rows, "budget/actual") == series(rows, "budget/target") == [KEEP, KEEP]
    assert series(rows, "val/visual_tokens") == [KEEP, KEEP]
    per_layer = [series(rows, f"val/kept/layer_{i}")[0] for i in range(DEPTH)]
    assert sum(per_layer) / DEPTH == KEEP
    assert per_layer[0] == 144
    assert [per_layer[i] for i in (1, 5, 9)] == [series(rows, f"kept/layer_{i}")[0] for i in (1, 5, 9)]
    assert series(rows, "total/samples") == [2 * BATCH, 4 * BATCH]
    flops = series(rows, "total/flops")
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.05)
    speed = series(rows, "throughput/samples_per_s")[0]
    assert all(0 < share < 1 for share in series(rows, "throughput/waiting_share"))
    assert speed * series(rows, "throughput/step_s")[0] == pytest.approx(BATCH)
    assert series(rows, "throughput/visual_tokens_per_s")[0] == pytest.approx(144 * speed)
    assert series(rows, "throughput/kept_tokens_per_s")[0] == pytest.approx(KEEP * speed)
    assert series(rows, "throughput/flops_per_s")[0] == pytest.approx(speed * flops[0] / (2 * BATCH))


# -- what W&B has besides -------------------------------------------------------------------------------------------
def test_wandb_run_has_name_tags_group_and_configuration(run, micro_folder):
    runs = [record.run for record in run.records if record.HasField("run")]
    assert runs[-1].display_name == "rcp-16-micro-seed0"
    assert list(runs[-1].tags) == ["rcp", "keep-16", "micro"]
    assert runs[-1].run_group == "keep-16"
    updates = [record.config.update for record in run.records if record.HasField("config")]
    config = {name: value for update in updates for name, value in unpacked(update).items()}
    assert config["trainer"]["max_steps"] == STEPS
    assert config["model"]["pruner"]["init_args"]["layers"] == [1, 5, 9]
    assert config["data"]["init_args"]["batch_size"] == BATCH
    assert config == {**config, "base": str(micro_folder), "keep": KEEP, "seed": 0}


def test_wandb_has_system_figures(run):
    found = {item.key for record in run.records if record.HasField("stats") for item in record.stats.item}
    assert {"proc.memory.rssMB", "memory_percent"} <= found


@pytest.mark.parametrize("name", ["w2", "w2_relative", "w2_without_repair", "kept"])
def test_wandb_chart_has_a_line_a_validation(run, history, rows, name):
    path = series(history, f"val/{name}_by_layer_table/path")[-1]
    table = json.loads((run.wandb / "files" / path).read_text())
    lines: dict[str, list[float]] = {}
    for layer, line, value in table["data"]:
        lines.setdefault(line, []).append((layer, value))
    assert list(lines) == ["step 2", "step 4"]
    for number, line in enumerate(lines.values()):
        expected = [series(rows, f"val/{name}/layer_{i}")[number] for i in range(DEPTH)]
        assert [layer for layer, _ in line] == list(range(DEPTH))
        assert [value for _, value in line] == pytest.approx(expected, rel=1e-6)


def artifacts(run, kind: str) -> list[Any]:
    return [record.artifact for record in run.records if record.HasField("artifact") and record.artifact.type == kind]


def test_wandb_table_shows_samples(run):
    """Questions with both answers; pictures of the kept tokens, which are files of the table's artifact."""
    tables = [artifact for artifact in artifacts(run, "run_table") if "valsamples" in artifact.name]
    assert len(tables) == 2
    files = {entry.path: Path(entry.local_path) for entry in tables[0].manifest.contents}
    table = json.loads(files["val/samples.table.json"].read_text())
    assert len(table["data"]) == 4
    for row in table["data"]:
        cells = dict(zip(table["columns"], row, strict=True))
        assert cells["skill"] in SKILLS
        assert cells["question"].endswith("?")
        assert all(isinstance(cells[name], str) for name in ("right answer", "full model", "pruned"))
        assert cells["right"] == (cells["pruned"] == cells["right answer"])
        assert cells["kept tokens"] == "layer 1 · 15 tokens, layer 5 · 6 tokens, layer 9 · 4 tokens"
        assert Image.open(files[cells["picture"]["path"]]).size[0] > 800
    assert len({row[2] for row in table["data"]}) == 4


def test_wandb_artifact_is_the_plugin(run, rows):
    (artifact,) = artifacts(run, "model")
    assert artifact.name == "plugin-rcp-16-micro-seed0"
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(files) == {file.name for file in (run.folder / "plugin").iterdir()} >= {"plugin.safetensors"}
    for name, file in files.items():
        assert file.read_bytes() == (run.folder / "plugin" / name).read_bytes()
    metadata = json.loads(artifact.metadata)
    assert metadata["method"] == "lit_prune.pruners.rcp.RCP"
    assert (metadata["keep"], metadata["step"]) == (KEEP, STEPS)
    assert metadata["schedule"] == {"1": 15, "5": 6, "9": 4}
    assert metadata["val/accuracy/all"] == pytest.approx(series(rows, "val/accuracy/all")[-1])


def test_names_of_ones_own_stay(student, world, tmp_path, places):
    from lightning.pytorch.loggers import WandbLogger

    mine = WandbLogger(save_dir=tmp_path, name="mine", tags=["first"], offline=True)
    trainer(tmp_path, [WandbRun()], logger=mine, max_steps=1).fit(student(), world())
    try:
        assert mine.experiment.name == "mine"
        assert mine.experiment.tags == ("first", "rcp", "keep-16", "micro")
    finally:
        wandb.finish()


# -- pictures beside W&B --------------------------------------------------------------------------------------------
def test_pictures_are_files_in_the_runs_folder_whatever_the_loggers(run):
    """The same four questions at both validations; nobody has to look for them in W&B's cache."""
    files = {file.name: file for file in (run.folder / "samples").iterdir()}
    assert set(files) == {f"val_step{step}_{i}.png" for step in (2, 4) for i in range(4)}
    assert all(Image.open(file).size[0] > 800 for file in files.values())


def test_tensorboard_has_pictures_and_configuration(board):
    assert sorted(board.Tags()["images"]) == [f"val/samples/{i}" for i in range(4)]
    first = board.Images("val/samples/0")
    assert len(first) == 2
    assert first[0].width > 800
    (text,) = board.Tensors("config/text_summary")
    assert "class_path: lit_prune.pruners.rcp.RCP" in text.tensor_proto.string_val[0].decode()


def test_pictures_are_files_without_any_logger(student, world, tmp_path):
    pictures = SamplePictures(2, str(tmp_path / "samples"))
    run = trainer(tmp_path, [pictures], max_steps=1, limit_val_batches=1, val_check_interval=1)
    run.fit(student(), world())
    run.test(run.lightning_module, world(), verbose=False)
    names = {file.name for file in (tmp_path / "samples").iterdir()}
    assert names == {"val_step1_0.png", "val_step1_1.png", "test_step1_0.png", "test_step1_1.png"}


# -- through a resume -----------------------------------------------------------------------------------------------
def test_totals_and_charts_go_on_after_a_resume(student, world, tmp_path):
    def parts(*more: Callback) -> list[Callback]:
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
        return [Throughput(), WandbRun(), RunSummary(), saver, *more]

    options = {"max_steps": 3, "limit_val_batches": 1, "val_check_interval": 1}
    with pytest.raises(PowerCut):
        trainer(tmp_path, parts(Cut(2)), **options).fit(student(), world())
    callbacks = parts()
    resumed = trainer(tmp_path, callbacks, **options)
    module = student()
    resumed.fit(module, world(), ckpt_path=tmp_path / "last.ckpt")
    assert module.work.totals[0] == BATCH, "its own step alone"
    assert resumed.callback_metrics["total/samples"] == 3 * BATCH
    assert list(callbacks[1].lines["w2"]) == [1, 3], "the checkpoint of step 2 came before its validation"
    assert callbacks[2].best is not None


# -- what logging costs ---------------------------------------------------------------------------------------------
def test_a_step_that_is_not_logged_never_looks_at_the_device(student, world, tmp_path, monkeypatch):
    """And one that is looks nowhere either until its figures are fetched, all at once."""
    found: list[list[str]] = []
    plain = PruneModule._log_step

    def watched(self, step, done, batch):
        with looks(monkeypatch) as seen:
            self.work.add(step.student, step.teacher, len(batch["ids"]))
            _ = self.work.totals
            plain(self, step, done, batch)
        found.append(seen)

    monkeypatch.setattr(PruneModule, "_log_step", watched)
    module = student()
    run = trainer(tmp_path, max_steps=3, log_every_n_steps=3)
    run.fit(module, world())
    assert found == [[], [], []]
    assert run.callback_metrics["budget/actual"] == KEEP, "the third was logged"


class Watch(Callback):
    """Notes the looks at the device of each whole step, Lightning's own between two batches included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.stack, self.found = monkeypatch, contextlib.ExitStack(), []

    def on_train_batch_start(self, *_: Any) -> None:
        self.stack.close()
        self.found.append(self.stack.enter_context(looks(self.monkeypatch)))

    def on_train_end(self, *_: Any) -> None:
        self.stack.close()


def test_lightning_looks_at_nothing_that_is_not_logged(student, world, tmp_path, monkeypatch):
    """What the progress bar shows, Lightning fetches at every step where it is handed on."""
    counts = []
    for logs in (True, False):
        if not logs:
            monkeypatch.setattr(PruneModule, "_log_step", lambda *_: None)
        watch = Watch(monkeypatch)
        trainer(tmp_path, [watch], max_steps=3, log_every_n_steps=3).fit(student(), world())
        counts.append([len(found) for found in watch.found])
    assert counts[0][:2] == counts[1][:2]
    assert counts[0][2] > counts[1][2], "a step that is logged is looked at"


def test_accumulated_batches_are_looked_at_once_a_step(student, world, tmp_path, monkeypatch):
    """Lightning logs the last one of a step only."""
    made, module = [], student()
    monkeypatch.setattr(training, "step_figures", lambda *args: made.append(1) or step_figures(*args))
    run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2)
    run.fit(module, world())
    assert len(made) == run.global_step == 2
    assert module.work.totals[0] == 3 * BATCH, "an epoch's third batch is a step of its own"


def test_a_blank_sample_is_in_no_figure(student, world):
    """A batch of texts under DeepSpeed: figures as without the image that was put behind them."""
    module, data = student(), world()
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids = batch["inputs"]["input_ids"]
    inputs = {name: part for name, part in batch["inputs"].items() if name != "pixel_values"}
    inputs["input_ids"] = ids.masked_fill(ids == module.model.config.image_token_id, 5)
    figures = []
    for together in (True, False):
        step = module.teaching.step({**batch, "inputs": inputs}, StepKey(1, 0.5), in_step=together)
        figures.append(step_figures(module.teaching, step, 0.5, BATCH))
        assert len(step.student.trace.total_visual) == BATCH + together
    assert figures[0].keys() == figures[1].keys() >= {"budget/actual", "kept/layer_1", "shift/layer_11"}
    for name in ("budget/target", "budget/actual", "kept/layer_1", "kept/layer_5", "kept/layer_10"):
        assert figures[0][name] == figures[1][name] == 0, name
    assert float(figures[0]["shift/layer_11"]) == pytest.approx(float(figures[1]["shift/layer_11"]), rel=1e-4)


def test_the_target_is_each_samples_own():
    """Images of 144 and of 8 tokens and a text, with a budget of 16; then while the target still falls from all."""
    total, anneal = torch.tensor([144, 8, 0]), Anneal(target_share=0.5)
    assert tokens_asked(KEEP, total, anneal, 1.0).tolist() == [KEEP, 8, 0]
    assert tokens_asked(KEEP, total, anneal, 0.0).tolist() == [144, 8, 0]
    assert tokens_asked(KEEP, total, anneal, 0.25).tolist() == pytest.approx([80, 8, 0])


def test_profiler_tells_the_parts_of_a_step(student, world, tmp_path):
    run = trainer(tmp_path, max_steps=2, profiler="simple")
    run.fit(student(), world())
    spent = run.profiler.recorded_durations
    for name in ("teacher forward", "student forward", "losses", "figures"):
        assert len(spent[name]) == 2, name


# -- what people read -----------------------------------------------------------------------------------------------
def test_progress_in_a_file_is_lines(run):
    lines = [line for line in run.out.splitlines() if "step " in line]
    assert [line.split("step ")[1].split()[0] for line in lines] == ["2/4", "2/4", "4/4", "4/4"]
    assert all(f"kept {KEEP}/{KEEP}" in line and "loss " in line for line in lines)
    assert "val_accuracy" in lines[-1]
    assert "\x1b" not in run.out
    assert "\r" not in run.out


def test_the_end_says_where_everything_is(run):
    summary = run.said[-1]
    assert summary.startswith("fit ended at step 4 after 0:")
    said = dict(line.strip().split("  ", 1) for line in summary.splitlines()[1:])
    names = {"accuracy", "plug-in", "pictures", "curves", "settings", "checkpoints", "figures", "TensorBoard", "W&B"}
    assert set(said) == names
    assert "best 0." in said["accuracy"]
    for name in ("plug-in", "pictures", "curves", "settings", "figures"):
        assert Path(said[name].strip()).exists(), name
    assert said["W&B"].strip() == f"wandb sync {run.wandb}"


def test_the_end_is_told_after_an_error_too(student, world, tmp_path, caplog):
    with pytest.raises(PowerCut), caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, [RunSummary(), Cut(2)], max_steps=3).fit(student(), world())
    assert "fit was stopped by PowerCut at step 2 after 0:" in caplog.text
