"""Plots of a comparison: nothing is mistaken for something else, nothing lies under something else."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lit_prune.evaluation import plots
from lit_prune.evaluation.labels import apart
from lit_prune.evaluation.styles import styles_of

KEEPS = (48, 16, 4)


def rows(methods: int, keeps: tuple[int, ...] = KEEPS, alike: bool = False) -> list[dict]:
    """The full model and some methods, half of them with one schedule; all equally good where `alike`."""
    common = {"split": "val", "status": "measured", "seed": None, "questions": 99, "kv_bytes": 1.0, "per_skill": {}}
    common |= {"note": "", "reason": "", "retained": 1.0, "flops_reduction": 0.5, "avg_visual_tokens": 1.0}
    found = [{**common, "method": "full", "keep": None, "accuracy": 1.0, "flops": 1e9, "kappa": 0.0, "w2": 0.0}]
    found[0]["tokens_per_layer"] = [144.0] * 16
    draw = np.random.default_rng(0)
    for number, keep in itertools.product(range(methods), keeps):
        worth = 0.5 if alike else draw.uniform(0.2, 1.0)
        counts = [float(keep)] * 16 if number % 2 else [144.0] + [keep / (1 + number % 3)] * 15
        measures = {"accuracy": worth, "flops": keep * 1e7, "kappa": 2 - worth, "w2": 200 * (1.1 - worth)}
        found.append({**common, "method": f"method {number}", "keep": keep, **measures, "tokens_per_layer": counts})
    return found


@pytest.mark.parametrize("count", [2, 20, 60])
def test_no_two_methods_share_a_colour_or_a_marker(count):
    styles = styles_of([f"m{i}" for i in range(count)]).values()
    assert len({style.colour for style in styles}) == len({style.marker for style in styles}) == count


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("keeps", [KEEPS, (16,)])
def test_every_plot_is_drawn(count, keeps, tmp_path):
    made = plots.draw(rows(count, keeps), 144)
    assert list(made) == ["accuracy_tokens", "accuracy_flops", "shift_accuracy", "tokens_per_layer"]
    for name, figure in made.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert "val split, 99 questions" in [text.get_text() for text in figure.texts]


def test_one_budget_gives_bars():
    made = plots.draw(rows(5, (16,)), 144)
    for name in ("accuracy_tokens", "accuracy_flops"):
        axes = made[name].axes[0]
        assert len(axes.patches) == 5
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == sorted(widths)
        assert [tick.get_text() for tick in axes.get_yticklabels()][-1].startswith("method")
    assert not plots.draw(rows(5), 144)["accuracy_tokens"].axes[0].patches


def names_in(figure: Figure) -> list:
    """Boxes of the methods' names, panel by panel."""
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    return [
        [text.get_window_extent(renderer) for text in axes.texts if text.get_text().startswith("method")]
        for axes in figure.axes
    ]


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("name", ["accuracy_tokens", "accuracy_flops", "shift_accuracy", "tokens_per_layer"])
@pytest.mark.parametrize("alike", [False, True])
def test_every_method_is_named_once_a_panel_and_no_name_hides_another(count, name, alike):
    figure = plots.draw(rows(count, alike=alike), 144)[name]
    for boxes in names_in(figure):
        assert len(boxes) == count
        for a, b in itertools.combinations(boxes, 2):
            overlap = (min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))
            assert min(overlap) < 3, "pixels; a line of text is 16 high"


def test_equal_lines_do_not_hide_one_another():
    """Equally good methods stand beside one another; equal schedules share a line in turn."""
    figure = plots.draw(rows(6, alike=True), 144)["accuracy_tokens"]
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "_", "|", None)]
    starts = [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 3]
    assert len(starts) == len(set(starts)) == 6
    panel = plots.draw(rows(6, alike=True), 144)["tokens_per_layer"].axes[0]
    steps = [line for line in panel.lines if line.get_drawstyle() == "steps-mid"]
    assert len(steps) == 6
    drawn = [(tuple(np.round(line.get_ydata(), 6)), line._unscaled_dash_pattern) for line in steps]
    assert len(set(map(str, drawn))) == 6
    marks = [line for line in panel.lines if line.get_linestyle() == "None"]
    places = [(x, round(y, 6)) for line in marks for x, y in zip(*line.get_data(), strict=True)]
    assert len(places) == len(set(places)), "no marker on another"


def test_what_has_no_price_has_no_plot_of_it():
    unpriced = [{**row, "flops": None} for row in rows(3)]
    assert "accuracy_flops" not in plots.draw(unpriced, 144)


def test_budgets_that_are_shares():
    """For models whose images differ; in order of what they leave of a usual image."""
    shares = [{**row, "keep": row["keep"] and {48: "33.3%", 16: "11.1%", 4: "2.8%"}[row["keep"]]} for row in rows(3)]
    made = plots.draw(shares, 144)
    assert [tick.get_text() for tick in made["accuracy_tokens"].axes[0].get_xticklabels()] == ["33.3%", "11.1%", "2.8%"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.floats(-0.5, 1.5), max_size=30), st.floats(0.001, 0.2))
def test_names_keep_their_distance_and_order(wanted, gap):
    places = apart(wanted, gap, 0.0, 1.0)
    if len(wanted) > 1:
        gap = min(gap, 1 / (len(wanted) - 1))
    ordered = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in itertools.pairwise(ordered):
        assert places[b] - places[a] >= gap - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    far = len(wanted) > 1 and any(b - a < gap for a, b in itertools.pairwise(sorted(wanted)))
    if wanted and not far and min(wanted) >= 0 and max(wanted) <= 1:
        assert places == pytest.approx(wanted)
