"""The Trainer's options beside the callbacks and loggers of the shipped files; what a run leaves, and what not."""

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import wandb
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from tiny import ROOT

from lit_prune import cli
from lit_prune.callbacks import samples
from lit_prune.commands._support.trainer_options import apply_switches, check, restore_defaults
from lit_prune.errors import LitPruneError

MICRO = str(ROOT / "configs" / "micro.yaml")
FASTV = str(ROOT / "configs" / "pruners" / "fastv.yaml")
CALLBACKS = "--trainer.callbacks+=lightning.pytorch.callbacks"


@dataclass
class Result:
    """Exit code, standard output, and all else that is said, in order."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world; `run`, which a test finds missing or as `trained` leaves it; and a copy of the latter."""
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def start(place: Path, micro_folder: Path):
    """Run a verb on configs/micro.yaml, two steps of four samples; in `place`/run unless another folder is given.

    Sample pictures are blank: to draw them, as test_logging does, takes as long as all the rest of a run.
    """
    options = {
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": place / "run",
        "model.base": micro_folder,
        "data.init_args.root": place / "world",
        **dict.fromkeys([f"data.init_args.{split}_samples" for split in ("val", "test")], 7),
        "data.init_args.train_samples": 14,
        "data.init_args.batch_size": 4,
        "data.init_args.eval_batch_size": 7,
    }
    staging = {"WANDB_DATA_DIR": str(place / "staging")}
    blank = np.zeros((2, 2, 3), np.uint8)

    def run(verb: str, *more: str, files: tuple[str, ...] = ()) -> Result:
        configs = [word for file in (MICRO, *files) for word in ("-c", file)]
        words = [f"--{name}={value}" for name, value in options.items()]
        code, out, err = 0, io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(err)
        names = ("lightning.pytorch", "lightning.fabric")
        for name in names:
            logging.getLogger(name).addHandler(handler)
        try:
            quiet, quick = contextlib.redirect_stderr(err), patch.object(samples, "_draw", lambda *_: blank)
            with contextlib.redirect_stdout(out), quiet, patch.dict(os.environ, staging), quick:
                cli.main([verb, *configs, *words, *more])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            for name in names:
                logging.getLogger(name).removeHandler(handler)
            wandb.finish()
        return Result(code, out.getvalue(), err.getvalue())

    return run


Run = Callable[..., Result]


@pytest.fixture
def root(place: Path) -> Path:
    """The folder of a run that hasn't begun."""
    shutil.rmtree(place / "run", ignore_errors=True)
    return place / "run"


@pytest.fixture
def lightning(start: Run, root: Path) -> Run:
    return start


@pytest.fixture(scope="module")
def first(place: Path, start: Run) -> Path:
    """A run with its plug-in, checkpoints, settings, test and answers, moved away from its folder."""
    shutil.rmtree(place / "run", ignore_errors=True)
    for verb, more in (("fit", ()), ("test", ("--ckpt_path=last",)), ("predict", ("--ckpt_path=last",))):
        assert start(verb, "--trainer.logger=false", *more).code == 0
    return (place / "run").rename(place / "first")


@pytest.fixture
def trained(root: Path, first: Path) -> Path:
    """The folder of that run, as it left it."""
    return shutil.copytree(first, root, symlinks=True)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder; W&B's links to its newest run aside, and its debug logs, which grow after a run."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if "latest-run" not in name and "/logs/debug" not in name}


def at_rest(folder: Path) -> dict[str, bytes]:
    """The same once it no longer changes: W&B's own process may write a moment longer than the run."""
    before, found = None, contents(folder)
    while found != before:
        time.sleep(0.5)
        before, found = found, contents(folder)
    return found


