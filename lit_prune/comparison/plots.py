"""Plots of a comparison: pure functions from its rows (`lit_prune.comparison.tables`) to figures."""

from collections.abc import Sequence
from itertools import cycle

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from lit_prune.comparison.tables import Row, means, ranks_agree

DPI = 160
MARKERS = "osD^vP*X<>"
GREY = "#7a828b"


def figures(rows: Sequence[Row], visual: int) -> dict[str, Figure]:
    """All plots by file name, those that have something to show; `visual` is the teacher's number of visual tokens."""
    averaged = [each for each in means(rows) if each["runs"]]
    pruned = [each for each in averaged if each["keep"] is not None]
    if not pruned:
        return {}
    full = next((each for each in averaged if each["keep"] is None), None)
    return {
        "accuracy_tokens": _accuracy(pruned, full, "avg_visual_tokens", f"visual tokens a layer (of {visual})"),
        "accuracy_flops": _accuracy(pruned, full, "flops", "FLOPs of the decoder's prefill with all that pruning adds"),
        "shift_accuracy": shift_accuracy(rows),
        "tokens_per_layer": tokens_per_layer(pruned),
    }


def _accuracy(pruned: Sequence[Row], full: Row | None, name: str, label: str) -> Figure:
    """Accuracy against a cost on a logarithmic axis: a line a method, bars of one standard deviation over its seeds."""
    figure, (axes,) = _page(1, 5.6, 4.2)
    for method, style in _styles(pruned).items():
        points = sorted((each for each in pruned if each["method"] == method), key=lambda each: each[name])
        axes.errorbar(
            [each[name] for each in points],
            [100 * each["accuracy"] for each in points],
            [100 * each["accuracy_std"] for each in points],
            label=method,
            capsize=2,
            **style,
        )
    if full is not None:
        axes.axhline(100 * full["accuracy"], color=GREY, linestyle="--", linewidth=1, label=full["method"])
    _logarithmic(axes, sorted({float(each["keep"]) for each in pruned}) if name == "avg_visual_tokens" else None)
    axes.set(xlabel=label, ylabel="accuracy, %")
    _legend(figure, axes)
    return figure


def shift_accuracy(rows: Sequence[Row]) -> Figure:
    """Accuracy against W2 and against kappa, coloured by budget, with Spearman's rank correlations in the titles."""
    pruned = [each for each in means(rows) if each["runs"] and each["keep"] is not None]
    styles = _styles(pruned)
    keeps = sorted({each["keep"] for each in pruned})
    colours = {keep: colormaps["plasma"](0.85 * i / max(1, len(keeps) - 1)) for i, keep in enumerate(keeps)}
    figure, panels = _page(2, 4.2, 4.2)
    for axes, name, label in zip(panels, ("w2", "kappa"), ("W2 of the answer states", "kappa"), strict=True):
        for each in pruned:
            marker = styles[each["method"]]["marker"]
            axes.plot(each[name], 100 * each["accuracy"], marker, color=colours[each["keep"]], markersize=5)
        if all(each[name] > 0 for each in pruned):
            axes.set_xscale("log")
        everywhere, inside = ranks_agree(rows, name)
        axes.set_title(f"rank correlation {everywhere:+.2f}, within a budget {inside:+.2f}", size=8, color=GREY)
        axes.set(xlabel=label, ylabel="accuracy, %")
    for keep in keeps:
        panels[-1].plot([], [], "s", color=colours[keep], label=f"{keep} tokens")
    for method, style in styles.items():
        panels[-1].plot([], [], style["marker"], color=GREY, label=method)
    _legend(figure, panels[-1])
    return figure


def tokens_per_layer(pruned: Sequence[Row]) -> Figure:
    """Visual tokens at the input of every decoder layer: a panel a budget, a line a method."""
    styles = {method: {**style, "marker": None} for method, style in _styles(pruned).items()}
    for style, dashes in zip(styles.values(), cycle(("-", "--", ":", "-."))):
        style["linestyle"] = dashes  # lines that lie on one another show
    keeps = sorted({each["keep"] for each in pruned}, reverse=True)
    figure, panels = _page(len(keeps), 2.6, 3.2)
    for axes, keep in zip(panels, keeps, strict=True):
        for each in pruned:
            if each["keep"] == keep:
                counts = each["tokens_per_layer"]
                axes.step(range(len(counts)), counts, where="mid", **styles[each["method"]])
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.7, 1.4 * max(max(each["tokens_per_layer"]) for each in pruned))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{keep} on average", size=8, color=GREY)
        axes.set(xlabel="decoder layer", ylabel="visual tokens" if axes is panels[0] else "")
    for method, style in styles.items():
        panels[-1].plot([], [], label=method, **style)
    _legend(figure, panels[-1])
    return figure


def _page(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A row of panels, each of this size in inches."""
    figure = Figure(figsize=(width * panels + 2.4, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _styles(rows: Sequence[Row]) -> dict[str, dict]:
    """A colour and marker per method, in order of appearance."""
    colours = cycle([*colormaps["tab10"].colors, *colormaps["Dark2"].colors])
    methods = dict.fromkeys(each["method"] for each in rows)
    pairs = zip(methods, colours, cycle(MARKERS), strict=False)
    return {m: {"color": c, "marker": k, "markersize": 4, "linewidth": 1.2} for m, c, k in pairs}


def _logarithmic(axes: Axes, ticks: list[float] | None) -> None:
    """A logarithmic x axis with these ticks, or with some in units such as M and G."""
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
