"""What a comparison found, as rows, means over seeds, CSV and Markdown."""

import csv
import io
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torchmetrics.functional import spearman_corrcoef

from lit_prune.evaluation.cells import FULL, Cell
from lit_prune.evaluation.comparison import TIMES
from lit_prune.ops.budget import parse_budget, tokens

Row = dict[str, Any]

INNER = ("hits", "flips", *TIMES)  # kept with the cell alone
LATER = ("lost", "gained", "kl")  # not in cells that version 0.1 measured
COLUMNS = ("method", "accuracy %", "of full %", "tokens", "MFLOP", "saved %", "KV kB", "W2")


def row(cell: Cell, result: Row | None, full: Row, split: str = "val") -> Row:
    """A cell as `results.json` has it; `full` is the full model's result, `split` the one that it was measured on.

    Without a result all its values are null.

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
    return {**found, **derived, **values, **said, "cell": cell.key}


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


# Tables of text


def methods_table(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of one budget's means under `COLUMNS`; with several runs the accuracy carries its standard deviation."""
    return [list(COLUMNS), *(_cells(each) for each in rows)]


def _cells(each: Row) -> list[str]:
    if not each["runs"]:
        return [each["method"], *["–"] * (len(COLUMNS) - 1)]
    return [
        each["method"],
        _accuracy(each),
        f"{100 * each['retained']:.1f}",
        f"{each['avg_visual_tokens']:.1f}",
        _known(each["flops"], 1e-6, 0),
        _known(each["flops_reduction"], 100, 1),
        _known(each["kv_bytes"], 1e-3, 0),
        f"{each['w2']:.2f}",
    ]


def _known(value: float | None, scale: float, digits: int) -> str:
    return "unknown" if value is None else f"{scale * value:.{digits}f}"


def loyalty_table(rows: Sequence[Row]) -> list[list[str]]:
    """How far the answers of one budget's means are the full model's."""
    head = ["method", "same answer %", "right to wrong %", "wrong to right %", "KL, nats"]
    return [
        head,
        *(
            [
                each["method"],
                _known(each.get("agreement"), 100, 1),
                _known(each.get("lost"), 100, 1),
                _known(each.get("gained"), 100, 1),
                _known(each.get("kl"), 1, 3),
            ]
            if each["runs"]
            else [each["method"], *["–"] * (len(head) - 1)]
            for each in rows
        ),
    ]


def scores_table(averaged: Sequence[Row]) -> list[list[str]]:
    """The official scores of benchmarks, a line for each method and budget."""
    names = list(dict.fromkeys(name for each in averaged for name in each.get("headlines") or {}))
    lines = []
    for each in averaged:
        scores = each.get("headlines") or {}
        cells = [f"{scores[name]:.2f}" if name in scores else "–" for name in names]
        lines.append([each["method"], "all" if each["keep"] is None else str(each["keep"]), *cells])
    return [["method", "keep", *names], *lines]


def skills_table(rows: Sequence[Row]) -> list[list[str]]:
    """Accuracy per skill of one budget's means, in per cent."""
    skills = next((list(each["per_skill"]) for each in rows if each["runs"]), [])
    shown = [
        [each["method"], *(f"{100 * each['per_skill'][skill]:.1f}" if each["runs"] else "–" for skill in skills)]
        for each in rows
    ]
    return [["method", *skills], *shown]


def budgets_table(rows: Sequence[Row], text: Callable[[Row], str], visual: int) -> list[list[str]]:
    """A line a method, a column a budget: `text` of each mean, a dash where there is no result."""
    keeps = budgets_of(rows, visual)
    lines: dict[str, dict[int | str | None, str]] = {}
    for each in rows:
        lines.setdefault(each["method"], {})[each["keep"]] = text(each) if each["runs"] else "–"
    shown = [[method, *(texts.get(keep, texts.get(None, "")) for keep in keeps)] for method, texts in lines.items()]
    return [["method", *(str(keep) for keep in keeps)], *shown]


def budgets_of(rows: Sequence[Row], visual: int) -> list[int | str]:
    """The budgets, the largest first."""
    keeps = dict.fromkeys(each["keep"] for each in rows if each["keep"] is not None)
    return sorted(keeps, key=lambda keep: size_of(keep, visual), reverse=True)


