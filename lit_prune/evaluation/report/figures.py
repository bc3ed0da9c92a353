"""The tables of a report, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from lit_prune.evaluation.cells import FULL
from lit_prune.evaluation.groups import BLANK, DOWNSAMPLED, GROUPS, REST
from lit_prune.evaluation.report.intervals import Interval, interval, resampled_means
from lit_prune.evaluation.report.runs import Entry, Run, baseline_entry
from lit_prune.evaluation.report.table import Column, Figure, Table, name, number, ranged

BENCHED = (
    ("first token ms", "Time to first token from pixels, by `lit-prune bench` (bench.json), at its smallest batch"),
    ("tokens/s", "Tokens answered per second, prefill included, by the same"),
)


# A run's intervals


@dataclass
class Intervals:
    """Accuracy, difference to the baseline and share of the full model's accuracy of every entry with samples."""

    accuracy: dict[int, Interval]
    difference: dict[int, Interval]
    retained: dict[int, Interval]


def intervals_of(run: Run, baseline: str, draws: int, seed: int) -> Intervals:
    """By the entry's place in `run.entries`; empty where no samples were kept."""
    found = Intervals({}, {}, {})
    if not run.records:
        return found
    known = [place for place, entry in enumerate(run.entries) if entry.seeds]
    values = np.stack([run.full_right, *(run.right(run.entries[place]) for place in known)], axis=1)
    images = run.images
    drawn, exact, count = resampled_means(images, values, draws, seed), values.mean(0), len(set(images))
    columns = {place: 1 + column for column, place in enumerate(known)}
    for place, column in columns.items():
        entry = run.entries[place]
        found.accuracy[place] = interval(entry.mean["accuracy"], drawn[:, column], count)
        if exact[0] and drawn[:, 0].all():
            found.retained[place] = interval(exact[column] / exact[0], drawn[:, column] / drawn[:, 0], count)
        other = _baseline_column(run, baseline, place, columns)
        if other is not None and other != column:
            found.difference[place] = interval(exact[column] - exact[other], drawn[:, column] - drawn[:, other], count)
    return found


def _baseline_column(run: Run, baseline: str, place: int, columns: dict[int, int]) -> int | None:
    """The column of values that an entry is compared with; the full model's is 0, whether it is a row or not."""
    if baseline == FULL:
        return None if run.entries[place].budget is None else 0
    other = baseline_entry(run, baseline, run.entries[place])
    return None if other is None else columns.get(run.entries.index(other))


# Retention


def retention(run: Run, entry: Entry) -> tuple[float | None, float | None]:
    """Share of the full model's accuracy over all questions, and the mean of the shares of each skill or benchmark."""
    full = run.full.mean if run.full is not None else {}
    whole = full.get("accuracy") or (float(run.full_right.mean()) if run.records else None)
    over_all = entry.mean["accuracy"] / whole if whole else entry.mean.get("retained")
    parts, of_full = entry.mean.get("headlines") or {}, full.get("headlines") or {}
    if not parts:
        parts, of_full = entry.mean.get("per_skill") or {}, full.get("per_skill") or full_skills(run)
    shares = [parts[part] / of_full[part] for part in parts if of_full.get(part)]
    return over_all, fmean(shares) if shares else None


def above_blank(run: Run, entry: Entry) -> float | None:
    """Share of what the image adds that an entry keeps; None where questions were not divided into groups."""
    if run.groups is None or not run.groups.of or not run.records:
        return None
    blank = run.groups.sizes[BLANK] / len(run.groups.of)
    adds = float(run.full_right.mean()) - blank
    return (entry.mean["accuracy"] - blank) / adds if adds > 0 else None


def full_skills(run: Run) -> dict[str, float]:
    """The full model's accuracy per skill, from the samples."""
    found: dict[str, list[bool]] = {}
    for sample in run.samples.values():
        if sample.get("skill") is not None:
            found.setdefault(str(sample["skill"]), []).append(sample["full_right"])
    return {skill: fmean(hits) for skill, hits in found.items()}


# Tables


