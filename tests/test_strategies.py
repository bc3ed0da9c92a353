"""The cluster run on a tiny model: configs/rcp.yaml under every strategy, two processes against one."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import ROOT, trainer

from lit_prune import cli
from lit_prune.commands.trainer import build
from lit_prune.data import MicroData
from lit_prune.data.order import Order
from lit_prune.data.sampler import TrainBatches
from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.training.strategies import PruneDeepSpeed

RCP, STRATEGIES = ROOT / "configs" / "rcp.yaml", sorted((ROOT / "configs" / "strategies").glob("*.yaml"))
DEEPSPEED = [path for path in STRATEGIES if "deepspeed" in path.stem]
EVERY = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
# What the paper's training has and this one can't: ranks draw noise of their own, and no run of four steps moves much.
SMALL = {
    "model": {
        "dtype": "float32",
        "keep": 16,
        "lr": 3e-3,
        "max_new_tokens": 3,
        "anneal": {"noise": 0.0, "target_share": 0.0},
        "gate_clip": 0.01,
        "pruner": {
            "init_args": {
                "select": "topk",
                "layers": [1, 5, 9],
                "stage_ratios": [15, 6, 4],
                "inner": 16,
                "queries": 4,
                "dropout": 0.0,
            }
        },
        "repair": {"init_args": {"layers": [11, 14], "stages": [1, 2], "bottleneck": 8, "condition": 6, "code": 4}},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,  # reached: without it weights end 2e-3 off
        "val_check_interval": 4,
        "limit_val_batches": 4,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "data": {"init_args": {"images": None, "batch_size": 2, "eval_batch_size": 2, "num_workers": 0}},
}
CALLBACKS = """[
  {class_path: lit_prune.callbacks.ExportPlugin, init_args: {folder: FOLDER/plugin}},
  {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
   init_args: {dirpath: FOLDER/checkpoints, every_n_train_steps: 2, save_top_k: -1}}]"""
LOGGER = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: logs}}"
WORLD, BATCH = 2, 2
CLOSE = 1e-4  # of weights after four steps that moved them by 1e-2: Adam enlarges the rounding of small gradients
LOSSES = ("loss/total", "loss/task", "loss/repair")
RAN = ("budget/target", "budget/actual", "kept/layer_1", "shift/layer_11")


@pytest.fixture(scope="module")
def small(micro_folder, tmp_path_factory) -> Path:
    """An overlay that shrinks the cluster run: an untrained micro-LLaVA, 32 questions to train on, 5 to validate on.

    Of two ranks, the second has texts only in its second training batch, and in its first batch of validation; none is
    left for its last one.
    """
    root = tmp_path_factory.mktemp("cluster")
    sizes = {"train_samples": 32, "val_samples": 5, "test_samples": 5, "questions_per_image": 4}
    world = MicroData(str(micro_folder), str(root), **sizes)
    world.prepare_data()
    second = list(TrainBatches(Order((32,)), BATCH, rank=1, world=WORLD))[1]
    without_images(Path(world.paths["train"]), second)
    without_images(Path(world.paths["val"]), [1, 3])
    made = json.loads(json.dumps(SMALL))
    made["model"]["base"] = str(micro_folder)
    made["data"]["init_args"] |= {split: world.paths[split] for split in ("train", "val", "test", "predict")}
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def without_images(path: Path, indices: list[int]) -> None:
    """Turn some samples of a JSON file into questions without a picture."""
    records = json.loads(path.read_text())
    for index in indices:
        del records[index]["image"]
        turn = records[index]["conversations"][0]
        turn["value"] = turn["value"].replace("<image>", "").strip()
    path.write_text(json.dumps(records))


def words(folder: Path, small: Path, strategy: Path | None = None, *more: str) -> list[str]:
    """The command line after the verb."""
    files = [RCP, *([strategy] if strategy else []), small]
    own = [f"--trainer.logger={LOGGER}", f"--trainer.callbacks={CALLBACKS}"]
    own = [word.replace("FOLDER", str(folder)) for word in own]
    return [*(f"--config={file}" for file in files), f"--trainer.default_root_dir={folder}", *own, *more]


def logged(folder: Path, version: int = 0) -> list[dict[str, float]]:
    """Rows of the CSV log, without what is empty."""
    with open(folder / "logs" / f"version_{version}" / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def losses(folder: Path) -> list[dict[str, float]]:
    """Of every step."""
    return [{name: row[name] for name in LOSSES + RAN} for row in logged(folder) if "loss/total" in row]


def validations(folder: Path) -> list[dict[str, float]]:
    """What every validation measured."""
    measured = [{name: x for name, x in row.items() if name.startswith("val/")} for row in logged(folder)]
    return [row for row in measured if row]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "plugin" / "plugin.safetensors")


def launch(folder: Path, small: Path, strategy: Path, *more: str, verb: str = "fit") -> str:
    """A run of two processes, started as a user would; returns what it printed."""
    command = [sys.executable, "-m", "lit_prune", verb, *words(folder, small, strategy, "--trainer.devices=2", *more)]
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=alike)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def step(folder: Path, number: int) -> Path:
    """A run's checkpoint behind a step."""
    return next((folder / "checkpoints").glob(f"*step={number}.ckpt"))


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    """The run of one process with the global batch."""
    folder = tmp_path_factory.mktemp("alone")
    cli.main(["fit", *words(folder, small), "--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=4"])
    return folder


