"""Optuna study over the trials of a sweep, in a journal that several workers may share."""

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lit_prune.errors import LitPruneError
from lit_prune.training.sweeps.file import Sweep
from lit_prune.training.sweeps.trial import LOG, TrialFailed, run_trial

JOURNAL = "journal.log"
SILENT_SECONDS = 300.0  # a running trial touches its log far more often, but shared file systems lag


def open_study(sweep: Sweep, folder: Path, seed: int | None = None) -> optuna.Study:
    """Create or reopen the study in a folder; raises `LitPruneError` if the folder holds another sweep."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    existing = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    other = LitPruneError(f"{folder} holds another sweep, or one of other parameters: choose a folder with --out")
    if existing and sweep.name not in existing:
        raise other
    study = optuna.create_study(
        storage=storage, study_name=sweep.name, direction=sweep.goal, pruner=sweep.pruner(), load_if_exists=True
    )
    if study.user_attrs.get("settings", sweep.settings()) != sweep.settings():
        raise other
    study.set_user_attr("settings", sweep.settings())
    # A resumed sweep needs another seed, or it would draw the same trials again.
    study.sampler = sweep.sampler(None if seed is None else seed + len(study.trials))
    return study


def _requeue_interrupted(study: optuna.Study) -> None:
    """Mark trials whose worker has died as failed, and queue them again."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        log = Path(trial.user_attrs.get("folder", ".")) / LOG
        if log.is_file() and time.time() - log.stat().st_mtime > SILENT_SECONDS:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran or are running, without interrupted ones that were queued again."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get("again") for trial in trials}
    return [trial for trial in trials if trial.number not in again and trial.state != TrialState.WAITING]


def search(
    study: optuna.Study,
    sweep: Sweep,
    folder: Path,
    total: int,
    more: list[str],
    report: Callable[[FrozenTrial], None],
) -> None:
    """Run trials one by one until `total` have run or are running.

    Of a grid, points are counted: one that two workers happened to run counts once.

    Args:
        study: the study. sweep: its sweep file. folder: parent of the trials' folders.
        total: number of trials, over all workers.
        more: further options of every trial's command.
        report: called with each finished trial.
    """
    grid = sweep.grid() if sweep.method == "grid" else []
    while True:
        _requeue_interrupted(study)
        ran = [trial.params for trial in counted(study)]
        left = [point for point in grid if point not in ran]
        if (len(grid) - len(left) if grid else len(ran)) >= total or (grid and not left):
            return
        if grid and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(random.choice(left))  # at random, so that workers seldom choose the same point
        trial = study.ask(sweep.space)
        place = folder / f"{trial.number:04d}"
        trial.set_user_attr("folder", str(place))
        line = sweep.line(trial.params, [*more, f"--trainer.default_root_dir={place}"])
        _run(study, trial, line, place, sweep.metric)
        report(study.get_trials(deepcopy=False)[trial.number])


def _run(study: optuna.Study, trial: optuna.Trial, line: list[str], place: Path, metric: str) -> None:
    """Run one trial and record its outcome."""

    def report(number: int, value: float) -> bool:
        trial.report(value, number)
        return trial.should_prune()

    started = time.monotonic()
    value, state = None, TrialState.FAIL
    try:
        value, stopped = run_trial(line, place, metric, report)
        state = TrialState.PRUNED if stopped else TrialState.COMPLETE
    except TrialFailed as error:
        trial.set_user_attr("why", f"{error}, see {place / LOG}")
    except BaseException:
        trial.set_user_attr("why", "cut off")
        study.tell(trial, state=state)
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        raise
    trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
    study.tell(trial, value if state == TrialState.COMPLETE else None, state, skip_if_finished=True)


def outcome(trial: FrozenTrial) -> str:
    """State or result of a trial in words."""
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('why', 'cut off')}"
    states = {TrialState.PRUNED: "stopped early", TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
    reported = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    value = trial.value if trial.value is not None else (reported or [None])[-1]
    words = [] if value is None else [f"{value:.4f}"]
    return ", ".join([*words, states[trial.state]] if trial.state in states else words)
