"""Plots of a comparison: pure functions from its rows (`lit_prune.evaluation.rows`) to figures.

Each method has a colour and a marker of its own, the same in all plots, and its name stands beside what it names.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from lit_prune.evaluation.labels import SIZE, Name, name_points
from lit_prune.evaluation.rows import Row, budgets_of, caption, means, ranks_agree, size_of
from lit_prune.evaluation.styles import GREY, Page, Style, room, styles_of

DODGE = 0.02, 0.24  # octaves between two methods at a budget, and between the first and the last at most


def draw(rows: Sequence[Row], visual: int) -> dict[str, Figure]:
    """All plots by file name, those that have something to show; `visual` is the teacher's number of visual tokens."""
    averaged = [each for each in means(rows) if each["runs"]]
    pruned = [each for each in averaged if each["keep"] is not None]
    if not pruned:
        return {}
    full = next((each for each in averaged if each["keep"] is None), None)
    made = {"accuracy_tokens": accuracy_tokens(pruned, full, visual)}
    if all(each["flops"] is not None for each in pruned):
        made["accuracy_flops"] = accuracy_flops(pruned, full, visual)
    made |= {"shift_accuracy": shift_accuracy(rows, visual), "tokens_per_layer": tokens_per_layer(pruned, visual)}
    for figure in made.values():
        width, height = figure.get_size_inches()
        figure.text(1 - 0.08 / width, 0.06 / height, caption(rows), size=6.5, color=GREY, ha="right")
    return made


# Accuracy


def accuracy_tokens(pruned: Sequence[Row], full: Row | None, visual: int) -> Figure:
    """Accuracy by budget: a line a method, beside one another at each budget; bars where there is one budget."""
    keeps = budgets_of(pruned, visual)
    if len(keeps) == 1:
        return _bars(pruned, full, [("accuracy", 100, f"accuracy, % ({keeps[0]} of {visual} visual tokens)")])
    styles = styles_of([each["method"] for each in pruned])
    page, names, drawn = Page(1, right=room(styles)), [], []
    axes, spread = page.axes[0], min(DODGE[0] * (len(styles) - 1), DODGE[1])
    for place, (method, style) in enumerate(styles.items()):
        mine = sorted((each for each in pruned if each["method"] == method), key=lambda e: size_of(e["keep"], visual))
        aside = 2 ** (spread * (place / max(1, len(styles) - 1) - 0.5))
        x, y = [size_of(each["keep"], visual) * aside for each in mine], [100 * each["accuracy"] for each in mine]
        _line(axes, x, y, [100 * each["accuracy_std"] for each in mine], style)
        names.append(Name(x[-1], y[-1], method, style.colour))
        drawn.append(list(zip(x, y, strict=True)))
    axes.set_xscale("log", base=2)
    axes.set_xticks([size_of(keep, visual) for keep in keeps], [str(keep) for keep in keeps])
    axes.minorticks_off()
    axes.set(xlabel=f"visual tokens a layer (of {visual})", ylabel="accuracy, %")
    _full(axes, full, names)
    page.name(axes, names, drawn)
    return page.figure


def accuracy_flops(pruned: Sequence[Row], full: Row | None, visual: int) -> Figure:
    """Accuracy against FLOPs, a line a method; bars of both where there is one budget."""
    keeps, label = budgets_of(pruned, visual), "MFLOP of the decoder's prefill with all that pruning adds"
    if len(keeps) == 1:
        first = f"accuracy, % ({keeps[0]} of {visual} visual tokens)"
        return _bars(pruned, full, [("accuracy", 100, first), ("flops", 1e-6, label)])
    styles = styles_of([each["method"] for each in pruned])
    page, names, drawn = Page(1, right=room(styles)), [], []
    axes = page.axes[0]
    for method, style in styles.items():
        mine = sorted((each for each in pruned if each["method"] == method), key=lambda each: each["flops"])
        x, y = [each["flops"] for each in mine], [100 * each["accuracy"] for each in mine]
        _line(axes, x, y, [100 * each["accuracy_std"] for each in mine], style)
        names.append(Name(x[-1], y[-1], method, style.colour))
        drawn.append(list(zip(x, y, strict=True)))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label.replace("MFLOP", "FLOPs"), ylabel="accuracy, %")
    _full(axes, full, names)
    page.name(axes, names, drawn)
    return page.figure