@pytest.fixture(scope="module")
def together(small, further, tmp_path_factory) -> Callable[[Path], Path]:
    """Runs of two processes, each strategy's once: DDP's by a start of its own, DeepSpeed's among the further ones."""
    runs: dict[Path, Path] = {}

    def run(strategy: Path) -> Path:
        if strategy in DEEPSPEED:
            return further(strategy.stem)
        if strategy not in runs:
            folder = tmp_path_factory.mktemp(strategy.stem)
            launch(folder, small, strategy)
            runs[strategy] = folder
        return runs[strategy]

    return run


def test_the_cluster_run_runs_here(alone):
    """`lightning fit -c configs/rcp.yaml` with a tiny model and its data, in one process."""
    assert len(losses(alone)) == 4
    assert "val/accuracy/all" in validations(alone)[0]
    assert Plugin.from_pretrained(alone / "plugin").keep == 16


@EVERY
def test_two_processes_train_and_measure_as_one_does(strategy, together, alone):
    """Accumulating gradients, and with batches of one rank that have no image or no sample."""
    pair = together(strategy)
    for found, wanted in zip(losses(pair), losses(alone), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for found, wanted in zip(validations(pair), validations(alone), strict=True):
        # The price of a stage is that of the batch that ran: a text beside an image takes part in it.
        assert found.pop("val/flops") == pytest.approx(wanted.pop("val/flops"), rel=1e-2)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert differs(trained(pair), trained(alone)) < CLOSE
    assert differs(trained(pair), Plugin.from_checkpoint(step(pair, 2)).state_dict()) > 10 * CLOSE, (
        "nothing was trained"
    )


def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two plug-ins."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


ZERO = "--trainer.strategy.init_args"
OFFLOAD, BF16 = f"{ZERO}.offload_optimizer=true", "--model.dtype=bfloat16"
FURTHER = {  # beside the overlays as they are: overlay and options
    "zero_1_offload": ("deepspeed_2", [f"{ZERO}.stage=1", OFFLOAD]),
    "zero_2_bf16": ("deepspeed_2", [BF16]),
}
SLOW = {
    "zero_1": ("deepspeed_2", [f"{ZERO}.stage=1"]),
    "zero_2_offload": ("deepspeed_2", [OFFLOAD]),
    "zero_3_offload": ("deepspeed_3", [OFFLOAD, f"{ZERO}.offload_parameters=true"]),
    "zero_3_bf16": ("deepspeed_3", [BF16]),
    "ddp_bf16": ("ddp", [BF16]),
}
OVERLAYS = {path.stem: path for path in STRATEGIES}
NAMES = [*FURTHER, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
FIT_ONLY, TWO = "--trainer.limit_val_batches=0", ["--trainer.devices=2"]


def torchrun(root: Path, lines: list[list[str]]) -> None:
    """Runs of two processes, one after another under one start; each is what follows `lit-prune`."""
    (root / "lines.json").write_text(json.dumps(lines))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(Path(__file__).with_name("pair.py")), str(root / "lines.json")]
    # DeepSpeed's own choice on a machine with a GPU, whatever `trainer.accelerator` says.
    alike = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=alike)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def further(small, tmp_path_factory) -> Callable[[str], Path]:
    """The further runs of two processes; those of a kind share one start."""
    found: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in found:
            root, kind = tmp_path_factory.mktemp("further"), SLOW if name in SLOW else FURTHER
            runs = [(each, overlay, [FIT_ONLY, *more]) for each, (overlay, more) in kind.items()]
            runs += [(path.stem, path.stem, []) for path in DEEPSPEED if kind is FURTHER]
            found.update({each: root / each for each, *_ in runs})
            lines = [
                ["fit", *words(found[each], small, OVERLAYS[overlay], *TWO, *more)] for each, overlay, more in runs
            ]
            torchrun(root, lines)
        return found[name]

    return run


