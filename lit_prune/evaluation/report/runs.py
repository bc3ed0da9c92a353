"""Folders that `lit-prune compare` wrote, read for a report."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.cells import FULL
from lit_prune.evaluation.groups import Groups
from lit_prune.evaluation.rows import Row, means
from lit_prune.evaluation.store import samples_folder

NEEDED = ("method", "keep", "seed", "status", "accuracy")  # of a cell
BENCH = "bench.json"  # of `lit-prune bench --json`
TIMED = ("method", "keep", "batch", "ttft_ms", "tokens_per_s")  # of its rows
ASKED = ("id", "record", "question", "reference", "full", "answer", "full_right", "right")  # of a sample

Sample = dict[str, Any]


@dataclass
class Entry:
    """A method at a budget: the mean of its seeds, and the records of its samples, a list a seed.

    `budget` is None for the full model. `seconds` are the CPU times per question of the seeds that have one, `latency`
    the wall-clock times of answering one. `bench` is the row that `lit-prune bench` measured, at its smallest batch.
    """

    mean: Row
    seeds: list[tuple[int | None, list[Sample]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    bench: Row | None = None

    @property
    def method(self) -> str:
        return self.mean["method"]

    @property
    def budget(self) -> int | str | None:
        return self.mean["keep"]

    @property
    def label(self) -> str:
        """Method and budget."""
        return self.method if self.budget is None else f"{self.method}, {self.budget}"

    @cached_property
    def by_record(self) -> dict[int, list[Sample]]:
        """The samples of all seeds by their index in the data."""
        found: dict[int, list[Sample]] = {}
        for _, samples in self.seeds:
            for each in samples:
                found.setdefault(each["record"], []).append(each)
        return found


@dataclass
class Run:
    """One comparison. `remarks` are sentences about what is missing from it; `groups` those of its questions."""

    folder: Path
    rows: list[Row]
    entries: list[Entry]
    remarks: list[str]
    groups: Groups | None = None

    @property
    def name(self) -> str:
        """The folder's last part, or the whole of it where that has none."""
        return self.folder.resolve().name or str(self.folder)

    @cached_property
    def records(self) -> list[int]:
        """Indices of the samples that every entry with samples has, in the order of the data."""
        shared = [set(each.by_record) for each in self.entries if each.seeds]
        return sorted(set.intersection(*shared)) if shared else []

    @cached_property
    def samples(self) -> dict[int, Sample]:
        """One record of each of `records`: for what was asked, and the full model's answer."""
        source = next((each for each in self.entries if each.seeds), None)
        return {} if source is None else {record: source.by_record[record][0] for record in self.records}

    @property
    def images(self) -> list[str]:
        """The image of each of `records`; one without stands for itself."""
        return [self.samples[record].get("image") or f"record {record}" for record in self.records]

    def right(self, entry: Entry) -> np.ndarray:
        """Share of an entry's seeds that answer each of `records` right."""
        found = [[each["right"] for each in entry.by_record[record]] for record in self.records]
        return np.array([np.mean(each) for each in found])

    @property
    def full_right(self) -> np.ndarray:
        """1 where the full model answers right, of each of `records`."""
        return np.array([float(self.samples[record]["full_right"]) for record in self.records])

    @property
    def full(self) -> Entry | None:
        """The full model, where it is a row."""
        return next((each for each in self.entries if each.budget is None), None)

    @property
    def visual(self) -> int:
        """Visual tokens of an image: the most that any layer of any method gets."""
        totals = [sample["total"] for sample in self.samples.values() if sample.get("total")]
        layers = [count for each in self.entries for count in each.mean.get("tokens_per_layer") or []]
        return max(1, round(float(np.mean(totals)) if totals else max(layers, default=1.0)))


def read_run(folder: Path) -> Run:
    """Raises `LitPruneError` for a folder without results, for damaged files, and where nothing was measured."""
    file, again = folder / "results.json", f"lit-prune compare --out {folder}"
    if not folder.is_dir():
        raise LitPruneError(f"{folder}: no such folder; `{again}` makes it")
    if not file.is_file():
        raise LitPruneError(f"{folder} has no results.json, so no comparison was written there: run `{again}`")
    rows = _rows(file, again)
    if not any(row["status"] == "measured" for row in rows):
        raise LitPruneError(f"{file}: no cell has a result: {_first_reason(rows)}run `{again}` again")
    entries, remarks = [Entry(mean) for mean in means(rows)], _unmeasured(rows)
    places = {(each.method, each.budget): each for each in entries}
    without: dict[str, None] = {}
    for row in rows:
        if row["status"] != "measured":
            continue
        entry = places[row["method"], row["keep"]]
        seconds, latency = _times(folder, row)
        entry.seconds += seconds
        entry.latency += latency
        if samples := _samples(folder, row, again):
            entry.seeds.append((row["seed"], samples))
        else:
            without[row["method"]] = None
    entries = [each for each in entries if each.mean["runs"]]
    if without:
        remarks.append(
            f"{', '.join(without)}: measured before answers were kept, so intervals, differences and answers are "
            f"unknown; `{again} --fresh` with the same options measures them again"
        )
    run = Run(folder, rows, entries, remarks, Groups.read(folder))
    timed = _bench(folder)
    for entry in entries:
        entry.bench = _timed(timed, entry)
    if timed and (missing := [each.label for each in entries if each.bench is None]):
        remarks.append(f"{BENCH} has no times of {', '.join(missing)}")
    asked = {record for each in entries for record in each.by_record}
    if apart := len(asked) - len(run.records):
        remarks.append(f"{apart} questions that not every method answered count neither in intervals nor among answers")
    return run


