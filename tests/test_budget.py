"""Schedules whose average is the budget, and the errors of those that can't be."""

import math
import time
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import yaml
from hypothesis import given as property_of
from hypothesis import settings
from hypothesis import strategies as st
from tiny import PRUNERS

from lit_prune.errors import LitPruneError
from lit_prune.files.yaml_files import pairs_as_text
from lit_prune.ops.budget import (
    Share,
    as_json,
    asked,
    average,
    check_layers,
    format_budget,
    format_schedule,
    given,
    parse_budget,
    resolve,
    scale_layers,
    solve,
    spans,
)
from lit_prune.ops.budget.schedule import _ideal
from lit_prune.vlm import as_plugin

MANY = settings(max_examples=1000, deadline=None)


@pytest.mark.parametrize(("keep", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_on_llava(keep, kept):
    """What its 192, 128 and 64 tokens on average mean: counts after layer 2 of 32."""
    schedule = solve(keep, 576, 32, (2,), (1.0,))
    assert schedule == {2: kept}
    assert average(schedule, 576, 32) == pytest.approx(keep, abs=0.5), "30 layers can't spend every budget exactly"


@pytest.mark.parametrize("keep", [*range(11, 143), 144])
def test_micro_schedules_spend_the_budget_exactly(keep):
    schedule = solve(keep, 144, 16, (1, 5, 10), (15.0, 8.0, 2.0))
    assert average(schedule, 144, 16) == keep
    assert all(a >= b for a, b in pairwise([144, *schedule.values()]))
    assert min(schedule.values()) >= 1


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (1, 2), (1, 3), (0, 2, 3), (1, 2, 4)])
@pytest.mark.parametrize("keep", range(1, 9))
def test_no_schedule_of_whole_tokens_comes_closer(layers, keep):
    visual, depth = 8, 5
    falling = [c for c in product(range(1, visual + 1), repeat=len(layers)) if all(a >= b for a, b in pairwise(c))]
    found = [average(dict(zip(layers, counts, strict=True)), visual, depth) for counts in falling]
    if min(found) > keep:
        with pytest.raises(LitPruneError, match=f"keep={keep} can't be reached"):
            solve(keep, visual, depth, layers, (1.0,) * len(layers))
    else:
        solved = average(solve(keep, visual, depth, layers, (1.0,) * len(layers)), visual, depth)
        assert abs(solved - keep) == min(abs(value - keep) for value in found)


def test_counts_follow_the_ratios():
    first, second, third = solve(64, 576, 32, (1, 13, 25), (16.7, 4.6, 1.4)).values()
    assert first / second == pytest.approx(16.7 / 4.6, rel=0.1)
    assert second / third == pytest.approx(4.6 / 1.4, rel=0.1)


def test_average_counts_every_layer_once():
    assert average({}, 10, 4) == 10
    assert average({0: 3}, 10, 4) == 3
    assert average({1: 6, 3: 2}, 10, 4) == (10 + 6 + 6 + 2) / 4
    assert average({1: 4, 3: 8}, 10, 4) == (10 + 4 + 4 + 4) / 4, "a token pruned once never returns"


def test_keeping_all_is_no_pruning():
    assert solve(144, 144, 16, (1, 8), (3.0, 1.0)) == {1: 144, 8: 144}


@pytest.mark.parametrize("keep", [0, -3, 577])
def test_budget_outside_the_image(keep):
    with pytest.raises(LitPruneError, match=rf"keep={keep} must lie between 1 and the image's 576"):
        solve(keep, 576, 32, (2,), (1.0,))


def test_budget_that_the_first_layers_use_up():
    with pytest.raises(LitPruneError, match=r"keep=64 can't be reached: the 2 decoder layers.*all 576.*at least 96.8"):
        solve(64, 576, 12, (2,), (1.0,))


@pytest.mark.parametrize("layers", [(), (3, 2), (2, 2)])
def test_layers_that_do_not_ascend(layers):
    with pytest.raises(LitPruneError, match="must ascend"):
        check_layers(layers, 8)


@pytest.mark.parametrize("layers", [(8,), (2, 31), (-1, 3)])
def test_layers_outside_the_model(layers):
    with pytest.raises(LitPruneError, match=r"outside the model: its decoder has 8 layers, 0 to 7"):
        check_layers(layers, 8)


