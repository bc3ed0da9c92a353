"""The command line: doors, verbs, configurations, errors. Stand-ins replace the model, so nothing heavy is loaded."""

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import lightning as L
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.utilities import rank_zero_only
from tiny import ROOT
from torch import nn
from torch.utils.data import DataLoader

from lit_prune import cli
from lit_prune.commands import trainer
from lit_prune.commands._support import options
from lit_prune.errors import LitPruneError

ME = __name__
BIN = Path(sys.executable).parent


class Pruner(nn.Module):
    """Stand-in for the contract."""


class Fast(Pruner):
    def __init__(self, layers: list[int] = [2], keep: int = 4) -> None:  # noqa: B006
        super().__init__()
        if keep < 1:
            raise LitPruneError("keep must be at least 1")


class Other(Pruner):
    def __init__(self, keep: int = 99, depth: float = 0.0) -> None:
        super().__init__()


class Outer(Pruner):
    def __init__(self, inner: Pruner, keep: int = 1) -> None:
        super().__init__()


class Model(L.LightningModule):
    """Stand-in for the student."""

    def __init__(
        self,
        base: str = "micro",
        pruner: Pruner | None = None,
        keep: int = 16,
        fault: str = "",
        train_mode: Literal["soft", "drop"] = "soft",
    ) -> None:
        super().__init__()
        self.line, self.keep, self.fault = nn.Linear(1, 1), keep, fault
        self.plugin = self.line
        self.save_hyperparameters(ignore=["pruner"])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.fault:
            raise {
                "interrupt": KeyboardInterrupt(),
                "user": LitPruneError("bad"),
                "wandb": wandb.errors.CommError("no server\nset this"),
                "bug": ZeroDivisionError(),
            }[self.fault]
        return self.line(batch).pow(2).mean()

    def step_key(self) -> None:
        """Where the run is, for the guard that every run has."""

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if self.fault == "load":
            raise LitPruneError("another model's")

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("keep", float(self.keep))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Data(L.LightningDataModule):
    def __init__(self, base: str, size: int = 4, root: str = "here") -> None:
        super().__init__()
        self.base, self.size = base, size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.size, 1))

    test_dataloader = train_dataloader


class OtherData(L.LightningDataModule):
    def __init__(self, size: int = 77) -> None:
        super().__init__()