@pytest.fixture(scope="module")
def alone_in_bf16(small, tmp_path_factory) -> Path:
    """The run of one process whose frozen model is in bf16."""
    folder = tmp_path_factory.mktemp("bf16")
    cli.main(["fit", *words(folder, small), "--data.init_args.batch_size=4", FIT_ONLY, BF16])
    return folder


@pytest.mark.timeout(600)  # a busy machine draws the starts out
@pytest.mark.parametrize("name", NAMES)
def test_other_stages_offload_and_bf16_train_as_one_process_does(name, further, alone, alone_in_bf16):
    """By options alone: offloaded states are PyTorch's AdamW's, so that nothing is compiled.

    The frozen model stays in bf16: cast to float32 the first loss would be 4e-3 off; rounding leaves less than 1e-3,
    and less than 2e-3 once a step has moved the weights.
    """
    found, half = further(name), name.endswith("bf16")
    one = alone_in_bf16 if half else alone
    for step, (mine, wanted) in enumerate(zip(losses(found), losses(one), strict=True)):
        assert mine == pytest.approx(wanted, rel=(2e-3 if step else 1e-3) if half else 1e-5)
    assert differs(trained(found), trained(one)) < (5e-3 if half else CLOSE)
    assert {value.dtype for value in trained(found).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("overlay", "option", "message"),
    [
        ("deepspeed_2", "--trainer.precision=16-mixed", "precision=16-mixed doesn't fit: its loss scale"),
        ("ddp", "--trainer.precision=bf16-true", "take 32-true, and model.dtype=bfloat16"),
        ("deepspeed_3", "--trainer.gradient_clip_algorithm=value", "DeepSpeed clips gradients by their norm only"),
        ("deepspeed_2", f"{ZERO}.stage=0", "stage 0 of ZeRO; take 1, 2 or 3"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overlay, option, message, small, tmp_path, capsys):
    """Before a second process is started."""
    with pytest.raises(SystemExit):
        cli.main(["fit", *words(tmp_path, small, OVERLAYS[overlay], *TWO, option)])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_training_from_python_is_refused_too(student, world, tmp_path):
    with pytest.raises(LitPruneError, match="precision=bf16-true doesn't fit"):
        trainer(tmp_path, precision="bf16-true").fit(student(), world())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("deepspeed_2", ["--trainer.precision=bf16-mixed"]),
        ("deepspeed_3", ["--trainer.precision=bf16-true"]),
        ("deepspeed_3", SLOW["zero_3_offload"][1]),
    ],
)
def test_states_in_bf16_or_host_memory_go_on_as_they_were(overlay, options, alone, small, tmp_path):
    """To the bit; and rounding the plug-in to bf16 changes what it learns, but not altogether."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    made = [*TWO, FIT_ONLY, *options]
    saved = whole / "checkpoints" / "epoch=0-step=2.ckpt"
    lines = [words(whole, small, OVERLAYS[overlay], *made)]
    lines += [words(part, small, OVERLAYS[overlay], *made, f"--ckpt_path={saved}")]
    torchrun(tmp_path, [["fit", *line] for line in lines])
    assert differs(trained(whole), trained(part)) == 0
    assert losses(part) == losses(whole)[2:]
    for mine, wanted in zip(losses(whole), losses(alone), strict=True):
        assert mine == pytest.approx(wanted, rel=0.1)
    half = "bf16" in options[0]
    assert {value.dtype for value in trained(whole).values()} == {torch.bfloat16 if half else torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_on_kept_rows_as_one_does(alone, small, tmp_path):
    """With gradients as `soft`'s; the teacher's moments of a sample are kept once, whichever rank it is of."""
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    kept, cache = ["--model.backward=kept", FIT_ONLY], f"--model.teacher_cache={tmp_path / 'cache'}"
    cli.main(["fit", *words(one, small), "--data.init_args.batch_size=4", *kept])
    torchrun(tmp_path, [["fit", *words(run, small, OVERLAYS["ddp"], *TWO, *kept, cache)] for run in (two, again)])
    for found, wanted in zip(losses(two), losses(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for found, wanted in zip(losses(one), losses(alone), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4), "kept rows give soft's gradients"
    assert differs(trained(two), trained(one)) < CLOSE
    assert losses(again) == losses(two), "what the first run kept of the teacher is what the second computed"
    assert differs(trained(two), trained(again)) == 0
    samples = [len(load_file(path)["count"]) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert sum(samples) == 32, "each once"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_read_the_teachers_saliency_as_one_does(alone, small, tmp_path):
    """The teacher's own backward pass, with batches without an image, under every strategy."""
    one, asked = tmp_path / "one", ["--model.loss.saliency=2.0", FIT_ONLY]
    cli.main(["fit", *words(one, small), "--data.init_args.batch_size=4", *asked])
    names = ("ddp", "deepspeed_2", "deepspeed_3")
    torchrun(tmp_path, [["fit", *words(tmp_path / name, small, OVERLAYS[name], *TWO, *asked)] for name in names])
    assert losses(one)[-1] != losses(alone)[-1]
    for name in names:
        for found, wanted in zip(losses(tmp_path / name), losses(one), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), name
        assert differs(trained(tmp_path / name), trained(one)) < CLOSE, name


