"""One trial of a sweep: a subprocess, monitored through the metrics it logs."""

import csv
import difflib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LOG = "log.txt"
POLL_SECONDS = 0.5
GRACE_SECONDS = 120.0  # between SIGTERM and SIGKILL


class TrialFailed(Exception):
    """A trial whose process failed or logged no value of the metric; the sweep continues."""


def values_of(folder: Path, metric: str) -> list[float]:
    """Values of a metric that a run has logged so far, in order, from the CSV files in its folder."""
    values = []
    for file in sorted(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime):
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may be half written
        values += [row[metric] for row in csv.DictReader(whole.splitlines()) if row.get(metric)]
    return [float(value) for value in values]


def names_in(folder: Path) -> list[str]:
    """Names of all metrics that a run has logged."""
    heads = [file.read_text(encoding="utf-8").partition("\n")[0] for file in folder.rglob("metrics.csv")]
    return sorted({name for head in heads for name in head.split(",")})


def run_trial(line: list[str], folder: Path, metric: str, report: Callable[[int, float], bool]) -> tuple[float, bool]:
    """Run a trial as a subprocess, with its output in `folder`/log.txt, which is touched while it runs.

    Args:
        line: the command. folder: the trial's own log folder.
        metric: name of the metric to follow.
        report: called with the number (from 1) and value of each new value of the metric; True stops the trial.

    Returns:
        The last value, and whether the trial was stopped.

    Raises:
        TrialFailed: the process ended with an error or without a value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("w", encoding="utf-8") as log:
        log.write(f"{' '.join(line)}\n")
        log.flush()
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        seen, stopped = 0, False
        try:
            while process.poll() is None and not stopped:
                time.sleep(POLL_SECONDS)
                os.utime(folder / LOG)
                for value in values_of(folder, metric)[seen:]:
                    seen += 1
                    stopped = stopped or report(seen, value)
        finally:
            _end(process)
    values = values_of(folder, metric)
    for number, value in enumerate(values[seen:], seen + 1):
        report(number, value)
    if process.returncode and not stopped:
        raise TrialFailed(f"exit code {process.returncode}{_last_error(folder / LOG)}")
    if not values:
        near = difflib.get_close_matches(metric, names_in(folder), n=1)
        raise TrialFailed(f"logged no {metric}{f'; did you mean {near[0]}?' if near else ''}")
    if not math.isfinite(values[-1]):
        raise TrialFailed(f"{metric} is {values[-1]}")
    return values[-1], stopped


def _last_error(log: Path) -> str:
    """Last error message in a trial's log, in parentheses; empty without one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank: \d+\] )?error: ", line)]
    return f" ({errors[-1]})" if errors else ""


def _end(process: subprocess.Popen) -> None:
    """Terminate a process and its children, and kill them after a grace period."""
    for number, timeout in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            continue