def test_ratios_of_another_length():
    with pytest.raises(LitPruneError, match="stage_ratios"):
        solve(8, 36, 8, (1, 3), (1.0,))


def test_layers_move_with_the_depth():
    assert scale_layers((1, 13, 25), 32, 32) == (1, 13, 25)
    assert scale_layers((1, 13, 25), None, 16) == (1, 13, 25)
    assert scale_layers((1, 8), 16, 32) == (2, 16)
    assert scale_layers((1, 13, 25), 32, 16) == (1, 6, 12), "layer 1 never becomes 0: its attention may be read"
    assert scale_layers((0,), 16, 40) == (0,)


def test_given_counts_stand():
    assert given({2: 192, 4: 64}, (2, 4)) == {2: 192, 4: 64}


@pytest.mark.parametrize(
    ("schedule", "layers", "message"),
    [
        ({2: 64}, (1, 8), r"stages are before layers \[1, 8\]"),
        ({4: 64, 2: 192}, (2, 4), "in order"),
        ({2: 64, 4: 65}, (2, 4), "never rise"),
        ({2: 0}, (2,), "at least 1"),
    ],
)
def test_given_counts_that_do_not_fit(schedule, layers, message):
    with pytest.raises(LitPruneError, match=message):
        given(schedule, layers)


@pytest.mark.parametrize(
    ("text", "budget"), [("64", 64), ("2:64", {2: 64}), ("2:192,4:64,8:16", {2: 192, 4: 64, 8: 16})]
)
def test_budget_as_written(text, budget):
    assert parse_budget(text) == budget
    assert isinstance(budget, int) or format_schedule(budget) == text


@pytest.mark.parametrize("text", ["", "many", "2:", "2:64,", "2:64:3", "2-64"])
def test_budget_that_is_none(text):
    with pytest.raises(LitPruneError, match="counts by layer"):
        parse_budget(text)


# -- one grammar ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (16, 16), (16.0, 16), (np.int64(16), 16), ("16", 16), (" 16 ", 16), ("11.1%", Share(11.1)),
        ("11.1 %", Share(11.1)), ("100%", Share(100.0)), (".5%", Share(0.5)), ("2:192, 4:64", {2: 192, 4: 64}),
        ({2: 64}, {2: 64}), ({"2": 64}, {2: 64}), ({"2": "192", 4: 64.0}, {2: 192, 4: 64}), (1e9, 10**9),
        (Share(5.0), Share(5.0)),
    ],
)  # fmt: skip
def test_what_is_unambiguous_is_read(value, budget):
    found = parse_budget(value)
    assert found == budget
    assert type(found) is type(budget)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -3, 0.111, math.nan, math.inf, 2.5, 10**12, "abc", "0", "-3", "0%", "200%", "-5%", "%",
        "nan", "1e9", "1_6", "0x10", "16 tokens", "11,1%", "\u0661\u0666", "9" * 400, [16], [], (16,), {}, {2: 0},
        {-1: 64}, {"a": 64}, {2: True}, {2: None}, {2: [64]}, {2.5: 64}, "2:64,2:32", {2: 64, "2": 32}, Share(0.0),
        Share(math.nan), pytest.param(object(), id="an object"), b"16",
    ],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_refused_in_one_line_that_names_the_key(value):
    with pytest.raises(LitPruneError) as refused:
        parse_budget(value, "--keep")
    told = str(refused.value)
    assert told.startswith(("--keep ", "--keep="))
    assert "16" in told
    assert "11.1%" in told
    assert "2:192,4:64" in told
    assert "\n" not in told
    assert len(told) < 250


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.fractions()
TYPED = st.text("0123456789:,.% -+e{}[]", max_size=12)
ANYTHING = st.recursive(
    SCALARS | TYPED, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS | TYPED, inner, max_size=3)
)
BUDGETS = (
    st.integers(1, 10**9)
    | st.floats(1e-6, 100).map(lambda percent: Share(float(f"{percent:.12g}")))
    | st.dictionaries(st.integers(0, 99), st.integers(1, 9999), min_size=1, max_size=6)
)