@EVERY
def test_overlays_go_beside_micro_too(strategy, micro_folder, tmp_path):
    fixed = [
        f"--trainer.default_root_dir={tmp_path}",
        f"--model.base={micro_folder}",
        "--trainer.accelerator=cpu",
        *TWO,
    ]
    made = build([str(ROOT / "configs" / "micro.yaml"), str(strategy)], [*fixed, "--trainer.logger=false"]).trainer
    assert made.num_devices == 2
    assert type(made.strategy).__name__ in ("DDPStrategy", "PruneDeepSpeed")


@EVERY
def test_overlays_go_through_the_parser(strategy, small, tmp_path):
    files = [str(file) for file in (RCP, strategy, small)]
    fixed = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.callbacks=[]"]
    made = build(files, fixed).trainer.strategy
    assert type(made).__name__ in ("DDPStrategy", "PruneDeepSpeed")
    if isinstance(made, PruneDeepSpeed):
        assert made.config["zero_optimization"]["stage"] == int(strategy.stem[-1])
        assert made.exclude_frozen_parameters


def test_the_cluster_run_says_what_data_it_needs(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *words(tmp_path, small), "--data.init_args.train=data/llava_v1_5_mix665k.json"])
    assert end.value.code == 1
    assert "data/llava_v1_5_mix665k.json: no such file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["deepspeed_2", "deepspeed_3", "zero_1_offload", "zero_3_offload"])