def steps(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


# -- options that turn a part off -----------------------------------------------------------------------------------
def test_options_turn_off_what_the_shipped_file_brings(lightning: Run, tmp_path: Path) -> None:
    """Each by itself, with the rest of the run as it is."""
    everything = {"checkpoints", "logs", "wandb", "plugin", "samples", "curves.png", "config_fit.yaml"}
    for option, gone in (
        ("enable_progress_bar", set()),
        ("enable_checkpointing", {"checkpoints"}),
        ("logger", {"logs", "wandb"}),
    ):
        folder = tmp_path / option
        more = (f"--trainer.default_root_dir={folder}", "--trainer.log_every_n_steps=1")
        result = lightning("fit", f"--trainer.{option}=false", *more)
        assert result.code == 0, result.err
        assert {path.name for path in folder.iterdir()} == everything - gone
        assert ("step 2/2" in result.out) == (option != "enable_progress_bar")


def test_barebones_runs_and_leaves_nothing(lightning: Run, root: Path) -> None:
    result = lightning("fit", "--trainer.barebones=true")
    assert result.code == 0, result.err
    assert not root.exists()
    assert "step 2" not in result.out


@pytest.mark.parametrize("value", ["[]", "null"])
def test_without_callbacks(lightning: Run, root: Path, value: str) -> None:
    result = lightning("fit", f"--trainer.callbacks={value}", "--trainer.logger=false")
    assert result.code == 0, result.err
    assert (root / "config_fit.yaml").is_file()


@pytest.mark.parametrize(
    "option", ["--trainer.max_steps=0", "--trainer.max_epochs=0", "--trainer.limit_train_batches=0"]
)
def test_a_run_that_trains_nothing_leaves_nothing(lightning: Run, trained: Path, option: str) -> None:
    """And replaces nothing, least of all a plug-in."""
    before = contents(trained)
    result = lightning("fit", option)
    assert result.code == 0, result.err
    assert "nothing was trained: no plug-in is written" in result.err
    assert contents(trained) == before


def test_a_table_of_the_models_parts_is_made_on_request(lightning: Run) -> None:
    plain = lightning("fit", "--trainer.logger=false")
    table = lightning("fit", "--trainer.logger=false", "--trainer.enable_model_summary=true")
    assert "trainable: " in plain.err
    assert "LlavaForConditionalGeneration" not in plain.out
    assert "LlavaForConditionalGeneration" in table.out
    assert "FLOPs" not in table.out + table.err


def test_what_fit_prints_is_short(lightning: Run) -> None:
    """Ten lines of its own for two logged steps and a validation, none of them of W&B or of settings as given."""
    result = lightning("fit", "--trainer.log_every_n_steps=1")
    lines = [line for line in (result.out + result.err).splitlines() if line.strip()]
    assert not [line for line in lines if "wandb:" in line or "GPU" in line or "Seed" in line or "configured" in line]
    assert len(lines) <= 15, lines


def test_switches_of_a_trainer() -> None:
    bars = [RichProgressBar(), TQDMProgressBar()]
    options = {"callbacks": [*bars, ModelCheckpoint("x"), EarlyStopping("loss")], "log_every_n_steps": 5}
    kept = dict(options)
    apply_switches(kept)
    assert kept["callbacks"] == options["callbacks"][1:], "the last of several bars replaces the others"
    bare = {**options, "barebones": True, "logger": ["x"]}
    apply_switches(bare)
    assert [type(callback) for callback in bare["callbacks"]] == [EarlyStopping]
    assert (bare["logger"], bare["log_every_n_steps"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, (0, -1)) for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")),
        *((name, (-1,)) for name in ("log_every_n_steps", "fast_dev_run", "overfit_batches", "limit_train_batches")),
        *((name, (-2,)) for name in ("max_steps", "max_epochs", "num_sanity_val_steps")),
        ("gradient_clip_val", (-1.0, float("nan"), float("inf"))),
    ],
)
def test_numbers_that_the_trainer_would_fail_at_later(name: str, bad: tuple) -> None:
    for value in bad:
        with pytest.raises(LitPruneError, match=rf"^trainer\.{name} is {value}; it must be a"):
            check(Namespace(seed_everything=0, trainer=Namespace(**{name: value})), fit=True)


