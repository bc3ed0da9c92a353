"""The cluster run on a tiny model: configs/rcp.yaml under every strategy, two processes against one."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from lit_prune import cli
from lit_prune.commands.trainer import build
from lit_prune.data import MicroData
from lit_prune.plugin import Plugin
from lit_prune.strategies import PruneDeepSpeed

RCP, STRATEGIES = ROOT / "configs" / "rcp.yaml", sorted((ROOT / "configs" / "strategies").glob("*.yaml"))
# What the paper's training has and this one can't: ranks draw noise of their own, and no run of four steps moves much.
SMALL = {
    "model": {
        "dtype": "float32",
        "keep": 16,
        "lr": 3e-3,
        "max_new_tokens": 3,
        "anneal": {"noise": 0.0},
        "pruner": {"init_args": {"layers": [1, 5, 9], "shape": [15, 6, 4], "inner": 16, "queries": 4, "dropout": 0.0}},
        "repair": {"init_args": {"layers": [11, 14], "stages": [1, 2], "bottleneck": 8, "condition": 6, "code": 4}},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "limit_val_batches": 4,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "data": {"init_args": {"images": None, "batch_size": 2, "eval_batch_size": 2, "num_workers": 0}},
}
OVERRIDES = [
    "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: logs}}",
    "--trainer.callbacks=[{class_path: lit_prune.callbacks.ExportPlugin, init_args: {folder: FOLDER/plugin}}]",
]


@pytest.fixture(scope="module")
def small(micro_folder, tmp_path_factory) -> Path:
    """An overlay that shrinks the cluster run: an untrained micro-LLaVA, 32 questions to train on, 7 to validate on."""
    root = tmp_path_factory.mktemp("cluster")
    sizes = {"train_samples": 32, "val_samples": 7, "test_samples": 7, "questions_per_image": 4}
    world = MicroData(str(micro_folder), str(root), **sizes)
    world.prepare_data()
    made = json.loads(json.dumps(SMALL))
    made["model"]["base"] = str(micro_folder)
    made["data"]["init_args"] |= {split: world.paths[split] for split in ("train", "val", "test")}
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def words(folder: Path, small: Path, strategy: Path | None = None, *more: str) -> list[str]:
    """The command line after the verb."""
    files = [RCP, *([strategy] if strategy else []), small]
    own = [word.replace("FOLDER", str(folder)) for word in OVERRIDES]
    return [*(f"--config={file}" for file in files), f"--trainer.default_root_dir={folder}", *own, *more]


def logged(folder: Path, version: int = 0) -> list[dict[str, float]]:
    """Rows of the CSV log, without what is empty."""
    with open(folder / "logs" / f"version_{version}" / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_cluster_run_runs_here(small, tmp_path):
    """`lightning fit -c configs/rcp.yaml` with a tiny model and its data, in one process."""
    cli.main(["fit", *words(tmp_path, small)])
    rows = logged(tmp_path)
    assert [row["step"] for row in rows if "loss/total" in row] == [0, 1, 2, 3]
    assert any("val/accuracy/all" in row for row in rows)
    assert Plugin.from_pretrained(tmp_path / "plugin").keep == 16


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_overlays_go_through_the_parser(path, small, tmp_path):
    files = [str(file) for file in (RCP, path, small)]
    fixed = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.callbacks=[]"]
    strategy = build(files, fixed).trainer.strategy
    assert type(strategy).__name__ in ("DDPStrategy", "PruneDeepSpeed")
    if isinstance(strategy, PruneDeepSpeed):
        assert strategy.config["zero_optimization"]["stage"] == int(path.stem[-1])
        assert strategy.exclude_frozen_parameters


def test_the_cluster_run_says_what_data_it_needs(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *words(tmp_path, small), "--data.init_args.train=data/llava_v1_5_mix665k.json"])
    assert end.value.code == 1
    assert "data/llava_v1_5_mix665k.json: no such file" in capsys.readouterr().err