def _bars(pruned: Sequence[Row], full: Row | None, columns: Sequence[tuple[str, float, str]]) -> Figure:
    """A bar a method, the most accurate on top; a panel for each of `columns` (name, scale, label)."""
    order = sorted(pruned, key=lambda each: each["accuracy"])
    styles = styles_of([each["method"] for each in pruned])
    side = max(len(each["method"]) for each in pruned) * SIZE * 0.6 / 72 + 0.2
    page = Page(len(columns), size=(3.6, max(1.2, 0.22 * len(order))), left=side, right=0.55)
    for axes, (name, scale, label) in zip(page.axes, columns, strict=True):
        values = [scale * each[name] for each in order]
        spread = [scale * each["accuracy_std"] if name == "accuracy" else 0.0 for each in order]
        colours = [styles[each["method"]].colour for each in order]
        axes.barh(range(len(order)), values, xerr=spread, color=colours, height=0.68, error_kw={"elinewidth": 0.8})
        axes.set_yticks(range(len(order)), [each["method"] for each in order], size=SIZE)
        for place, (value, more) in enumerate(zip(values, spread, strict=True)):
            axes.text(
                value + more, place, f" {value:.1f}" if name == "accuracy" else f" {value:.3g}", size=SIZE, va="center"
            )
        if full is not None and full[name] is not None:
            axes.axvline(scale * full[name], color=GREY, linestyle="--", linewidth=1, zorder=0)
            axes.set_title(f"dashed: {full['method']} {scale * full[name]:.4g}", size=7, color=GREY)
        axes.set(xlabel=label, xlim=(0, 1.12 * max([*values, scale * full[name] if full else 0])))
        axes.grid(alpha=0.25, axis="x")
    return page.figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], spread: Sequence[float], style: Style) -> None:
    axes.errorbar(
        x,
        y,
        spread,
        **style.marks(5),
        linestyle=style.dashes,
        linewidth=1.0,
        elinewidth=0.7,
        capsize=1.5,
        alpha=0.9,
    )


def _full(axes: Axes, full: Row | None, names: list[Name]) -> None:
    """A line for the full model, with its name."""
    if full is not None:
        axes.axhline(100 * full["accuracy"], color=GREY, linestyle="--", linewidth=1)
        names.append(Name(axes.get_xlim()[1], 100 * full["accuracy"], full["method"], GREY))


# Shift


def shift_accuracy(rows: Sequence[Row], visual: int) -> Figure:
    """Accuracy against W2 and against kappa, which fall to the right, with Spearman's rank correlations in the titles.

    A line joins the budgets of a method; the larger the marker, the more tokens.
    """
    pruned = [each for each in means(rows) if each["runs"] and each["keep"] is not None]
    styles, keeps = styles_of([each["method"] for each in pruned]), budgets_of(pruned, visual)
    sizes = {keep: 7.5 - 4.5 * i / max(1, len(keeps) - 1) for i, keep in enumerate(keeps)}
    page = Page(2, size=(5.2, 4.6), right=0.2)
    for axes, name, label in zip(page.axes, ("w2", "kappa"), ("W2 of the answer states", "kappa"), strict=True):
        names, drawn = [], []
        for method, style in styles.items():
            mine = [each for each in pruned if each["method"] == method]
            mine.sort(key=lambda each: size_of(each["keep"], visual))
            x, y = [each[name] for each in mine], [100 * each["accuracy"] for each in mine]
            axes.plot(x, y, color=style.colour, linewidth=0.5, linestyle=style.dashes, alpha=0.6)
            for each, *point in zip(mine, x, y, strict=True):
                axes.plot(*point, **style.marks(sizes[each["keep"]]), linestyle="none", alpha=0.9)
            names.append(Name(x[-1], y[-1], method, style.colour))
            drawn.append(list(zip(x, y, strict=True)))
        if all(each[name] > 0 for each in pruned):
            axes.set_xscale("log")
        axes.invert_xaxis()
        everywhere, inside = ranks_agree(rows, name)
        within = "" if len(keeps) == 1 else f", within a budget {inside:+.2f}"
        if everywhere == everywhere:
            axes.set_title(f"rank correlation {everywhere:+.2f}{within}", size=8, color=GREY)
        axes.set(xlabel=f"{label} (lower is better, to the right)", ylabel="accuracy, %")
        axes.grid(alpha=0.25)
        axes.margins(0.12)
        name_points(axes, names, drawn)
    for keep in keeps if len(keeps) > 1 else ():
        page.axes[0].plot([], [], "o", color=GREY, markersize=sizes[keep], label=str(keep))
    if len(keeps) > 1:
        page.axes[0].legend(title="tokens", fontsize=6.5, title_fontsize=6.5, loc="lower right", frameon=False)
    return page.figure