@MANY
@property_of(ANYTHING)
def test_whatever_is_given_is_a_budget_or_one_line(value):
    try:
        budget, told = parse_budget(value, "model.keep"), None
    except LitPruneError as error:
        budget, told = None, str(error)
    if budget is None:
        assert told.startswith(("model.keep ", "model.keep="))
        assert "\n" not in told
        assert not (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**12), "a count is read"
    else:
        assert not isinstance(value, bool | list | bytes | None)
        counts = (
            [budget]
            if isinstance(budget, int)
            else [budget.percent]
            if isinstance(budget, Share)
            else [*budget.values()]
        )
        assert min(counts) > 0
        assert parse_budget(format_budget(budget)) == budget


@MANY
@property_of(BUDGETS)
def test_a_budget_comes_back_from_text_json_and_yaml(budget):
    """Also where YAML would read a pair such as 2:30 as a number to the base of 60."""
    assert parse_budget(format_budget(budget)) == budget
    assert parse_budget(as_json(budget)) == budget
    for written in (f"keep: {format_budget(budget)}", f"model: {{a: 1, keep: {format_budget(budget)!r}}} # 2:30"):
        loaded = yaml.safe_load(pairs_as_text(written))
        assert parse_budget((loaded.get("model") or loaded)["keep"]) == budget


def test_yaml_stays_what_it_is_but_for_pairs():
    text = "a: 2:30  # 2:30\nb: '2:30'\nc: [12:05, x]\nd: |\n  at 2:30\ne: http://x:80\n"
    assert yaml.safe_load(pairs_as_text(text)) == {
        "a": "2:30", "b": "2:30", "c": ["12:05", "x"], "d": "at 2:30\n", "e": "http://x:80",
    }  # fmt: skip
    assert pairs_as_text("a: [2:30\nb") == "a: [2:30\nb", "what is no YAML is for its reader to refuse"


def test_shares_are_of_the_models_tokens_or_of_each_samples():
    assert [resolve(parse_budget(share), 144) for share in ("33.3%", "22.2%", "11.1%", "5.6%", "2.8%")] == [
        48, 32, 16, 8, 4,
    ]  # fmt: skip
    assert [asked(Share(11.1), visual, 32) for visual in (3, 144, 2880)] == [1, 16, 320]
    assert resolve(16, 144) == 16
    with pytest.raises(LitPruneError, match=r"--keep 0.1%: 0 visual tokens; .* 1 and the model's 144"):
        resolve(Share(0.1), 144, "--keep")


def test_what_is_asked_of_a_sample():
    assert asked(16, 9, 8) == 9
    assert asked({2: 6, 4: 3}, 9, 8) == average({2: 6, 4: 3}, 9, 8)
    assert asked({2: 6, 4: 3}, 4, 8) == average({2: 4, 4: 3}, 4, 8), "a sample with fewer keeps all of them"


# -- every combination, and many stages -----------------------------------------------------------------------------
def enumerated(keep: int, visual: int, depth: int, layers: tuple[int, ...], ratios: tuple[float, ...]) -> dict | None:
    """The schedule by trying every combination of counts around the real-valued solution; None if there is none."""
    ruled, room = spans(layers, depth), keep * depth - visual * layers[0]
    ideal, best, best_key = _ideal(room, ruled, ratios, visual), None, None
    reach = 3 if len(layers) <= 4 else 1
    for counts in product(*(range(max(1, int(k) - reach), min(visual, int(k) + reach + 1) + 1) for k in ideal)):
        spent = sum(n * k for n, k in zip(ruled, counts, strict=True))
        key = (-abs(spent - room), -spent)
        if (best_key is not None and key < best_key[:2]) or any(a < b for a, b in pairwise(counts)):
            continue
        key = (*key, -sum(((k - i) / i) ** 2 for k, i in zip(counts, ideal, strict=True)))
        if best_key is None or key > best_key:
            best, best_key = counts, key
    return None if best is None else dict(zip(layers, best, strict=True))