def test_settings_of_a_run_that_cannot_be() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(LitPruneError, match=f"^seed_everything is {seed}; it must be a whole number from 0 to"):
            check(Namespace(seed_everything=seed, trainer=Namespace()), fit=True)
    endless = Namespace(seed_everything=True, trainer=Namespace(max_steps=-1, max_epochs=-1))
    check(endless, fit=False)
    with pytest.raises(LitPruneError, match="so it needs one; set either"):
        check(endless, fit=True)
    with pytest.raises(LitPruneError, match="`trainer`: expected"):
        check(Namespace(trainer=None), fit=True)


UNWRITABLE = object()


class Base:
    """Stand-in for a callback."""


class Placed(Base):
    def __init__(
        self,
        device: torch.device | str = torch.device("cuda:0"),  # noqa: B008
        other: str | Any = UNWRITABLE,
        name: str = "cpu",
    ) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_defaults_that_yaml_has_no_form_for() -> None:
    """What jsonargparse makes of them, in a class and in a list of classes; what was given stays."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=False)  # a verb that ran in this process sets it
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_argument("--one", type=Base)
    parser.add_argument("--several", type=list[Base])
    parser.add_argument("--word", type=str)
    spec = {"class_path": f"{__name__}.Placed", "init_args": {"name": "${word}"}}
    several = [spec, {**spec, "init_args": {"device": "cuda:1", "name": "cpu"}}]
    config = parser.parse_args(["--word=cpu", f"--one={json.dumps(spec)}", f"--several={json.dumps(several)}"])
    restore_defaults(config)
    found = [vars(each.init_args) for each in (config.one, *config.several)]
    assert found == [{"device": device, "name": "cpu"} for device in ("cuda:0", "cuda:0", "cuda:1")]


# -- runs for debugging ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mode",
    [
        "fast_dev_run=2",
        "overfit_batches=2",
        pytest.param("fast_dev_run=true", marks=pytest.mark.slow),
        pytest.param("barebones=true", marks=pytest.mark.slow),
    ],
)
def test_runs_for_debugging_overwrite_nothing(lightning: Run, trained: Path, mode: str) -> None:
    """From scratch, from the last checkpoint, and in every verb; with all loggers of the shipped file."""
    before = contents(trained)
    assert {"plugin/plugin.safetensors", "checkpoints/last.ckpt", "answers.jsonl", "config_test.yaml"} <= before.keys()
    for verb, more in (("fit", ()), ("fit", ("--ckpt_path=last",)), ("test", ()), ("predict", ())):
        result = lightning(verb, f"--trainer.{mode}", "--trainer.max_steps=4", *more)
        assert result.code == 0, result.err
        assert contents(trained) == before, (verb, more)


def test_a_checkpoint_can_be_tried(lightning: Run, trained: Path) -> None:
    """Its weights, for as many steps as are asked for, however many it has had."""
    result = lightning("fit", "--trainer.fast_dev_run=3", "--ckpt_path=last", "--data.init_args.train_samples=21")
    assert result.code == 0, result.err
    assert "fast_dev_run: the checkpoint's weights and optimizer, from step 0" in result.err
    assert "fit ended at step 3 " in result.err


def test_a_run_for_debugging_leaves_no_folder(lightning: Run, root: Path) -> None:
    result = lightning("fit", "--trainer.fast_dev_run=true")
    assert result.code == 0, result.err
    assert not root.exists()
    assert "plug-in  " not in result.err


# -- starts that fail -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--trainer.val_check_interval=400",), "val_check_interval"),
        ((f"{CALLBACKS}.EarlyStopping", "--trainer.callbacks.init_args.monitor=val_loss"), "no metric `val_loss`"),
        (("--ckpt_path=last", "--model.pruner.init_args.inner=32"), "another pruner or repair"),
    ],
    ids=["interval", "metric", "checkpoint"],
)
def test_a_start_that_fails_leaves_nothing(lightning: Run, root: Path, option: tuple[str, ...], says: str) -> None:
    """In one line, without a run in W&B or a version of the CSV logger; the folder of a run stays as it was."""
    before = {}
    if "--ckpt_path=last" in option:
        assert lightning("fit").code == 0
        before = at_rest(root)
    result = lightning("fit", *option)
    assert result.code == 1
    assert [says in line for line in result.err.splitlines() if line.startswith("error: ")] == [True]
    assert "Traceback" not in result.err
    assert "wandb sync" not in result.err
    assert contents(root) == before if before else not root.exists()


def test_another_projects_data_module_is_refused_in_words(lightning: Run) -> None:
    result = lightning(
        "fit", "--data=lightning.pytorch.demos.boring_classes.BoringDataModule", "--trainer.logger=false"
    )
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: data: the data module gives batches of type Tensor; this")


# -- what other verbs write -----------------------------------------------------------------------------------------
def test_other_settings_are_written_beside_the_runs_own(lightning: Run, trained: Path) -> None:
    """Settings, answers and pictures of one verb have one number; the same settings again overwrite their own files."""
    quiet = "--trainer.logger=false"
    before = contents(trained)
    for _ in range(2):
        assert lightning("test", quiet, files=(FASTV,)).code == 0
        assert lightning("predict", quiet, "--model.max_new_tokens=1", "--ckpt_path=last").code == 0
    after = contents(trained)
    assert {name: after[name] for name in before} == before
    new = {"config_test_2.yaml", "config_predict_2.yaml", "answers_2.jsonl"}
    assert after.keys() - before.keys() == new | {f"samples/test_2_step0_{i}.png" for i in range(4)}
    own, other = (yaml.safe_load(after[f"config_test{end}.yaml"])["model"]["pruner"] for end in ("", "_2"))
    assert (own["class_path"].rpartition(".")[2], other["class_path"].rpartition(".")[2]) == ("RCP", "FastV")
    assert len(after["answers_2.jsonl"].splitlines()) == 7
    assert after["config_test.yaml"].startswith(b"# checkpoint: ")
    assert b"last.ckpt" in after["config_test.yaml"].splitlines()[0]
    assert after["config_test_2.yaml"].startswith(b"# checkpoint: none\n")


def test_another_checkpoint_is_another_setting(lightning: Run, trained: Path) -> None:
    result = lightning("test", "--trainer.logger=false")
    assert result.code == 0
    assert (trained / "config_test_2.yaml").is_file()
    assert f"settings  {trained}/config_test_2.yaml" in result.err


def test_a_method_that_has_not_learnt_is_said_first(lightning: Run, trained: Path) -> None:
    quiet = "--trainer.logger=false"
    for verb in ("test", "validate", "predict"):
        result = lightning(verb, quiet)
        first = result.out.splitlines()[0]
        assert first.startswith("note: untrained plug-in: neither --ckpt_path nor --model.plugin is given")
        assert first.endswith(f"{trained} has a trained one: --ckpt_path last")
        assert verb == "predict" or ", of an untrained plug-in" in result.err
    told = ("--model.pruner=null", "--model.repair=null", "--model.lora=null", f"--model.plugin={trained}/plugin")
    for result in (
        lightning("test", quiet, "--ckpt_path=last"),
        lightning("test", quiet, *told),
        lightning("test", quiet, files=(FASTV,)),
        lightning("fit", quiet),
    ):
        assert result.code == 0, result.err
        assert "untrained" not in result.out + result.err


def test_answers_of_fewer_ranks_leave_none_of_more(lightning: Run, trained: Path) -> None:
    (trained / "answers.rank3.jsonl").write_text("old")
    (trained / "answers_2.rank3.jsonl").write_text("another's")
    assert lightning("predict", "--trainer.logger=false", "--ckpt_path=last").code == 0
    assert {path.name for path in trained.glob("answers*")} == {"answers.jsonl", "answers_2.rank3.jsonl"}
    assert all(json.loads(line)["id"] for line in (trained / "answers.jsonl").read_text().splitlines())
    assert steps(trained / "checkpoints") == 2
