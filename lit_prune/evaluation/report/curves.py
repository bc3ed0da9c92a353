"""Curves of a training run."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_prune.evaluation.styles import COLOURS, Page

SIZE = (3.6, 2.2)  # inches of a panel


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """One panel for each curve of (step, value), in the order of their names, with the total loss first."""
    names = sorted(curves, key=lambda name: (name != "loss/total", name))
    page = Page(len(names), size=SIZE, columns=2, left=0.72, right=0.3)
    for axes, name, colour in zip(page.axes, names, COLOURS, strict=False):
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, color=colour, marker="." if len(steps) < 40 else "", linewidth=1.2)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    return page.figure
