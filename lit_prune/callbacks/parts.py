"""Table of a model's parts and their parameters, on request."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from rich import get_console
from rich.table import Table


class Parts(ModelSummary):
    """A table of the module's parts: class, parameters, and whether they are in training mode.

    Lightning's own has a column of FLOPs, which are 0 here: what a step costs depends on what is pruned, and is logged
    (`lit_prune.cost.step`).
    """

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *args: Any, **kwargs: Any) -> None:
        """Print the table."""
        columns = {name: values for name, values in summary_data if name.strip() and name != "FLOPs"}
        table = Table(*columns)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        get_console().print(table)
