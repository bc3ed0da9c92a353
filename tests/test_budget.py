"""Schedules whose average is the budget, and the errors of those that can't be."""

from itertools import pairwise, product

import pytest

from lit_prune.budget import average, check_layers, format_schedule, given, parse_budget, scale_layers, solve
from lit_prune.errors import LitPruneError


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


def test_counts_follow_the_shape():
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


def test_shape_of_another_length():
    with pytest.raises(LitPruneError, match="shape"):
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
