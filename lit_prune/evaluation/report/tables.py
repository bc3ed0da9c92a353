"""All tables of a report: a line for each method and budget, a column for each budget, skills, groups of questions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lit_prune.evaluation.report.figures import Intervals, above_blank, groups, intervals_of, skills, summary
from lit_prune.evaluation.report.runs import Run
from lit_prune.evaluation.report.table import UNKNOWN, Column, Figure, Table, name, number, ranged
from lit_prune.evaluation.rows import budgets_of


def all_tables(runs: Sequence[Run], baseline: str, draws: int, seed: int) -> list[Table]:
    """The tables of a report; with several runs each but the first names its own."""
    found = [intervals_of(run, baseline, draws, seed) for run in runs]
    tables = [summary(runs, found, baseline)]
    of_runs = [[*by_budget(run, own, baseline), skills(run), groups(run)] for run, own in zip(runs, found, strict=True)]
    for run, own in zip(runs, of_runs, strict=True):
        named = [table for table in own if table is not None]
        tables += named if len(runs) == 1 else [replace(each, title=f"{each.title}: {run.name}") for each in named]
    return tables


def by_budget(run: Run, found: Intervals, baseline: str) -> list[Table]:
    """Accuracy and its shares with a line for each method and a column for each budget; none of fewer than two."""
    budgets = budgets_of(run.rows, run.visual)
    if len(budgets) < 2:
        return []

    def accuracy(place: int) -> Figure:
        strong = (difference := found.difference.get(place)) is not None and difference.excludes_zero
        return replace(ranged(found.accuracy.get(place)), strong=strong)

    def share(place: int) -> Figure:
        return number(above_blank(run, run.entries[place]), 100)

    tables = [
        _grid("Accuracy %", f"; bold: the paired difference to {baseline} has no 0", run, budgets, accuracy),
        _grid("Of the full model's accuracy, %", "", run, budgets, lambda place: ranged(found.retained.get(place))),
        _grid("Of full - blank, %", ": share of what the image adds", run, budgets, share),
    ]
    return [table for table in tables if any(cell.text != UNKNOWN for row in table.rows for cell in row[1:])]


def _grid(title: str, more: str, run: Run, budgets: Sequence[int | str], cell: Callable[[int], Figure]) -> Table:
    """A table of one figure; what has no budget, the full model, has the same at all."""
    places = {(entry.method, entry.budget): place for place, entry in enumerate(run.entries)}
    rows = []
    for method in dict.fromkeys(entry.method for entry in run.entries):
        own = [places.get((method, budget), places.get((method, None))) for budget in budgets]
        rows.append([name(method), *(Figure(UNKNOWN) if place is None else cell(place) for place in own)])
    meaning = f"{title} at {{}} visual tokens, averaged over the decoder layers{more}"
    columns = [Column("method"), *(Column(str(budget), meaning.format(budget)) for budget in budgets)]
    return Table(f"{title} by tokens kept", columns, rows, names=1)
