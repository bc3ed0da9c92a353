"""What a comparison found: a row a cell, their means over seeds, and the flat form that CSV and W&B take."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torchmetrics.functional import spearman_corrcoef

from lit_prune.evaluation.cells import Cell
from lit_prune.evaluation.comparison import TIMES
from lit_prune.evaluation.groups import GROUPS
from lit_prune.ops.budget import parse_budget, tokens

Row = dict[str, Any]

INNER = ("hits", "flips", *TIMES)  # kept with the cell alone
LATER = ("lost", "gained", "kl")  # not in cells that version 0.1 measured


def row(cell: Cell, result: Row | None, full: Row, split: str = "val", groups: dict[str, Row] | None = None) -> Row:
    """A cell as `results.json` has it; `full` is the full model's result, `split` the one that it was measured on.

    Without a result all its values are null. `groups` are its figures by group, see `Groups.figures`.

    `status` is measured, failed, empty (there is no such result), or pending in a run that isn't over. `cell` names the
    files that belong to it. What an earlier version did not measure is null.
    """
    missing = "failed" if cell.failed else "empty" if cell.reason else "pending"
    status = missing if result is None else "measured"
    found: Row = {"method": cell.method, "keep": cell.keep, "seed": cell.seed, "split": split, "status": status}
    derived = {"retained": None, "flops_reduction": None}
    if result is not None:
        derived["retained"] = result["accuracy"] / full["accuracy"] if full["accuracy"] else 0.0
        known = result["flops"] is not None and full["flops"]
        derived["flops_reduction"] = 1.0 - result["flops"] / full["flops"] if known else None
    names = [name for name in dict.fromkeys([*full, *LATER]) if name not in INNER]
    values = {name: None if result is None else result.get(name) for name in names}
    said = {"note": "", "reason": cell.reason} if result is None else {"note": cell.note, "reason": ""}
    return {**found, **derived, **values, "groups": groups, **said, "cell": cell.key}


def means(rows: Sequence[Row]) -> list[Row]:
    """One row per method and budget, in order of appearance: measured seeds averaged, their spread beside the accuracy.

    `runs` counts the seeds; `accuracy_std` is their standard deviation, 0 for one. What has no result keeps its reason.
    """
    groups: dict[tuple, list[Row]] = {}
    for each in rows:
        groups.setdefault((each["method"], each["keep"]), []).append(each)
    found = []
    for group in groups.values():
        measured = [{**each, "seed": None} for each in group if each["status"] == "measured"]
        mean = _average(measured or group[:1])
        accuracies = [each["accuracy"] for each in measured]
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        found.append({**mean, "seed": None, "runs": len(measured), "accuracy_std": spread})
    return found


def _average(values: list[Any]) -> Any:
    """Mean of numbers, lists of them, or dictionaries (their common keys); of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _average([value[key] for value in values]) for key in first if all(key in v for v in values)}
    if isinstance(first, list):
        return [_average(list(items)) for items in zip(*values, strict=True)]
    if any(value is None for value in values):
        return None
    if isinstance(first, str) or all(value == first for value in values):
        return first
    return fmean(values)


def size_of(keep: int | str, visual: int) -> int:
    """Visual tokens that a budget stands for in order, where an image has `visual` of them."""
    return tokens(parse_budget(keep), visual)


def budgets_of(rows: Sequence[Row], visual: int) -> list[int | str]:
    """The budgets, the largest first."""
    keeps = dict.fromkeys(each["keep"] for each in rows if each["keep"] is not None)
    return sorted(keeps, key=lambda keep: size_of(keep, visual), reverse=True)


def caption(rows: Sequence[Row]) -> str:
    """The data that rows were measured on: "val split, 210 questions"."""
    questions = next((each["questions"] for each in rows if each.get("questions") is not None), None)
    parts = [f"{split} split" if (split := rows[0].get("split")) else "", f"{questions} questions" if questions else ""]
    return ", ".join(part for part in parts if part)


def ranks_agree(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Spearman's rank correlation of a column with the accuracy: over all measured cells but the full model's, and its
    mean within budgets of three methods or more, where the budget doesn't drive both. NaN where there are too few.
    """
    measured = [each for each in means(rows) if each["runs"] and each["keep"] is not None]
    budgets = {each["keep"] for each in measured}
    inside = [_spearman([each for each in measured if each["keep"] == keep], name) for keep in sorted(budgets, key=str)]
    inside = [value for value in inside if value == value]
    return _spearman(measured, name), fmean(inside) if inside else float("nan")


def _spearman(rows: Sequence[Row], name: str) -> float:
    x, y = (torch.tensor([each[key] for each in rows], dtype=torch.float64) for key in (name, "accuracy"))
    if len(rows) < 3 or bool((x == x[0]).all() | (y == y[0]).all()):
        return float("nan")
    return spearman_corrcoef(x, y).item()


def flat(rows: Sequence[Row]) -> list[Row]:
    """Rows without lists and mappings but the groups, whose figures become columns such as `groups/blank/accuracy`."""
    nested = {name for each in rows for name, value in each.items() if isinstance(value, dict | list)} | {"groups"}
    found = []
    for each in rows:
        line = {name: value for name, value in each.items() if name not in nested}
        if any(other.get("groups") for other in rows):
            figures = each.get("groups") or {}
            line |= {
                f"groups/{group}/{kind}": (figures.get(group) or {}).get(kind)
                for group in GROUPS
                for kind in ("questions", "accuracy", "agreement")
            }
        found.append(line)
    return found


def as_csv(rows: Sequence[Row]) -> str:
    """The rows that `flat` gives."""
    lines, text = flat(rows), io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