def test_one_process_goes_on_where_two_stopped(name, together, further, alone, small, tmp_path):
    """From the second step, by DeepSpeed's universal checkpoint; nothing of the conversion is left behind."""
    overlay, more = (FURTHER | SLOW).get(name, (name, []))
    found = step(together(OVERLAYS[name]) if name in OVERLAYS else further(name), 2)
    one = ["--trainer.devices=1", "--data.init_args.batch_size=4", "--trainer.limit_val_batches=0"]
    said = launch(tmp_path, small, OVERLAYS[overlay], *one, *more, f"--ckpt_path={found}")
    assert "was written by 2 processes, there are 1 now" in said
    assert [row["step"] for row in logged(tmp_path) if "loss/total" in row] == [2, 3]
    assert differs(trained(tmp_path), trained(alone)) < CLOSE
    assert not list(found.parent.glob("*.universal"))


@EVERY
def test_a_checkpoint_gives_its_plugin(strategy, together, tmp_path):
    """DDP's file and DeepSpeed's folder alike, and the newest of several."""
    pair = together(strategy)
    for checkpoint in (step(pair, 4), step(pair, 4).parent):
        cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path)])
        assert differs(load_file(tmp_path / "plugin.safetensors"), trained(pair)) == 0
    assert Plugin.from_pretrained(tmp_path).settings() == Plugin.from_pretrained(pair / "plugin").settings()


def test_exported_nothing(tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name, message in (("none.ckpt", "no such checkpoint"), ("other.ckpt", "holds no plug-in")):
        with pytest.raises(SystemExit) as end:
            cli.main(["export", "--checkpoint", str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert end.value.code == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_another_strategy_is_refused(alone, together, small, tmp_path, capsys):
    """With what to do: the plug-in carries over, the optimizer's state doesn't."""
    zero = DEEPSPEED[0]
    zero_2, zero_3 = (step(together(strategy), 2) for strategy in DEEPSPEED)
    for strategy, checkpoint in ((zero, step(alone, 2)), (None, zero_2), (zero, zero_3), (DEEPSPEED[1], zero_2)):
        with pytest.raises(SystemExit):
            cli.main(["fit", *words(tmp_path, small, strategy), f"--ckpt_path={checkpoint}"])
        assert f"lit-prune export --checkpoint {checkpoint}" in capsys.readouterr().err


@pytest.mark.timeout(600)  # a busy machine draws the starts out
@pytest.mark.parametrize(
    "overlay", [pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "deepspeed_2", "deepspeed_3")]
)
def test_two_processes_test_and_predict_as_one_does(overlay, together, small, tmp_path):
    """Pruned: Lightning takes every hook off a model that DeepSpeed only evaluates. Each answer once."""
    pair, verbs = together(OVERLAYS[overlay]), ("test", "predict")
    found = [*TWO, f"--ckpt_path={step(pair, 4)}"]
    torchrun(tmp_path, [[verb, *words(tmp_path / "two", small, OVERLAYS[overlay], *found)] for verb in verbs])
    own = [f"--model.plugin={pair / 'plugin'}", "--model.pruner=null", "--model.repair=null"]
    for verb in verbs:
        cli.main([verb, *words(tmp_path / "one", small, None, *own)])
    two, one = (logged(tmp_path / name)[-1] for name in ("two", "one"))
    assert one["test/visual_tokens"] == 16
    assert two.pop("test/flops") == pytest.approx(one.pop("test/flops"), rel=1e-2)
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    two, one = ((tmp_path / name / "answers.jsonl").read_text() for name in ("two", "one"))
    assert two == one, "in the order of the data"
    assert len(two.splitlines()) == 5
    assert [path.name for path in (tmp_path / "two").glob("answers*")] == ["answers.jsonl"]
