"""Print the metrics of `test` and `validate`, grouped and rounded."""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from statistics import fmean

from lightning import Callback, LightningModule, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lit_prune.evaluation.scorers import several

STAGES = {"validate": "val", "test": "test"}


class PrintResults(Callback):
    """Prints what `test` or `validate` found as one short table, in place of Lightning's line a figure.

    The official scores of benchmarks, of several in one run too, are a second one.

    Loggers get every figure with all its digits. `fit` has its own line for each validation.
    """

    def __init__(self) -> None:
        self.on = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print them on rank zero."""
        stage = STAGES.get(trainer.state.fn.value) if trainer.state.fn is not None else None
        if not self.on or stage is None or not trainer.is_global_zero:
            return
        figures = {name.removeprefix(f"{stage}/"): float(v) for name, v in trainer.callback_metrics.items()}
        figures.pop(f"{stage}_accuracy", None)  # the progress bar's
        scores = getattr(pl_module, "scores", [])
        for score in scores:
            figures = {name: value for name, value in figures.items() if name not in score.named}
        console = Console(highlight=False)
        if figures:
            console.print(as_table(trainer.state.fn.value, figures))
        if scores:
            console.print(several.as_table(scores))
        for score in scores:
            for remark in score.remarks:
                console.print(f"note: {score.label}: {remark}", markup=False)

    on_validation_end = on_test_end


def as_table(title: str, figures: Mapping[str, float]) -> Table:
    """The figures of one evaluation, by name without its stage."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in labelled(figures).items():
        table.add_row(label, text)
    return table


def labelled(figures: Mapping[str, float]) -> dict[str, str]:
    """The figures of one evaluation, by name without its stage, as the table shows them: text by label."""
    return dict(_lines(dict(figures)))


def _lines(figures: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Label and text of each group; what belongs to none comes last, by its name."""
    layers = {group: _layers(figures, group) for group in ("kept", "w2", "w2_relative", "w2_without_repair")}
    skills = {name.partition("/")[2]: figures.pop(name) for name in list(figures) if name.startswith("accuracy/")}
    if "all" in skills:
        yield "accuracy, %", f"{100 * skills.pop('all'):.1f}"
    if skills:
        yield "by skill", ", ".join(f"{skill} {100 * value:.1f}" for skill, value in skills.items())
    if "agreement" in figures:
        yield "as the full model, %", f"{100 * figures.pop('agreement'):.1f}"
    if "visual_tokens" in figures:
        yield "visual tokens a layer", f"{figures.pop('visual_tokens'):.1f}" + _runs(layers["kept"])
    for name, label, unit in (("flops", "decoder's prefill", "FLOP"), ("kv_bytes", "KV cache", "B")):
        if name in figures:
            yield label, f"{_scaled(figures.pop(name))}{unit}"
    for group, label, unit, digits in (
        ("w2", "shift W2", 1, 2),
        ("w2_without_repair", "W2 without repair", 1, 2),
        ("w2_relative", "W2 relative, %", 100, 1),
    ):
        if values := layers[group]:
            most = max(range(len(values)), key=values.__getitem__)
            mean, largest = (f"{unit * value:.{digits}f}" for value in (fmean(values), values[most]))
            yield label, f"{mean} on average, {largest} at most (after layer {most})"
    if "kappa" in figures:
        yield "kappa", f"{figures.pop('kappa'):.3f}"
    for name, value in sorted(figures.items()):
        yield name, str(float(f"{value:.4g}"))


def _layers(figures: dict[str, float], group: str) -> list[float]:
    """Take the figures of a group out, one a decoder layer, in order."""
    names = [name for name in figures if re.fullmatch(rf"{group}/layer_\d+", name)]
    names.sort(key=lambda name: int(name.rpartition("_")[2]))
    return [figures.pop(name) for name in names]


def _runs(values: list[float]) -> str:
    """` (144, 15 x4, 6 x4, 4 x7)`: layers in a row that see as many."""
    runs = [(text, len(list(same))) for text, same in groupby(f"{value:.4g}" for value in values)]
    shown = ", ".join(text if count == 1 else f"{text} x{count}" for text, count in runs)
    return f" ({shown})" if shown else ""


def _scaled(value: float) -> str:
    """Three digits and a prefix."""
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
    prefix, scale = next((p, s) for p, s in prefixes if value >= s or s == 1)
    return f"{value / scale:.3g} {prefix}"
