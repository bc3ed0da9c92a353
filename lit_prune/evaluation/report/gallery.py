"""The samples that a report shows: the question, the reference, the full model's answer and each method's."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_prune.evaluation.report.runs import Entry, Run, Sample

KINDS = {
    "lost": "full right, pruned wrong",
    "gained": "full wrong, pruned right",
    "differs": "another answer, as right or as wrong",
    "same": "the same answer",
}
DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Answer:
    """What a method at a budget answered; `kind` is one of `KINDS`."""

    method: str
    label: str
    text: str
    right: bool
    kind: str
    kl: float | None
    confidence: float | None
    kept: str


@dataclass(frozen=True)
class Card:
    """A sample with all answers to it; `picture` is a data URI, "" where there is no copy of its image.

    `group` is that of `lit_prune.evaluation.groups`, "" where questions were not divided.
    """

    run: str
    id: str
    skill: str
    group: str
    question: str
    reference: str
    full: str
    full_right: bool
    picture: str
    answers: list[Answer]


def kind_of(sample: Sample) -> str:
    """How an answer stands to the full model's, see `KINDS`."""
    if sample["full_right"] != sample["right"]:
        return "lost" if sample["full_right"] else "gained"
    return "same" if sample.get("agrees", sample["full"] == sample["answer"]) else "differs"


def cards(runs: Sequence[Run], most: int) -> list[Card]:
    """At most so many samples of all runs, those that most methods lose first; images are read of these alone."""
    found: list[tuple[tuple[int, int], Run, int]] = []
    for run in runs:
        pruned = _pruned(run)
        for record in run.records:
            kinds = [kind_of(entry.by_record[record][0]) for entry in pruned]
            found.append(((kinds.count("lost"), len(kinds) - kinds.count("same")), run, record))
    found.sort(key=lambda each: each[0], reverse=True)  # stable: in the order of the data
    return [_card(run, record) for _, run, record in found[:most]]


def _pruned(run: Run) -> list[Entry]:
    return [entry for entry in run.entries if entry.seeds and entry.budget is not None]


def _answer(entry: Entry, record: int) -> Answer:
    """Of the first seed, where there are several."""
    sample = entry.by_record[record][0]
    seed = f", seed {entry.seeds[0][0]}" if len(entry.seeds) > 1 else ""
    stages = sample.get("kept") or {}
    kept = ", ".join(f"{count} from layer {layer}" for layer, count in stages.items())
    return Answer(
        entry.method,
        entry.label + seed,
        str(sample["answer"]),
        bool(sample["right"]),
        kind_of(sample),
        sample.get("kl"),
        sample.get("confidence"),
        kept and f"{kept}, of {sample['total']}" if sample.get("total") else kept,
    )


def _card(run: Run, record: int) -> Card:
    sample = run.samples[record]
    skill: Any = sample.get("skill")
    return Card(
        run.name,
        str(sample["id"]),
        "" if skill is None else str(skill),
        "" if run.groups is None else run.groups.of.get(record, ""),
        str(sample["question"]),
        str(sample["reference"]),
        str(sample["full"]),
        bool(sample["full_right"]),
        _picture(run.folder / "images", str(sample.get("image") or "")),
        [_answer(entry, record) for entry in _pruned(run)],
    )


def _picture(folder: Path, digest: str) -> str:
    file = folder / f"{digest}.jpg"
    if not DIGEST.fullmatch(digest) or not file.is_file():
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