@st.composite
def problems(draw, most: int, deep: int = 32, wide: int = 600, fewest: int = 1):
    """A budget within reach of some stages: (keep, visual, depth, layers, ratios)."""
    depth = draw(st.integers(fewest, deep))
    layers = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=fewest, max_size=min(most, depth))))
    visual = draw(st.integers(2, wide))
    parts = st.sampled_from([1.0, 2.0, 3.0, 0.5]) | st.floats(0.05, 20)
    ratios = sorted(draw(st.lists(parts, min_size=len(layers), max_size=len(layers))), reverse=True)
    lowest = -(-(visual * layers[0] + depth - layers[0]) // depth)
    return draw(st.integers(lowest, visual)), visual, depth, tuple(layers), tuple(ratios)


@MANY
@property_of(problems(most=3))
def test_few_stages_get_what_trying_every_combination_finds(problem):
    """The very counts, of equally good ones too."""
    keep, visual, *_ = problem
    if keep < visual:
        assert solve(*problem) == enumerated(*problem)


@pytest.mark.parametrize("path", PRUNERS, ids=lambda path: path.stem)
def test_shipped_schedules_are_those_of_every_combination(path):
    pruner = as_plugin(path).pruner
    parts = [part for part in (pruner, *vars(pruner).get("_modules", {}).values()) if hasattr(part, "stage_ratios")]
    for part in parts:
        for depth in (16, 28, 32, 40):
            layers = scale_layers(tuple(part.layers), part.depth, depth)
            if len(layers) != len(part.stage_ratios):
                continue
            for visual in (144, 576, 729):
                lowest = -(-(visual * layers[0] + depth - layers[0]) // depth)
                for keep in range(lowest, visual, 1 + visual // 12):
                    problem = (keep, visual, depth, layers, tuple(part.stage_ratios))
                    assert solve(*problem) == enumerated(*problem)


def reachable(visual: int, ruled: list[int]) -> set[int]:
    """All sums of whole falling counts times their spans, by trying everything."""
    sums = {visual: {0}}  # by the last count
    for n in ruled:
        found: dict[int, set[int]] = {}
        for before, totals in sums.items():
            for count in range(1, before + 1):
                found.setdefault(count, set()).update(total + n * count for total in totals)
        sums = found
    return set().union(*sums.values())


@MANY
@property_of(problems(most=7, deep=16, wide=9, fewest=5))
def test_no_schedule_of_many_stages_comes_closer(problem):
    keep, visual, depth, layers, _ = problem
    schedule = solve(*problem)
    counts, ruled = list(schedule.values()), spans(layers, depth)
    assert all(a >= b for a, b in pairwise([visual, *counts]))
    assert counts[-1] >= 1
    spent, room = sum(n * k for n, k in zip(ruled, counts, strict=True)), keep * depth - visual * layers[0]
    assert (abs(spent - room), spent) == min((abs(total - room), total) for total in reachable(visual, ruled))


@MANY
@property_of(problems(most=80, deep=80, wide=3000))
def test_many_stages_take_milliseconds(problem):
    """And spend the budget exactly where a stage rules one layer, or a step of counts is one token layer."""
    keep, visual, depth, layers, _ = problem
    solve.cache_clear()
    start = time.process_time()
    schedule = solve(*problem)
    assert time.process_time() - start < 5  # milliseconds on an idle core; a product of ranges takes 22 s and more
    assert all(a >= b for a, b in pairwise([visual, *schedule.values()]))
    assert min(schedule.values()) >= 1
    if len(layers) > 4 and layers[-1] == layers[0] + len(layers) - 1 == depth - 1:
        assert Fraction(average(schedule, visual, depth)).limit_denominator(10**6) == keep


def test_a_stage_per_layer():
    """80 layers, a count for each."""
    layers = tuple(range(80))
    solve.cache_clear()
    start = time.process_time()
    schedule = solve(320, 2880, 80, layers, tuple(0.95**layer for layer in layers))
    assert time.process_time() - start < 5
    assert average(schedule, 2880, 80) == 320
    assert schedule[0] > 10 * schedule[79]


@pytest.mark.parametrize("ratios", [(1.0, 0.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_ratios_that_are_no_relative_counts(ratios):
    with pytest.raises(LitPruneError, match="must be numbers above 0"):
        solve(8, 36, 8, (1, 3), ratios)


def test_shapes_that_rise():
    with pytest.raises(LitPruneError, match="must not rise"):
        solve(16, 144, 16, (1, 8), (1.0, 4.0))