# Tokens


def tokens_per_layer(pruned: Sequence[Row], visual: int) -> Figure:
    """Visual tokens at the input of every decoder layer, a panel a budget.

    Methods with the same counts share a line: it takes their colours in turn and bears all their markers. Other lines
    that meet are moved aside a little.
    """
    styles, keeps = styles_of([each["method"] for each in pruned]), budgets_of(pruned, visual)
    page = Page(len(keeps), size=(3.4, 3.4), right=room(styles))
    for axes, keep in zip(page.axes, keeps, strict=True):
        groups: dict[tuple, list[str]] = {}
        for each in pruned:
            if each["keep"] == keep:
                groups.setdefault(tuple(round(count, 2) for count in each["tokens_per_layer"]), []).append(
                    each["method"]
                )
        names, place = [], 0
        for number, (counts, methods) in enumerate(groups.items()):
            aside = 2 ** (0.07 * (number - (len(groups) - 1) / 2))
            y = [max(count, 0.5) * aside for count in counts]
            for turn, method in enumerate(methods):
                _in_turn(axes, y, styles[method], turn, len(methods), place)
                names.append(Name(len(y) - 1, y[-1], method, styles[method].colour))
                place += 1
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.6 * max(1, min(min(counts) for counts in groups)), 1.5 * max(max(counts) for counts in groups))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{keep} on average", size=8, color=GREY)
        axes.set(xlabel="decoder layer", ylabel="visual tokens")
        axes.grid(alpha=0.25)
        page.name(axes, names)
    return page.figure


def _in_turn(axes: Axes, y: Sequence[float], style: Style, turn: int, takers: int, place: int) -> None:
    """One of `takers` methods on the same line: every so many points of it, and markers at layers of its own."""
    length = 7.0 if takers > 1 else 1.0
    dashes = (turn * length, (length, (takers - 1) * length)) if takers > 1 else (0, ())
    axes.step(range(len(y)), y, where="mid", color=style.colour, linewidth=1.6, linestyle=dashes)
    step = min(max(takers, 4), len(y))
    layers = range((turn if takers > 1 else place) % step, len(y), step)
    axes.plot(layers, [y[i] for i in layers], **style.marks(5), linestyle="none")


def shift_per_layer(pruned: Sequence[Row], visual: int) -> Figure:
    """W2 of the answer states behind every decoder layer, a panel a budget, a line a method."""
    styles, keeps = styles_of([each["method"] for each in pruned]), budgets_of(pruned, visual)
    page = Page(len(keeps), size=(3.4, 3.4), right=room(styles))
    for axes, keep in zip(page.axes, keeps, strict=True):
        names, drawn = [], []
        for each in pruned:
            if each["keep"] == keep:
                y, style = each["w2_per_layer"], styles[each["method"]]
                axes.plot(range(len(y)), y, color=style.colour, linestyle=style.dashes, linewidth=1.2)
                names.append(Name(len(y) - 1, y[-1], each["method"], style.colour))
                drawn.append(list(enumerate(y)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{keep} on average", size=8, color=GREY)
        axes.set(xlabel="decoder layer", ylabel="W2 of the answer states")
        axes.grid(alpha=0.25)
        page.name(axes, names, drawn)
    return page.figure