def _accuracy(each: Row) -> str:
    spread = f" ± {100 * each['accuracy_std']:.1f}" if each["runs"] > 1 else ""
    return f"{100 * each['accuracy']:.1f}{spread}"


OVERVIEWS: dict[str, Callable[[Row], str]] = {
    "accuracy, %": _accuracy,
    "of full accuracy, %": lambda each: f"{100 * each['retained']:.1f}",
    "same answer as the full model, %": lambda each: _known(each.get("agreement"), 100, 1),
    "kappa": lambda each: f"{each['kappa']:.3f}",
    "W2": lambda each: f"{each['w2']:.2f}",
}


def overviews(rows: Sequence[Row], visual: int) -> dict[str, list[list[str]]]:
    """Tables by title, methods against budgets; where there is one budget only, its own tables."""
    averaged = means(rows)
    if len({each["keep"] for each in averaged} - {None}) < 2:
        return {**details(rows, visual), **_official(rows, averaged)}
    said = f"by visual tokens ({caption(rows)})"
    found = {f"{title}, {said}": budgets_table(averaged, text, visual) for title, text in OVERVIEWS.items()}
    return {**found, **_official(rows, averaged)}


def _official(rows: Sequence[Row], averaged: Sequence[Row]) -> dict[str, list[list[str]]]:
    """The table of official scores, where the data are benchmarks."""
    if not any(each.get("headlines") for each in averaged):
        return {}
    return {f"official scores ({caption(rows)})": scores_table(averaged)}


def details(rows: Sequence[Row], visual: int) -> dict[str, list[list[str]]]:
    """Tables by title: what methods keep and cost, and their accuracy per skill, budget by budget."""
    averaged, found = means(rows), {}
    keeps = list(dict.fromkeys(each["keep"] for each in averaged if each["keep"] is not None))
    for keep in keeps or [None]:
        here = [each for each in averaged if each["keep"] in (keep, None)]
        title = FULL
        if isinstance(keep, int):
            title = f"{keep} of {visual} visual tokens on average ({keep / visual:.1%})"
        elif keep is not None:
            title = f"{keep} of each sample's visual tokens on average"
        found[f"{title}; {caption(rows)}"] = methods_table(here)
        if any(each["per_skill"] for each in here if each["runs"]):
            found[f"accuracy per skill at {keep or visual}, %; {caption(rows)}"] = skills_table(here)
        found[f"answers beside the full model's at {keep or visual}; {caption(rows)}"] = loyalty_table(here)
    return found


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each note and each reason with the methods it is about, and the rank correlations of the shifts."""
    said: dict[str, dict[str, None]] = {}
    for each in rows:
        for text in (each["note"], each["reason"] and f"{each['status']} at {each['keep']} tokens, {each['reason']}"):
            if text:
                said.setdefault(text, {})[each["method"]] = None
    lines = [f"{', '.join(methods)}: {text}." for text, methods in said.items()]
    for name, title in (("w2", "W2"), ("kappa", "kappa")):
        everywhere, inside = ranks_agree(rows, name)
        if everywhere == everywhere:
            within = f", {inside:+.2f} within a budget" if inside == inside else ""
            lines.append(f"Rank correlation of {title} and accuracy: {everywhere:+.2f} over all cells{within}.")
    return lines


def markdown(rows: Sequence[Row], visual: int) -> str:
    """All tables and remarks for a document; the titles only where there are several budgets, or official scores.

    Below the tables stands what they were measured on.
    """
    found = {**overviews(rows, visual), **details(rows, visual)}
    several = len({each["keep"] for each in rows} - {None}) > 1 or any(each.get("headlines") for each in rows)
    lines = []
    for title, (columns, *body) in found.items():
        lines += [f"**{title}**", ""] if several else []
        lines += [_line(columns), "|---" + "|---:" * (len(columns) - 1) + "|", *map(_line, body), ""]
    lines += [f"Measured on the {caption(rows)}.", ""]
    return "\n".join([*lines, *(f"- {line}" for line in remarks(rows))]).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return " | ".join(cell.replace("|", "\\|") for cell in cells).join(("| ", " |"))


def as_csv(rows: Sequence[Row]) -> str:
    """The columns that are no lists or mappings."""
    flat = [name for name in rows[0] if not any(isinstance(each[name], dict | list) for each in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, flat, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
