"""The tables of a report as Weights & Biases takes them."""

from collections.abc import Sequence
from typing import Any

from lit_prune.evaluation.report.table import Table


def as_wandb(tables: Sequence[Table]) -> dict[str, Any]:
    """`report/TITLE` for each table: numbers in the units of the page, the ends of each interval beside its figure."""
    import wandb

    return {f"report/{table.title.replace('/', 'or')}": wandb.Table(*_typed(table)) for table in tables}


def _typed(table: Table) -> tuple[list[str], list[list[Any]]]:
    """W&B wants one type a column: budgets, which may be counts or shares, are text."""
    titles, lines = table.flat()
    return titles, [[str(value) if i < table.names else value for i, value in enumerate(line)] for line in lines]
