"""The rows of a comparison as tables of text, for a terminal and for Markdown."""

from collections.abc import Callable, Sequence
from functools import partial

from lit_prune.evaluation.cells import FULL
from lit_prune.evaluation.groups import GROUPS
from lit_prune.evaluation.markdown import literal, row
from lit_prune.evaluation.rows import Row, budgets_of, caption, means, ranks_agree

COLUMNS = ("method", "accuracy %", "of full %", "tokens", "MFLOP", "saved %", "KV kB", "W2")


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
    """Agreement with the full model's answers, from one budget's means."""
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


def groups_table(rows: Sequence[Row]) -> list[list[str]]:
    """Accuracy and agreement of one budget's means in each group of questions; "unknown" where none was formed."""
    kinds = {"accuracy": "accuracy %", "agreement": "same answer %"}
    head = ["method", *(f"{group}: {title}" for group in GROUPS for title in kinds.values())]
    lines = []
    for each in rows:
        found = each.get("groups") or {}
        cells = [_known((found.get(group) or {}).get(kind), 100, 1) for group in GROUPS for kind in kinds]
        lines.append([each["method"], *(cells if each["runs"] else ["–"] * len(cells))])
    return [head, *lines]


def _in_group(group: str, each: Row) -> str:
    """Accuracy in a group, in per cent."""
    return _known(((each.get("groups") or {}).get(group) or {}).get("accuracy"), 100, 1)


def _group_sizes(rows: Sequence[Row]) -> str:
    """Number of questions in each group, "8 blank, 2 downsampled, 4 rest"; "" without groups."""
    known = next((each["groups"] for each in rows if each.get("groups")), None)
    return "" if known is None else ", ".join(f"{known[group]['questions']:g} {group}" for group in GROUPS)


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
    """One line per method, one column per budget: `text` of each mean, a dash without a result."""
    keeps = budgets_of(rows, visual)
    lines: dict[str, dict[int | str | None, str]] = {}
    for each in rows:
        lines.setdefault(each["method"], {})[each["keep"]] = text(each) if each["runs"] else "–"
    shown = [[method, *(texts.get(keep, texts.get(None, "")) for keep in keeps)] for method, texts in lines.items()]
    return [["method", *(str(keep) for keep in keeps)], *shown]


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
    for group in GROUPS if _group_sizes(averaged) else ():
        found[f"accuracy on {group} questions, %, {said}"] = budgets_table(averaged, partial(_in_group, group), visual)
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
        if sizes := _group_sizes(here):
            found[f"groups of questions at {keep or visual}: {sizes}; {caption(rows)}"] = groups_table(here)
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
    return "\n".join([*lines, *(f"- {literal(line)}" for line in remarks(rows))]).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return row([literal(cell) for cell in cells])