def _rows(file: Path, again: str) -> list[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise LitPruneError(f"{file} can't be read ({error}): run `{again}` again") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise LitPruneError(f"{file} is no list of cells: run `{again}`")
    for number, row in enumerate(rows):
        if missing := [name for name in NEEDED if name not in row]:
            raise LitPruneError(
                f"{file}: cell {number} has no `{missing[0]}`, so compare did not write it: run `{again}`"
            )
        if not isinstance(row["method"], str) or not isinstance(row["keep"], int | str | None):
            raise LitPruneError(f"{file}: cell {number} has no method or budget that can be read: run `{again}`")
        if row["status"] == "measured" and not isinstance(row["accuracy"], int | float):
            raise LitPruneError(
                f"{file}: cell {number} is measured, but its accuracy is no number: run `{again}` again"
            )
    return rows


def _first_reason(rows: Sequence[Row]) -> str:
    reason = next((row.get("reason") for row in rows if row.get("reason")), "")
    return f"{reason}; " if reason else ""


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    """Sentences on cells without a result, and notes on those with one."""
    said: dict[str, dict[str, None]] = {}
    for row in rows:
        at = "" if row["keep"] is None else f" at {row['keep']} tokens"
        for text in (row.get("note"), row.get("reason") and f"{row['status']}{at}, {row['reason']}"):
            if text:
                said.setdefault(text, {})[row["method"]] = None
    return [f"{', '.join(methods)}: {text}" for text, methods in said.items()]


def _samples(folder: Path, row: Row, again: str) -> list[Sample]:
    """The records of a cell's samples; none where an earlier version measured it."""
    file = samples_folder(folder) / f"{Path(str(row.get('cell') or '-')).name}.jsonl"
    return list(_lines(file, again)) if file.is_file() else []


def _times(folder: Path, row: Row) -> tuple[list[float], list[float]]:
    """CPU seconds and seconds of answering, per question of a cell, each where its file is there and says so."""
    try:
        text = (folder / "cells" / f"{Path(str(row.get('cell') or '-')).name}.json").read_text(encoding="utf-8")
        result = json.loads(text)["result"]
        latency = result.get("latency")
        return [result["seconds"] / row["questions"]], [] if latency is None else [float(latency)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return [], []


def _bench(folder: Path) -> list[Row]:
    """The rows that `lit-prune bench --json` wrote into the folder; raises `LitPruneError` for a damaged file."""
    file = folder / BENCH
    if not file.is_file():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return [{name: row[name] for name in TIMED} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LitPruneError(
            f"{file} was not written by bench ({error!r}): run `lit-prune bench --json {file}` again, or remove it"
        ) from error


def _timed(rows: Sequence[Row], entry: Entry) -> Row | None:
    """The row of a method at its budget, of the smallest batch. Bench may add the budget to a method's name."""
    names = (entry.method, FULL) if entry.budget is None else (entry.method,)
    mine = [
        row
        for row in rows
        if row["keep"] == entry.budget and (row["method"] in names or row["method"].rpartition(" ")[0] in names)
    ]
    return min(mine, key=lambda row: row["batch"], default=None)


def _lines(file: Path, again: str) -> Iterator[Sample]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (ValueError, OSError) as error:
        raise LitPruneError(f"{file} can't be read ({error}): run `{again} --fresh`") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found = json.loads(line)
            missing = [name for name in ASKED if name not in found]
        except (ValueError, TypeError, RecursionError) as error:
            raise LitPruneError(f"{file}, line {number} is damaged ({error}): run `{again} --fresh`") from error
        if not isinstance(found, dict) or missing:
            raise LitPruneError(f"{file}, line {number} has no {missing or ['object']}: run `{again} --fresh`")
        yield found


def baseline_entry(run: Run, baseline: str, entry: Entry) -> Entry | None:
    """The entry that another is compared with: the method `baseline` at the same budget, or without one."""
    return next((each for each in run.entries if each.method == baseline and each.budget in (entry.budget, None)), None)


def check_baseline(runs: Sequence[Run], baseline: str) -> None:
    """Raises `LitPruneError` unless some run has a method of that name; the full model need be none."""
    methods = dict.fromkeys(each.method for run in runs for each in run.entries)
    if baseline != FULL and baseline not in methods:
        raise LitPruneError(
            f"--baseline {baseline}: no such method; there are {', '.join(dict.fromkeys([FULL, *methods]))}"
        )
