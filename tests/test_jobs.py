"""The scripts of jobs/: ShellCheck, and the batch scripts run for real under stand-ins for Slurm's commands."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from lit_prune.cli import verbs

BIN = Path(sys.executable).parent
SCRIPTS = sorted([*ROOT.glob("jobs/**/*.sh"), *ROOT.glob("jobs/**/*.sbatch")])
BATCH = sorted(ROOT.glob("jobs/slurm/*.sbatch"))
SHORT = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=0",
    "--data.init_args.train_samples=12", "--data.init_args.val_samples=6", "--data.init_args.test_samples=6",
    "--data.init_args.batch_size=2",
]  # fmt: skip
PATIENCE = 900  # seconds: four processes that start one after the other on a busy machine
DIRECTIVES = "#!/bin/bash\n#SBATCH --nodes=1\n"


@pytest.fixture
def cluster(tmp_path, monkeypatch, micro_folder):
    """A submit folder like the repository's root, stand-ins on PATH, and the options of a short run of micro."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "jobs"):
        Path(name).symlink_to(ROOT / name)
    Path("runs/slurm").mkdir(parents=True)
    monkeypatch.setenv("PATH", os.pathsep.join([str(ROOT / "tests" / "slurm"), str(BIN), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CONFIG", "configs/micro.yaml")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return [*SHORT, f"--model.base={micro_folder}", f"--data.init_args.root={tmp_path / 'world'}"]


def sbatch(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sbatch", *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, check=False)


def output() -> str:
    return "".join(file.read_text() for file in sorted(Path("runs/slurm").glob("*.out")))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    checked = subprocess.run([BIN / "shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["test.sh", "try.sh"])
def test_one_thread_where_none_is_asked_for(name):
    """Set before the work begins; a number that is set already stays."""
    text = (ROOT / "jobs" / name).read_text()
    line = next(line for line in text.splitlines() if line.startswith("export OMP_NUM_THREADS"))
    for before, after in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | before
        command = ["bash", "-c", f'{line}; printf %s "$OMP_NUM_THREADS"']
        assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == after
    assert text.index(line) < min(text.index(command) for command in ("lit-prune fit", "-m pytest") if command in text)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_batch_scripts_are_what_slurm_takes(cluster, script, tmp_path):
    """Known directives with good values, before the first command, no path of ours in the spooled copy; `bash -n`."""
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "BASH_SOURCE" not in text
    first = text.index("set -euo pipefail")
    (tmp_path / "directives.sbatch").write_text(text[:first] + "exit 0\n")
    ran = sbatch("--array=0-0" if "--array" in text else "--nodes=1", "directives.sbatch")
    assert ran.returncode == 0, ran.stderr
    assert "Submitted batch job" in ran.stdout


def test_the_readme_names_what_is_there():
    text = (ROOT / "jobs" / "README.md").read_text()
    named = re.findall(r"(?<![\w/])(?:jobs|configs|docs|tests)/[\w./-]+\w", text)
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]
    assert set(re.findall(r"lit-prune ([a-z]+) -", text)) <= set(verbs())
    scripts = [str(path.relative_to(ROOT / "jobs")) for path in [*SCRIPTS, *ROOT.glob("jobs/*.py")]]
    assert not [script for script in scripts if f"`{script}`" not in text]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DIRECTIVES + "#SBATCH --node=2\n", "unrecognized option"),
        (DIRECTIVES + "#SBATCH --time=soon\n", "invalid value for --time"),
        (DIRECTIVES + "#SBATCH --signal=SIGUSR1\n", "invalid value for --signal"),
        (DIRECTIVES + "set -e\n#SBATCH --mem=1G\n", "behind the first command"),
        (DIRECTIVES + "#SBATCH --output=nowhere/%j.out\n", "the folder must be there"),
        ("set -e\n", "batch script"),
    ],
)
def test_the_stand_in_is_strict(cluster, text, told):
    Path("bad.sbatch").write_text(text)
    refused = sbatch("bad.sbatch")
    assert refused.returncode != 0
    assert told in refused.stderr


@pytest.mark.timeout(PATIENCE)
def test_two_tasks_are_one_run(cluster):
    """jobs/slurm/one_node.sbatch, cut down to two tasks on CPUs."""
    ran = sbatch("--ntasks-per-node=2", "jobs/slurm/one_node.sbatch", *cluster)
    assert ran.returncode == 0, output()
    assert "Starting with 2 processes" in output()
    assert torch.load("runs/try/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert Path("runs/try/plugin/plugin.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_two_nodes_are_one_run(cluster):
    ran = sbatch("--nodes=2", "--ntasks-per-node=1", "jobs/slurm/several_nodes.sbatch", *cluster)
    assert ran.returncode == 0, output()
    assert "Starting with 2 processes" in output()
    assert torch.load("runs/try/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_a_preempted_job_comes_back(cluster, monkeypatch):
    """The signal before the time is up: saved, queued again by the tasks themselves, ended in the second start."""
    monkeypatch.setenv("STANDIN_SIGNAL_WHEN", "runs/try/logs/version_0/metrics.csv")
    options = [*cluster, "--trainer.max_steps=12", "--trainer.max_epochs=9", "--trainer.log_every_n_steps=1"]
    ran = sbatch("--ntasks-per-node=2", "jobs/slurm/preemptible.sbatch", *options)
    assert ran.returncode == 0, output()
    assert "SIGUSR1: stopped at step" in output()
    assert "is in the queue again" in output()
    assert output().count(", restart 1,") == 1
    assert torch.load("runs/try/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_a_task_that_fails_ends_the_run(cluster):
    ran = sbatch("--ntasks-per-node=2", "jobs/slurm/one_node.sbatch", *cluster, "--model.train_mode=hard")
    assert ran.returncode != 0
    assert "`model.train_mode`" in output()


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_workers_of_an_array_share_a_sweep(cluster, monkeypatch):
    """Two workers, three trials, one failing: each once."""
    monkeypatch.setenv("SWEEP", "sweep.yaml")
    text = (ROOT / "configs/sweeps/micro.yaml").read_text().replace("method: bayes", "method: grid")
    head = text.partition("parameters:")[0]
    Path("sweep.yaml").write_text(head + "parameters:\n  model.train_mode: {values: [soft, hard, drop]}\n")
    fixed = [option.removeprefix("--") for option in cluster if "limit_val" not in option]
    limits = ["trainer.val_check_interval=2", "trainer.limit_val_batches=1"]
    ran = sbatch("--array=0-1", "jobs/slurm/sweep_array.sbatch", "--fixed", *fixed, *limits)
    assert ran.returncode == 0, output()
    rows = list(csv.DictReader(Path("runs/sweeps/micro/trials.csv").read_text().splitlines()))
    assert {row["model.train_mode"]: row["state"] for row in rows} == {
        "soft": "complete",
        "hard": "fail",
        "drop": "complete",
    }
