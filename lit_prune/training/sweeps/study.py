"""A study of Optuna over the trials of a sweep, in a journal that several workers may share."""

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
SILENT_SECONDS = 300.0  # a running trial touches its log far more often, but shared file systems are slow to tell


def open_study(sweep: Sweep, folder: Path, seed: int | None = None) -> optuna.Study:
    """The study in a folder, a new one or the one begun there; raises `LitPruneError` if that was of another sweep."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    begun = [known.study_name for known in optuna.get_all_study_summaries(storage)]
    other = LitPruneError(f"{folder} holds another sweep, or one of other parameters: choose a folder with --out")
    if begun and sweep.name not in begun:
        raise other
    study = optuna.create_study(
        storage=storage, study_name=sweep.name, direction=sweep.goal, pruner=sweep.pruner(), load_if_exists=True
    )
    if study.user_attrs.get("settings", sweep.settings()) != sweep.settings():
        raise other
    study.set_user_attr("settings", sweep.settings())
    # The same seed gives the same draws: a sweep that goes on must not repeat itself.
    study.sampler = sweep.sampler(None if seed is None else seed + len(study.trials))
    return study


def _take_up(study: optuna.Study) -> None:
    """Mark trials that were cut off with their worker, and queue them again."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        log = Path(trial.user_attrs.get("folder", ".")) / LOG
        if log.is_file() and time.time() - log.stat().st_mtime > SILENT_SECONDS:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran or run, without those that were cut off and queued again."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get("again") for trial in trials}
    return [trial for trial in trials if trial.number not in again and trial.state != TrialState.WAITING]


def search(
    study: optuna.Study,
    sweep: Sweep,
    folder: Path,
    total: int,
    more: list[str],
    tell: Callable[[FrozenTrial], None],
) -> None:
    """Run trials one by one until `total` ran or run; `more` options go to each, `tell` is told of each that ended.

    Of a grid, points count: workers that meet on one have run it once.
    """
    grid = sweep.grid() if sweep.method == "grid" else []
    while True:
        _take_up(study)
        ran = [trial.params for trial in counted(study)]
        left = [point for point in grid if point not in ran]
        if (len(grid) - len(left) if grid else len(ran)) >= total or (grid and not left):
            return
        if grid and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(random.choice(left))  # by chance, so that workers seldom choose the same
        trial = study.ask(sweep.space)
        place = folder / f"{trial.number:04d}"
        trial.set_user_attr("folder", str(place))
        line = sweep.line(trial.params, [*more, f"--trainer.default_root_dir={place}"])
        _run(study, trial, line, place, sweep.metric)
        tell(study.get_trials(deepcopy=False)[trial.number])


def _run(study: optuna.Study, trial: optuna.Trial, line: list[str], place: Path, metric: str) -> None:
    """Run one trial and note how it ended."""

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
    """How a trial ended, or stands, in words."""
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('why', 'cut off')}"
    ends = {TrialState.PRUNED: "stopped early", TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
    reported = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    value = trial.value if trial.value is not None else (reported or [None])[-1]
    return ", ".join(([] if value is None else [f"{value:.4f}"]) + ([ends[trial.state]] if trial.state in ends else []))
