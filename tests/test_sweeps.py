"""Sweep files: their keys by our own parser, their trials by W&B's own agent and by Optuna, failures included."""

import contextlib
import csv
import json
import os
import queue
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from tiny import ROOT

from lit_prune.cli import main
from lit_prune.cost.sizes import model_size
from lit_prune.errors import LitPruneError
from lit_prune.loading import shipped_config
from lit_prune.ops.budget import average
from lit_prune.training.sweeps import open_study, outcome, read_sweep, search
from lit_prune.training.sweeps import study as study_module
from lit_prune.vlm import plugin_from_yaml

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
FILE = {
    "name": "quick",
    "command": ["${interpreter}", "trial.py", "${args}"],
    "method": "random",
    "metric": {"name": "score", "goal": "maximize"},
    "parameters": {"x": {"values": [1, 2, 3]}, "y": {"min": 0.0, "max": 1.0}, "z": {"value": 5}},
}
# A trial of its own kind: logs `x` three times as Lightning's CSV logger would, fails at x = 2, and takes longer than a
# test may at x = 0.
TRIAL = """
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("x", "y", "z", "trainer.default_root_dir"):
    parser.add_argument(f"--{name}", dest=name.rpartition(".")[2])
got = parser.parse_args()
if got.x == "2":
    sys.exit("x is 2")
folder = pathlib.Path(got.default_root_dir) / "logs"
folder.mkdir(parents=True)
(folder / "pid").write_text(str(os.getpid()))
for step in range(3):
    with (folder / "metrics.csv").open("a") as file:
        file.write(("step,score\\n" if step == 0 else "") + f"{step},\\n{step},{got.x}\\n")
    time.sleep(600 if got.x == "0" else 0)
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Writes a sweep over trials of no time into an empty working folder and reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_prune.training.sweeps.trial.POLL_SECONDS", 0.05)
    Path("trial.py").write_text(TRIAL)

    def make(**changes):
        Path("sweep.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
        return read_sweep("sweep.yaml")

    return make


def table(folder: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "trials.csv").read_text().splitlines()))


def ends(sweep) -> list[str]:
    return [trial.state.name for trial in open_study(sweep, Path("out")).get_trials()]


# -- the files ------------------------------------------------------------------------------------------------------
def corners(sweep) -> list[dict]:
    """Settings that hold every value of a list, both ends of every range and a number between them at least once."""
    draw = random.Random(0)
    values = {
        name: list(getattr(kind, "choices", ())) or [kind.low, kind.high, draw.uniform(kind.low, kind.high)]
        for name, kind in sweep.space.items()
    }
    return [{name: them[i % len(them)] for name, them in values.items()} for i in range(max(map(len, values.values())))]


def at(config: dict, dotted: str):
    for part in dotted.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_every_key_parses(path, capsys, monkeypatch):
    """The command line of `wandb agent` gives the parser each parameter as the number or list that it is."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    assert yaml.safe_load(path.read_text())["program"] == "lit-prune"
    for params in corners(sweep):
        line = sweep.line(params, [])
        told = {name: {"value": value} for name, value in {**sweep.fixed, **params}.items()}
        assert line[line.index("configs/trial.yaml") + 1 :] == create_sweep_command_args({"args": told})["args"]
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            main([*line[line.index("fit") :], "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        for name, value in {**sweep.fixed, **params}.items():
            wanted = yaml.safe_load(value) if isinstance(value, str) else value
            found = at(config, name)
            if name == "trainer.devices":  # may be text; Lightning reads "1" as 1
                found = int(found)
            assert (found, type(found)) == (wanted, type(wanted)), name
    assert "run_id" not in path.read_text()
    assert "WANDB_RUN_ID" not in path.read_text()


def test_the_trials_folder_is_the_runs(capsys, monkeypatch):
    """What an agent starts is kept apart by the run's id, logs and checkpoints included."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    with contextlib.suppress(SystemExit):
        main(["fit", "-c", "configs/rcp.yaml", "-c", "configs/trial.yaml", "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["default_root_dir"] == "runs/sweep/abc"
    assert [logger["init_args"]["save_dir"] for logger in trainer["logger"]] == ["runs/sweep/abc"] * 2
    assert "runs/sweep/abc/checkpoints" in json.dumps(trainer["callbacks"])


def test_every_budget_of_the_grid_is_in_reach():
    """Each combination of budget and layers has a schedule on LLaVA-1.5-7B."""
    size = model_size(shipped_config("llava-hf/llava-1.5-7b-hf"))
    grid = read_sweep(ROOT / "configs/sweeps/budgets.yaml").grid()
    assert len(grid) == 12
    for point in grid:
        plugin = plugin_from_yaml(ROOT / "configs/models/llava-1.5-7b.yaml")
        config = {**plugin.pruner.config(), "layers": json.loads(point["model.pruner.init_args.layers"])}
        schedule = type(plugin.pruner)(**config).schedule(point["model.keep"], size.image.visual, size.depth)
        assert average(schedule, size.image.visual, size.depth) == pytest.approx(point["model.keep"], abs=0.5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "guess"}, "`method` must be one of"),
        ({"metric": {"goal": "maximize"}}, "`metric` needs"),
        ({"parametres": {}}, "`parametres` is no key"),
        ({"parameters": None}, "needs `parameters`"),
        ({"parameters": {"x": {"distribution": "normal", "mu": 0, "sigma": 1}}}, "`x` needs"),
        ({"parameters": {"x": {"values": [[1, 2]]}}}, "as text"),
        ({"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "above 0"),
        ({"early_terminate": {"type": "median"}}, "`early_terminate` needs"),
        ({"command": ["${args_no_hyphens}"]}, "`command` has"),
    ],
)
def test_what_a_sweep_cannot_be(quick, changes, told):
    with pytest.raises(LitPruneError, match=told):
        quick(**changes)


def test_a_sweep_file_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    for name, told in (("none.yaml", "No such file"), ("bad.yaml", "not valid YAML")):
        with pytest.raises(LitPruneError, match=rf"{name}: {told}"):
            read_sweep(tmp_path / name)


# -- Optuna ---------------------------------------------------------------------------------------------------------
def test_a_failed_trial_does_not_stop_a_grid(quick, capsys):
    quick(method="grid", parameters={"x": {"values": [1, 2, 3]}, "y": {"value": 0.5}})
    main(["sweep", "-c", "sweep.yaml", "--out", "out", "--fixed", "z=7"])
    shown = capsys.readouterr()
    assert "failed: exit code 1, see out/" in " ".join(shown.err.split())
    rows = {row["x"]: row for row in table("out")}
    assert {x: row["state"] for x, row in rows.items()} == {"1": "complete", "2": "fail", "3": "complete"}
    log = Path(rows["2"]["folder"], "log.txt").read_text()
    assert log.startswith(f"{sys.executable} trial.py --y=0.5 --x=2 --z=7 --trainer.default_root_dir=out/")
    assert log.endswith("x is 2\n")
    assert f"best: trial {rows['3']['trial']}, score 3.0000" in shown.err
    assert all(Path("out", name).read_bytes()[:4] == b"\x89PNG" for name in ("history.png", "parameters.png"))
    main(["sweep", "-c", "sweep.yaml", "--out", "out"])  # the whole grid is done: nothing runs again
    assert len(list(Path("out").glob("*/log.txt"))) == 3


def test_a_sweep_goes_on_where_it_was(quick, monkeypatch):
    """Also over a trial that was cut off with its worker, and is tried again; but never in another sweep."""
    sweep = quick(parameters={"x": {"values": [1, 3]}, "y": {"min": 0.0, "max": 1.0}, "z": {"value": 1}})
    study = open_study(sweep, Path("out"), seed=4)
    search(study, sweep, Path("out"), 2, [], lambda trial: None)
    lost = study.ask(sweep.space)
    lost.set_user_attr("folder", "out/lost")
    Path("out/lost").mkdir()
    Path("out/lost/log.txt").touch()
    search(study, sweep, Path("out"), 3, [], lambda trial: None)
    assert len(study.get_trials()) == 3  # it may be running elsewhere
    monkeypatch.setattr(study_module, "SILENT_SECONDS", -1.0)
    again = open_study(sweep, Path("out"), seed=4)
    search(again, sweep, Path("out"), 4, [], lambda trial: None)
    trials = again.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[3].params == lost.params
    assert len({trial.params["y"] for trial in trials}) == 4  # the same seed, and no draw repeated
    for changes in ({"name": "another"}, {"parameters": {"x": {"values": [9]}}}):
        with pytest.raises(LitPruneError, match="holds another sweep"):
            open_study(quick(**changes), Path("out"))


def test_a_trial_that_fails_says_why(quick):
    """Where its metric is misspelt, and where the command itself has said what is wrong."""
    sweep = quick(metric={"name": "scores"}, parameters={"x": {"values": [1]}})
    told = []
    search(open_study(sweep, Path("out")), sweep, Path("out"), 1, [], lambda trial: told.append(outcome(trial)))
    assert told == ["failed: logged no scores; did you mean score?, see out/0000/log.txt"]
    Path("trial.py").write_text("import sys; sys.exit('noise\\nerror: no such option')")
    study = open_study(sweep, Path("again"))
    search(study, sweep, Path("again"), 1, [], lambda trial: told.append(outcome(trial)))
    assert told[1] == "failed: exit code 1 (error: no such option), see again/0000/log.txt"


def test_two_workers_share_a_sweep(quick):
    """Together they run the grid, and seldom the same point."""
    sweep = quick(method="grid", parameters={"x": {"values": [1, 3, 4, 5, 6, 7, 8, 9]}})

    both_begun = Barrier(2, timeout=240)

    def work() -> int:
        done = []

        def tell(trial) -> None:
            done.append(trial)
            if len(done) == 1:
                both_begun.wait()

        search(open_study(sweep, Path("out")), sweep, Path("out"), 8, [], tell)
        return len(done)

    with ThreadPoolExecutor(2) as pool:
        both = [worker.result() for worker in [pool.submit(work), pool.submit(work)]]
    assert min(both) > 0
    assert 8 <= sum(both) <= 12
    trials = open_study(sweep, Path("out")).get_trials()
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert {trial.params["x"] for trial in trials} == {1, 3, 4, 5, 6, 7, 8, 9}
    assert len({trial.user_attrs["folder"] for trial in trials}) == len(trials)


def test_a_poor_trial_is_stopped_early(quick):
    sweep = quick(
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2}, parameters={"x": {"min": 0, "max": 9}}
    )
    study = open_study(sweep, Path("out"))
    for x in (9, 8, 0):
        study.enqueue_trial({"x": x})
    search(study, sweep, Path("out"), 3, [], lambda trial: None)
    assert [trial.state.name for trial in study.get_trials()][::2] == ["COMPLETE", "PRUNED"]
    assert study.get_trials()[2].intermediate_values == {1: 0.0}


def test_an_interrupted_trial_is_ended_and_queued_again(quick, monkeypatch):
    sweep = quick(method="grid", parameters={"x": {"values": [0]}})
    study = open_study(sweep, Path("out"))
    pids = []

    def interrupt(line, folder, metric, report):
        def told(number, value):
            pids.append(int((folder / "logs" / "pid").read_text()))
            raise KeyboardInterrupt

        return run_trial(line, folder, metric, told)

    run_trial = study_module.run_trial
    monkeypatch.setattr(study_module, "run_trial", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(study, sweep, Path("out"), 1, [], lambda trial: None)
    assert ends(sweep) == ["FAIL", "WAITING"]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_end_must_be_named(quick, capsys):
    quick()
    with pytest.raises(SystemExit):
        main(["sweep", "-c", "sweep.yaml"])
    assert "--trials N" in capsys.readouterr().err


# -- real training --------------------------------------------------------------------------------------------------

SHORT = {
    "trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1,
    "data.init_args.train_samples": 12, "data.init_args.val_samples": 6, "data.init_args.test_samples": 6,
    "data.init_args.batch_size": 4,
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch, micro_folder):
    """A working folder with the configurations, and the options that make a run of micro.yaml short."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return {**SHORT, "model.base": str(micro_folder), "data.init_args.root": str(tmp_path / "world")}


def test_the_shipped_sweep_trains_with_optuna(checkout, capsys):
    """configs/sweeps/micro.yaml with its own parameters, but for the length of a trial."""
    fixed = [f"{name}={value}" for name, value in checkout.items()]
    main(["sweep", "-c", "configs/sweeps/micro.yaml", "--trials", "1", "--seed", "0", "--fixed", *fixed])
    (row,) = table("runs/sweeps/micro")
    assert row["state"] == "complete"
    assert 0.0 <= float(row["val/accuracy/all"]) <= 1.0
    saved = yaml.safe_load(Path(row["folder"], "config_fit.yaml").read_text())
    assert saved["model"]["lr"] == pytest.approx(float(row["model.lr"]))
    assert list(Path(row["folder"]).glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_wandbs_agent_runs_the_shipped_sweep(checkout, monkeypatch, capfd):
    """W&B's own agent loop over the file's own parameters, without a server; a failed trial doesn't stop it."""
    from wandb.wandb_agent import Agent

    raw = yaml.safe_load(Path("configs/sweeps/micro.yaml").read_text())
    sweep = read_sweep("configs/sweeps/micro.yaml")
    checkout |= {"trainer.max_steps": 1, "trainer.limit_val_batches": 0}
    raw["command"] = raw["command"][:-1] + [f"--{name}={value}" for name, value in checkout.items()] + ["${args}"]
    raw["parameters"].pop("trainer.val_check_interval")  # a validation in two steps
    good = corners(sweep)[1]
    proposed = [{**good, "model.train_mode": "hard"}, good]
    orders = [
        {
            "type": "run",
            "run_id": f"trial{i}",
            "program": raw["program"],
            "args": {k: {"value": params[k]} for k in params},
        }
        for i, params in enumerate(proposed)
    ]

    def heartbeat(agent_id, metrics, running):
        return [orders.pop(0)] if orders and not running else []

    answers = {"sweep": {"config": yaml.safe_dump(raw)}, "register_agent": {"id": "agent"}}
    server = stand_in(monkeypatch, answers, heartbeat)
    monkeypatch.setattr(wandb, "Api", lambda *a, **k: None)
    monkeypatch.setattr(Agent, "POLL_INTERVAL", 0.2)
    monkeypatch.setenv("WANDB_DIR", os.getcwd())
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    agent = Agent(server, _Queue(), sweep_id="sweep1", count=2)
    agent.run()
    assert (agent._finished, agent._failed) == (2, 1)
    assert not orders
    assert "`model.train_mode`: expected one of" in capfd.readouterr().err
    assert [file.parent.name for file in Path("runs/sweep").glob("*/config_fit.yaml")] == ["trial1"]
    saved = yaml.safe_load(Path("runs/sweep/trial1/config_fit.yaml").read_text())
    assert saved["model"]["lr"] == pytest.approx(good["model.lr"])
    assert saved["model"]["train_mode"] == good["model.train_mode"] == "drop"
    assert list(Path("runs/sweep/trial1").glob("wandb/offline-run-*-trial1"))


def stand_in(monkeypatch, answers: dict[str, Any], heartbeat: Callable) -> Any:
    """W&B's server, for an agent to ask: by functions of a module in newer versions, by methods of its api before."""
    from wandb.apis.public import sweeps

    if hasattr(sweeps, "_agent_heartbeat"):
        monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *a, **k: answers["sweep"])
        monkeypatch.setattr(sweeps, "_register_agent", lambda *a, **k: answers["register_agent"])
        monkeypatch.setattr(sweeps, "_agent_heartbeat", lambda api, *a: heartbeat(*a))
        return None
    methods = {name: lambda *a, answer=answer, **k: answer for name, answer in answers.items()}
    return SimpleNamespace(**methods, agent_heartbeat=heartbeat)


class _Queue:
    """The agent's queue for commands that come from its own process; there are none."""

    def get(self, *args, **kwargs):
        time.sleep(0.1)
        raise queue.Empty