CONFIG = f"""
model:
  keep: 8
  pruner:
    class_path: {ME}.Fast
    init_args: {{layers: [1], keep: "${{model.keep}}"}}
data:
  class_path: {ME}.Data
  init_args: {{size: "${{model.keep}}"}}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: run
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: run/checkpoints, save_last: true}}
"""


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def config(self) -> dict:
        return yaml.safe_load(self.out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with `base.yaml`, and stand-ins in place of the real classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "MODEL", f"{ME}.Model")
    monkeypatch.setattr(trainer, "DATA", f"{ME}.Data")
    monkeypatch.delenv("LIT_PRUNE_DEBUG", raising=False)
    Path("base.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Result]:
    """Run a command line in this process."""

    def call(line: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            cli.main(line.split())
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def edit(name: str, old: str, new: str) -> None:
    """Write the configuration with one thing changed."""
    assert old in CONFIG
    Path(name).write_text(CONFIG.replace(old, new))


def shell(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


# The doors


@pytest.mark.parametrize("door", [[BIN / "lightning"], [BIN / "lit-prune"], [sys.executable, "-m", "lit_prune"]])
def test_help_is_quick_through_every_door(door: list[str | Path]) -> None:
    """Under three seconds of processor time, which other jobs of the machine don't change."""
    process = subprocess.Popen([*map(str, door), "--help"], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 3
    for verb in [*cli.LIGHTNING_VERBS, *cli.verbs()]:
        assert f"  {verb}" in said


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, lit_prune.cli as c; c.main(['--help']); print({'torch', 'lightning'} & {*sys.modules})"
    assert shell(sys.executable, "-c", code).stdout.splitlines()[-1] == "set()"


def test_version_and_no_arguments(run: Callable[[str], Result]) -> None:
    assert run("--version").out.startswith("lit-prune 0")
    assert "verbs:" in run("").out


def test_options_that_are_missing_are_named_as_they_are_written(run: Callable[[str], Result]) -> None:
    result = run("export")
    assert (result.code, result.err) == (2, "error: give --checkpoint, --out\n")


def test_unknown_verb_names_the_closest(run: Callable[[str], Result]) -> None:
    result = run("tets -c base.yaml")
    assert result.code == 2
    assert "unknown verb `tets`; did you mean `test`?" in result.err
    assert "Traceback" not in result.err


def test_other_distributions_lightning_is_handed_the_rest(tmp_path: Path) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = other_tool:go\n")
    (tmp_path / "other_tool.py").write_text("import sys\ndef go():\n    print('other', sys.argv[1:])\n    return 3\n")
    result = shell(BIN / "lightning", "studio", "--now", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (3, "other ['studio', '--now']\n")
    assert shell(BIN / "lit-prune", "studio", PYTHONPATH=str(tmp_path)).returncode == 2


@pytest.mark.parametrize("script", sorted(ROOT.glob("jobs/**/*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash(script: Path) -> None:
    assert shell("bash", "-n", script).returncode == 0
    if script.name in ("try.sh", "test.sh"):
        assert f"bash jobs/{script.name}" in shell("bash", script, "--help").stdout


# Configurations


def test_interpolation_follows_overrides_over_files_and_options(run: Callable[[str], Result]) -> None:
    Path("overlay.yaml").write_text("model: {keep: 5}\n")
    for line, keep in [
        ("fit -c base.yaml", 8),
        ("fit -c base.yaml -c overlay.yaml", 5),
        ("fit -c overlay.yaml -c base.yaml", 8),
        ("fit -c base.yaml -c overlay.yaml --model.keep=3", 3),
        ("test -c base.yaml -c overlay.yaml --model.keep 3", 3),
    ]:
        config = run(f"{line} --print_config").config
        found = (
            config["model"]["keep"],
            config["model"]["pruner"]["init_args"]["keep"],
            config["data"]["init_args"]["size"],
        )
        assert found == (keep, keep, keep), line


def test_print_config_round_trip(run: Callable[[str], Result]) -> None:
    first = run("fit -c base.yaml --model.keep 3 --print_config")
    assert first.config["seed_everything"] == trainer.SEED
    Path("again.yaml").write_text(first.out)
    assert run("fit -c again.yaml --print_config").config == first.config


@pytest.mark.parametrize("swap", ["-c overlay.yaml", "-coverlay.yaml", "--model.pruner=NAME", "--model.pruner NAME"])
def test_a_swapped_class_starts_from_its_own_defaults(run: Callable[[str], Result], swap: str) -> None:
    edit("literal.yaml", "${model.keep}", "7")
    Path("overlay.yaml").write_text(f"model: {{pruner: {{class_path: {ME}.Other, init_args: {{depth: 1}}}}}}\n")
    config = run(
        f"fit -c literal.yaml {swap.replace('NAME', f'{ME}.Other')} --model.pruner.depth 2 --print_config"
    ).config
    assert config["model"]["pruner"] == {"class_path": f"{ME}.Other", "init_args": {"keep": 99, "depth": 2}}


def test_a_swapped_data_module_too_and_it_need_not_know_the_base(run: Callable[[str], Result]) -> None:
    Path("data.yaml").write_text(f"data: {{class_path: {ME}.OtherData}}\n")
    config = run("fit -c data.yaml --model.base elsewhere --print_config").config
    assert config["data"] == {"class_path": f"{ME}.OtherData", "init_args": {"size": 77}}
    assert run(f"fit -c base.yaml --data {ME}.OtherData --print_config").config["data"] == config["data"]


def test_an_overlay_of_the_same_class_keeps_the_rest(run: Callable[[str], Result]) -> None:
    Path("overlay.yaml").write_text(f"model: {{pruner: {{class_path: {ME}.Fast, init_args: {{keep: 2}}}}}}\n")
    config = run("fit -c base.yaml -c overlay.yaml --print_config").config
    assert config["model"]["pruner"]["init_args"] == {"layers": [1], "keep": 2}


@pytest.mark.parametrize("option", ["pruner.init_args.inner", "pruner.inner", "pruner.init_args.inner.class_path"])
def test_a_class_within_a_class_is_swapped_in_the_same_way(run: Callable[[str], Result], option: str) -> None:
    inner = {"class_path": f"{ME}.Fast", "init_args": {"keep": 7}}
    outer = {"class_path": f"{ME}.Outer", "init_args": {"inner": inner, "keep": 5}}
    Path("outer.yaml").write_text(yaml.safe_dump({"model": {"pruner": outer}}))
    config = run(f"fit -c base.yaml -c outer.yaml --model.{option}={ME}.Other --print_config").config
    found = config["model"]["pruner"]["init_args"]
    assert found == {"inner": {"class_path": f"{ME}.Other", "init_args": {"keep": 99, "depth": 0.0}}, "keep": 5}
    Path("inner.yaml").write_text(yaml.safe_dump({"class_path": f"{ME}.Other", "init_args": {"depth": 2}}))
    config = run("fit -c base.yaml -c outer.yaml --model.pruner.init_args.inner inner.yaml --print_config").config
    assert config["model"]["pruner"]["init_args"]["inner"]["init_args"] == {"keep": 99, "depth": 2}


def test_a_default_class_that_is_swapped_and_chosen_again_has_its_defaults(run: Callable[[str], Result]) -> None:
    line = f"fit -c base.yaml --model.pruner={ME}.Other --model.pruner={ME}.Fast --print_config"
    assert run(line).config["model"]["pruner"]["init_args"] == {"layers": [2], "keep": 4}


def test_base_model_reaches_the_data_module(folder: Path) -> None:
    built = trainer.build("base.yaml", ["--model.base=elsewhere"])
    assert built.model.hparams.base == built.datamodule.base == "elsewhere"
    assert built.trainer.max_steps == 2


# Runs


def test_fit_saves_its_configuration_resumes_and_runs_twice(
    run: Callable[[str], Result], caplog: pytest.LogCaptureFixture
) -> None:
    assert run("fit -c base.yaml --ckpt_path last").code == 0  # a first run starts fresh
    assert Path("run/checkpoints/last.ckpt").exists()
    again = run("fit -c base.yaml --ckpt_path last --trainer.max_steps 3")
    assert again.code == 0, again.err
    assert "resumed with other settings than before: trainer.max_steps 2 -> 3\n" in caplog.text
    assert "begins anew" not in caplog.text
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    saved = yaml.safe_load(Path("run/config_fit.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 3
    assert run("fit -c run/config_fit.yaml").code == 0
    assert "has checkpoints of an earlier run, and this one begins anew" in caplog.text
    assert run("test -c run/config_fit.yaml").code == 0
    assert trainer.build("run/config_fit.yaml").model.keep == 8


def test_figures_are_a_short_table_and_none_is_of_zero_flops(run: Callable[[str], Result]) -> None:
    edit("summed.yaml", "  enable_model_summary: false\n", "")
    assert "FLOPs" not in run("fit -c summed.yaml").out
    tested = run("test -c summed.yaml")
    assert re.search(r"keep +8.0\s", tested.out)
    assert "DataLoader 0" not in tested.out
    assert "keep" not in run("test -c summed.yaml --verbose false").out
    table = run("fit -c summed.yaml --trainer.enable_model_summary true").out
    assert "Params" in table
    assert "FLOPs" not in table


def test_the_last_checkpoint_is_of_the_last_step_and_goes_on_with_more(run: Callable[[str], Result]) -> None:
    """Saved every second step; in the middle of an epoch of 8, and at its end."""
    edit("base.yaml", "save_last: true", "save_last: true, every_n_train_steps: 2")
    for steps, last in ((3, 3), (5, 5), (-1, 8)):
        result = run(f"fit -c base.yaml --trainer.max_epochs 1 --trainer.max_steps {steps} --ckpt_path last")
        assert result.code == 0, result.err
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == last


def test_more_steps_than_the_epochs_have_are_refused_where_nothing_would_be_trained(
    run: Callable[[str], Result], caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch has 8 steps. The same command again ends well: a queue may start a run that is over."""
    line = "fit -c base.yaml --ckpt_path last --trainer.max_steps"
    for _ in range(2):
        assert run(f"{line} 20 --trainer.max_epochs 1").code == 0
    assert (
        "nothing is left to train: the checkpoint is of step 8, and all epochs of trainer.max_epochs=1 count"
        in caplog.text
    )
    saved = Path("run/checkpoints/last.ckpt").stat().st_mtime_ns
    refused = run(f"{line} 30 --trainer.max_epochs 1")
    assert refused.code == 1
    assert "trainer.max_steps=30 would train nothing; raise --trainer.max_epochs too" in refused.err
    assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == saved
    assert run(f"{line} 10 --trainer.max_epochs -1").code == 0
    found = [torch.load(path, weights_only=True)["global_step"] for path in Path("run/checkpoints").glob("*.ckpt")]
    assert max(found) == 10


def test_fewer_epochs_than_were_trained_are_refused_in_words(run: Callable[[str], Result]) -> None:
    """An epoch has 8 steps; the last checkpoint is of the third."""
    assert run("fit -c base.yaml --trainer.max_epochs 3 --trainer.max_steps 20").code == 0
    refused = run("fit -c base.yaml --ckpt_path last --trainer.max_epochs 1 --trainer.max_steps 20")
    assert (refused.code, refused.err.splitlines()[-1]) == (
        1,
        "error: the checkpoint is of step 20, past trainer.max_epochs=1; to train on, raise --trainer.max_epochs, or "
        "set it to -1",
    )


def test_more_steps_are_trained_where_nothing_was_saved_before_the_end(run: Callable[[str], Result]) -> None:
    """An epoch of 8 that `max_steps` broke off is no whole one."""
    edit("base.yaml", "save_last: true", "save_last: true, every_n_train_steps: 50")
    for steps in (3, 6, 8):
        result = run(f"fit -c base.yaml --trainer.max_epochs 1 --trainer.max_steps {steps} --ckpt_path last")
        assert result.code == 0, result.err
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps


def test_another_runs_checkpoint_begins_a_run_in_a_folder_of_its_own(run: Callable[[str], Result]) -> None:
    assert run("fit -c base.yaml --trainer.max_steps 2").code == 0
    Path("run/checkpoints/wandb_run_id").write_text("abc")
    edit("base.yaml", "dirpath: run/checkpoints", "dirpath: other/checkpoints")
    line = "fit -c base.yaml --ckpt_path run/checkpoints/last.ckpt --trainer.max_steps 4"
    result = run(f"{line} --trainer.default_root_dir other")  # not there yet
    assert result.code == 0, result.err
    assert torch.load("other/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_without_a_logger_nothing_asks_for_learning_rates(run: Callable[[str], Result]) -> None:
    result = run("fit -c base.yaml --trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor")
    assert result.code == 0, result.err


def test_a_run_that_is_refused_leaves_the_settings_of_the_one_before(run: Callable[[str], Result]) -> None:
    assert run("fit -c base.yaml").code == 0
    before = Path("run/config_fit.yaml").read_text()
    refused = run("fit -c base.yaml --ckpt_path last --model.fault load")
    assert (refused.code, refused.err.strip()) == (1, "error: another model's")
    assert Path("run/config_fit.yaml").read_text() == before


def test_a_checkpoint_brings_no_settings(run: Callable[[str], Result]) -> None:
    assert run("fit -c base.yaml").code == 0
    result = run("test -c base.yaml --model.keep 3 --ckpt_path run/checkpoints/last.ckpt")
    assert result.code == 0
    assert "3.0" in result.out
    assert "8.0" not in result.out


def test_only_fit_goes_on_without_a_checkpoint(run: Callable[[str], Result]) -> None:
    result = run("test -c base.yaml --ckpt_path last")
    assert result.code == 1
    assert "no checkpoint has been written yet" in result.err


def test_a_job_that_slurm_starts_again_goes_on(
    run: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for restarts, steps in (("0", 2), ("0", 2), ("1", 3)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        caplog.clear()
        assert run(f"fit -c base.yaml --trainer.max_steps {steps}").code == 0
        assert ("Restored all states" in caplog.text) == (restarts == "1")
    saved = [torch.load(last, weights_only=True) for last in Path("run/checkpoints").glob("last*.ckpt")]
    assert max(checkpoint["global_step"] for checkpoint in saved) == 3


def test_a_damaged_checkpoint_is_passed_over_or_refused(run: Callable[[str], Result]) -> None:
    assert run("fit -c base.yaml").code == 0
    last = Path("run/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"last\.ckpt: the checkpoint is cut short. Going on from .*epoch=0-step=2"):
        assert run("fit -c base.yaml --ckpt_path last --trainer.max_steps 3").code == 0
    assert torch.load("run/checkpoints/epoch=0-step=3.ckpt", weights_only=True)["global_step"] == 3
    refused = run(f"test -c base.yaml --ckpt_path {last}")
    assert (refused.code, refused.err.splitlines()[-1]) == (1, f"error: {last}: the checkpoint is cut short")


def test_wandb_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(os, "environ", environ := dict(os.environ))
    cli._quiet()
    assert environ.pop("WANDB_MODE") == "offline"
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password none\n")
        cli._quiet()
        assert "WANDB_MODE" not in environ


def test_wandb_runs_share_a_folder_and_know_their_configuration(
    run: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, warned = [], []
    monkeypatch.setattr(trainer.WandbLogger, "log_hyperparams", lambda self, params: seen.append(params))
    monkeypatch.setattr(wandb, "termwarn", lambda text, **_: warned.append(text))
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": "run", "mode": "disabled"},
    }
    Path("wandb.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    for keep in (3, 4):
        result = run(f"test -c base.yaml -c wandb.yaml --model.keep={keep}")
        assert result.code == 0, result.err
    wandb.finish()  # else the next test's first run is this one
    assert not [text for text in warned if "anonymous" in text]
    assert [params["model"]["keep"] for params in seen if "trainer" in params] == [3, 4]
    for name, keep in (("config_test", 3), ("config_test_2", 4)):
        assert yaml.safe_load(Path(f"run/{name}.yaml").read_text())["model"]["keep"] == keep


def test_a_resumed_run_is_the_same_in_wandb(run: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: every start has a folder, named after the run's id; `wandb sync` puts those of one id into one run."""
    for name in ("WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # its process stays in the folder in which an earlier test began it
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": "run", "offline": True},
    }
    Path("wandb.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    ids: list[str] = []
    for more in ("", "--ckpt_path last --trainer.max_steps 3", ""):
        result = run(f"fit -c base.yaml -c wandb.yaml {more}")
        assert result.code == 0, result.err
        ids.append(wandb.run.id)
        folder = Path(wandb.run.dir).parent
        wandb.finish()
        assert re.fullmatch(rf"offline-run-\d+_\d+-{ids[-1]}", folder.name)
        # Its name holds the second of its start, and nothing finer: the next start may come within the same one.
        folder.rename(folder.with_name(f"{len(ids)}-{folder.name}"))
    assert ids[0] == ids[1] != ids[2]


# Errors


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("keep: 8", "kep: 8", "bad.yaml: unknown key `model.kep`; did you mean `model.keep`?"),
        ("layers:", "laers:", f"unknown key `model.pruner.init_args.laers` of {ME}.Fast; did you mean `layers`?"),
        ("size:", "sise:", "bad.yaml: unknown key `data.init_args.sise`"),
        ("max_steps", "max_stps", "unknown key `trainer.max_stps`; did you mean `trainer.max_steps`?"),
        ("trainer:", "trainr:", "bad.yaml: unknown key `trainr`; did you mean `trainer`?"),
        ("save_last", "save_lst", "ModelCheckpoint; did you mean `save_last`?"),
        (f"{ME}.Fast", f"{ME}.Fats", f"no class `{ME}.Fats`"),
        (f"{ME}.Fast", f"{ME}.Fats", f"did you mean `{ME}.Fast`?"),
        ("{layers: [1]", "{layers: much", "`model.pruner.init_args.layers`"),
        ("keep: 8", "keep: many", "`model.keep`: expected int, got many"),
        ("${model.keep}", "${model.kepe}", "nothing is at `${model.kepe}`; did you mean `model.keep`?"),
        ("${model.keep}", "${oc.env:NO_SUCH_THING}", "NO_SUCH_THING"),
        ("keep: 8", "keep: [8", "bad.yaml: not valid YAML"),
    ],
)
def test_a_bad_file_is_one_clear_message(run: Callable[[str], Result], old: str, new: str, says: str) -> None:
    edit("bad.yaml", old, new)
    result = run("fit -c base.yaml -c bad.yaml" if "${" not in new else "fit -c bad.yaml")
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("options_", "says"),
    [
        ("--model.kep 3", "unknown option `--model.kep`; did you mean `--model.keep`?"),
        ("--keep=3", "did you mean `--model.keep`?"),
        ("--size 3", "did you mean `--data.init_args.size`?"),
        ("--model.train_mode hard", "`model.train_mode`: expected one of ['soft', 'drop'], got hard"),
        ("--model.pruner.init_args.laers [1]", "did you mean `layers`?"),
        ("--model.pruner.laers=[1]", "did you mean `layers`?"),
        ("--ckpt_pat last", "did you mean `--ckpt_path`?"),
        ("--model.keep many", "`model.keep`: expected int, got many"),
        (
            "--trainer.precision fp16",
            "'bf16-mixed', '32-true', '64-true'], or one of ['64', '32', '16', 'bf16'], got fp16",
        ),
        ("extra", "unexpected argument `extra`"),
        ("--data.help x", "error: no class `x`; write its full path"),
        ("-c bsae.yaml", "no configuration file `bsae.yaml`; did you mean `base.yaml`?"),
    ],
)
def test_a_bad_option_is_one_clear_message(run: Callable[[str], Result], options_: str, says: str) -> None:
    result = run(f"fit -c base.yaml {options_}")
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err


def test_users_errors_have_no_traceback_unless_debug(run: Callable[[str], Result]) -> None:
    result = run("fit -c base.yaml --model.fault user")
    assert (result.code, result.err.splitlines()[-1]) == (1, "error: bad")
    no_server = "error: Weights & Biases: no server (WANDB_MODE=offline runs without it)"
    assert run("fit -c base.yaml --model.fault wandb").err.splitlines()[-1] == no_server
    assert run("fit -c base.yaml --model.keep=0").err.splitlines()[-1] == "error: keep must be at least 1"
    assert run("fit -c base.yaml --ckpt_path no.ckpt").code == 1
    with pytest.raises(LitPruneError, match="bad"):
        run("fit -c base.yaml --debug --model.fault user")


def test_an_error_of_another_rank_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, said in ((0, "error: bad\n"), (3, "[rank: 3] error: bad\n")):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        assert cli._report(LitPruneError("bad"), debug=False) == 1
        assert capsys.readouterr().err == said


def test_traceback_in_the_shell_only_with_debug(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lit_prune", "nothing"]
    quiet, loud, environment = shell(*command), shell(*command, "--debug"), shell(*command, LIT_PRUNE_DEBUG="1")
    assert (quiet.returncode, "Traceback" in quiet.stderr) == (2, False)
    assert "Traceback" in loud.stderr
    assert "Traceback" in environment.stderr


def test_a_fault_of_the_program_is_not_hidden(run: Callable[[str], Result]) -> None:
    with pytest.raises(ZeroDivisionError):
        run("fit -c base.yaml --model.fault bug")


def test_interrupt_ends_quietly(run: Callable[[str], Result]) -> None:
    result = run("fit -c base.yaml --model.fault interrupt")
    assert result.code == 130
    assert "Traceback" not in result.err


# The verbs that Lightning has not


def _verb(image: list[Path], prompt: str, model: str = "micro", keep: int | None = None, compare: bool = False) -> None:
    """Answer something.

    Args:
        image: The pictures.
        prompt: The question.
        model: The model.
        keep: The budget.
        compare: Beside the full model.
    """
    print(sorted(str(p) for p in image), prompt, model, keep, compare)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--image a b --prompt why", "['a', 'b'] why micro None False"),
        ("--prompt why --image a --compare --image b --keep 3", "['a', 'b'] why micro 3 True"),
        ("--image=[a,b] --prompt=why --compare false --model m", "['a', 'b'] why m None False"),
    ],
)
def test_options_of_a_verb(
    line: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("lit_prune.commands.ask")
    module.run = _verb
    monkeypatch.setitem(sys.modules, module.__name__, module)
    options.run_verb("ask", line.split())
    assert capsys.readouterr().out.strip() == says
    with pytest.raises(cli.UsageError, match="did you mean `--keep`"):
        options.run_verb("ask", [*line.split(), "--kep", "3"])


@pytest.mark.parametrize("verb", sorted(cli.verbs()))
def test_every_verb_explains_itself(verb: str, run: Callable[[str], Result]) -> None:
    assert cli.verbs()[verb], "the module's docstring has no first line"
    result = run(f"{verb} --help")
    assert result.code == 0
    assert f"usage: lit-prune {verb}" in result.out
    assert "a first word is --" in " ".join(result.out.split())


# The real classes, parsed but not made


@pytest.mark.skipif(not find_spec("lit_prune.training.module"), reason="no training module")
@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_parse(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", "-c", str(config), "--print_config"])
    assert not exit_.value.code
    assert yaml.safe_load(capsys.readouterr().out)["model"]