def summary(runs: Sequence[Run], found: Sequence[Intervals], baseline: str) -> Table:
    """A line for every method and budget of every run; `found`: each run's intervals."""
    benchmarks = list(dict.fromkeys(key for run in runs for e in run.entries for key in e.mean.get("headlines") or {}))
    timed = any(entry.bench for run in runs for entry in run.entries)
    columns = [
        *([Column("comparison", "The folder")] if len(runs) > 1 else []),
        Column("method"),
        Column("tokens kept", "The budget: visual tokens averaged over the decoder layers"),
        Column("accuracy %", "Exact match, with its 95 % interval"),
        Column(
            f"minus {baseline}",
            f"Accuracy minus that of {baseline}, on the same questions; bold: the interval has no 0",
        ),
        Column("of full %", "Share of the full model's accuracy, over all questions"),
        Column("of full %, mean", "Mean over skills, or benchmarks, of the share of the full model's figure"),
        Column(
            "of full - blank %",
            "Share of what the image adds: accuracy and the full model's, both less the share of questions that it "
            "answers right from a blank image (`lit-prune compare --groups`)",
        ),
        *(Column(each, "Official score") for each in benchmarks),
        Column("same answer %", "Questions answered as the full model answers them, right or wrong"),
        Column("right to wrong %", "Questions that the full model answers right and the method wrong"),
        Column("wrong to right %", "The reverse"),
        Column("KL, nats", "Full model against method, next-token distributions on the right answer's positions"),
        Column("tokens", "Visual tokens averaged over decoder layers, as measured"),
        Column("GFLOP", "The decoder's prefill with everything that pruning adds"),
        Column("FLOPs saved %"),
        Column("KV MB", "Keys and values of the prompt"),
        Column("W2", "Shift of the answer states, averaged over layers; lower is better"),
        Column(
            "latency ms",
            "Wall-clock time per question in the comparison, from encoded images to the last token: median over "
            "batches, on the machine that ran it",
        ),
        *([Column(*each) for each in BENCHED] if timed else []),
        Column("CPU ms", "CPU time per question of the comparison, with the forward that measures the shift"),
    ]
    rows = []
    for run, own in zip(runs, found, strict=True):
        for place, entry in enumerate(run.entries):
            first = [name(run.name)] if len(runs) > 1 else []
            rows.append([*first, *_summary_row(run, entry, place, own, benchmarks), *_times(entry, timed)])
    return Table("Methods and budgets", columns, rows, names=3 if len(runs) > 1 else 2)


def _summary_row(run: Run, entry: Entry, place: int, found: Intervals, benchmarks: Sequence[str]) -> list[Figure]:
    mean, (over_all, over_parts) = entry.mean, retention(run, entry)
    accuracy = found.accuracy.get(place) or Interval(mean["accuracy"], math.nan, math.nan)
    retained = found.retained.get(place) or (Interval(over_all, math.nan, math.nan) if over_all is not None else None)
    seeds = f"{mean['runs']} seeds" if mean["runs"] > 1 else ""
    return [
        Figure(entry.method, entry.method, seeds),
        name("all" if entry.budget is None else entry.budget),
        ranged(accuracy),
        ranged(found.difference.get(place), "+"),
        ranged(retained),
        number(over_parts, 100),
        number(above_blank(run, entry), 100),
        *(number((mean.get("headlines") or {}).get(each), digits=2) for each in benchmarks),
        number(mean.get("agreement"), 100),
        number(mean.get("lost"), 100),
        number(mean.get("gained"), 100),
        number(mean.get("kl"), digits=3),
        number(mean.get("avg_visual_tokens")),
        number(mean.get("flops"), 1e-9, 3),
        number(mean.get("flops_reduction"), 100),
        number(mean.get("kv_bytes"), 1e-6, 2),
        number(mean.get("w2"), digits=2),
    ]


def _times(entry: Entry, timed: bool) -> list[Figure]:
    """Latency as the comparison measured it, as bench did where any row is timed so, and CPU time."""
    bench, batch = entry.bench or {}, f"batch {entry.bench['batch']}" if entry.bench else ""
    benched = [
        replace(number(bench.get("ttft_ms"), digits=1), more=batch),
        replace(number(bench.get("tokens_per_s"), digits=0), more=batch),
    ]
    return [
        number(fmean(entry.latency) if entry.latency else None, 1e3, 2),
        *(benched if timed else []),
        number(fmean(entry.seconds) if entry.seconds else None, 1e3),
    ]


def skills(run: Run) -> Table | None:
    """Accuracy per skill of every entry, in per cent; None where the data name no skills."""
    names = list(dict.fromkeys(skill for entry in run.entries for skill in entry.mean.get("per_skill") or {}))
    if not names:
        return None
    rows = [
        [
            name(entry.method),
            name("all" if entry.budget is None else entry.budget),
            *(number((entry.mean.get("per_skill") or {}).get(skill), 100) for skill in names),
        ]
        for entry in run.entries
    ]
    columns = [Column("method"), Column("tokens kept"), *map(Column, names)]
    return Table("Accuracy per skill, %", columns, rows)


def groups(run: Run) -> Table | None:
    """Accuracy and agreement of every entry in each group of questions; None where they were not divided."""
    if run.groups is None:
        return None
    meanings = {
        BLANK: "Questions that the full model answers right from a blank image",
        DOWNSAMPLED: f"Of the others, those that it answers right from an image with sides / {run.groups.factor}",
        REST: "All others: they take the image's detail",
    }
    sizes = run.groups.sizes
    columns = [Column("method"), Column("tokens kept")]
    for group, meaning in meanings.items():
        columns += [Column(f"{group} ({sizes[group]}): accuracy %", meaning), Column(f"{group}: same answer %")]
    rows = []
    for entry in run.entries:
        found = entry.mean.get("groups") or {}
        figures = [number((found.get(g) or {}).get(kind), 100) for g in GROUPS for kind in ("accuracy", "agreement")]
        rows.append([name(entry.method), name("all" if entry.budget is None else entry.budget), *figures])
    return Table("Questions by how much of the image they take", columns, rows)
