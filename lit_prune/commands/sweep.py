"""Search settings: a sweep file of Weights & Biases, run by Optuna, without an account."""

import csv
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError, extra

if TYPE_CHECKING:  # Optuna is an extra
    import optuna

    from lit_prune.training.sweeps import Sweep

TERMINATED = 128 + signal.SIGTERM


def run(
    config: str,
    out: Path | None = None,
    trials: int | None = None,
    fixed: list[str] | None = None,
    seed: int | None = None,
) -> None:
    """Run the trials of a sweep one by one, each as a separate command, the one that `wandb agent` would run.

    A failed trial is marked and the sweep continues. The same command resumes a sweep; several running on one folder,
    such as the tasks of a Slurm array, share the trials. At the end: a table, `trials.csv` and plots in the folder.

    Args:
        config: Sweep file, e.g. -c configs/sweeps/micro.yaml: `method` grid, random or bayes (Optuna's TPE),
            `early_terminate` hyperband (successive halving over the validations).
        out: Folder of the journal, with one for each trial; by default runs/sweeps/NAME.
        trials: Trials in all, e.g. --trials 20, those that ran before counted; by default the file's run_cap, or the
            whole grid.
        fixed: Options that every trial gets, e.g. --fixed trainer.max_steps=50 model.base=/models/llava.
        seed: Of the proposals; by default another each time.

    Examples:
        lit-prune sweep -c sweeps/micro.yaml --trials 12
        lit-prune sweep -c sweeps/micro.yaml --trials 2 --fixed trainer.max_steps=20 --out runs/sweeps/short
    """
    if find_spec("optuna") is None:
        raise LitPruneError(f"`lit-prune sweep` needs Optuna: {extra('sweep')}")
    from lit_prune.training.sweeps import open_study, outcome, read_sweep, search

    sweep = read_sweep(config)
    total = trials or sweep.cap or (len(sweep.grid()) if sweep.method == "grid" else None)
    if total is None:
        raise LitPruneError(f"{config} says nothing of an end: give --trials N, or `run_cap` in the file")
    folder = out or Path("runs/sweeps") / sweep.name
    study = open_study(sweep, folder, seed)
    more = [option if option.startswith("--") else f"--{option}" for option in fixed or []]
    with _terminable(), Progress(console=console.err, disable=not console.err.is_terminal) as progress:
        task = progress.add_task(sweep.name, total=total)

        def report(trial: "optuna.trial.FrozenTrial") -> None:
            progress.update(task, completed=trial.number + 1)
            console.say(f"trial {trial.number}: {outcome(trial)}")

        search(study, sweep, folder, total, more, report)
    finish(study, sweep, folder, more)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the running trial is ended too."""
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def finish(study: "optuna.Study", sweep: "Sweep", folder: Path, more: list[str]) -> None:
    """Print the table and the best trial's command, write `trials.csv` and plots; an error if no trial succeeded."""
    from lit_prune.training.sweeps import outcome

    names, trials = list(sweep.space), study.get_trials(deepcopy=False)
    table = Table("trial", sweep.metric, *(name.rpartition(".")[2] for name in names), "seconds")
    with (folder / "trials.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", sweep.metric, *names, "seconds", "folder"])
        for trial in trials:
            values = [trial.params.get(name, "") for name in names]
            seconds, place = (trial.user_attrs.get(key, "") for key in ("seconds", "folder"))
            rows.writerow([trial.number, trial.state.name.lower(), trial.value, *values, seconds, place])
            short = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
            table.add_row(str(trial.number), outcome(trial), *short, str(seconds))
    console.out.print(table)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not done:
        raise LitPruneError(f"no trial succeeded; their logs are in {folder}")
    draw(study, sweep, folder)
    best = study.best_trial
    console.say(f"best: trial {best.number}, {sweep.metric} {best.value:.4f}, in {best.user_attrs['folder']}")
    console.say(f"  {shlex.join(sweep.line(best.params, more))}")
    console.say(f"trials.csv, history.png and parameters.png are in {folder}")


def draw(study: "optuna.Study", sweep: "Sweep", folder: Path) -> None:
    """Plot the best value over the trials, and values against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import optuna.visualization.matplotlib as plots

    for name, plot in (("history", plots.plot_optimization_history), ("parameters", plots.plot_parallel_coordinate)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a parameter that had one value only has no scale
            axes = plot(study, target_name=sweep.metric)
        axes.figure.set_size_inches(9, 4)
        axes.figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
