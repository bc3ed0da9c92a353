"""Metrics and schedules against numpy and by hand; the merge over ranks is in test_moments.py."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_prune.data.regions import joined, regions
from lit_prune.evaluation.measuring import matches
from lit_prune.evaluation.metrics import Consistency, LayerTokens, Shift, SkillAccuracy, figure_name
from lit_prune.host import Record, StageRecord
from lit_prune.pruners.random import Random
from lit_prune.training.losses import (
    Anneal,
    LossWeights,
    budget_share,
    distillation,
    repair_loss,
    stagewise_distance,
    visual_share,
)


# -- accuracy -------------------------------------------------------------------------------------------------------
def test_accuracy_per_skill_equals_numpy():
    rng = np.random.default_rng(0)
    hits, skills = rng.random(200) < 0.7, rng.choice(["colour", "shape", "digit"], 200)
    metric = SkillAccuracy()
    for part in np.array_split(np.arange(200), 7):
        metric.update(hits[part].tolist(), skills[part].tolist())
    expected = {"all": hits.mean(), **{skill: hits[skills == skill].mean() for skill in np.unique(skills)}}
    assert metric.compute() == pytest.approx(expected)
    assert list(metric.compute()) == ["all", "colour", "digit", "shape"]


def test_accuracy_of_nothing_and_reset():
    metric = SkillAccuracy()
    assert metric.compute() == {}
    metric.update([True], ["colour"])
    metric.reset()
    metric.update([False], ["shape"])
    assert metric.compute() == {"all": 0.0, "shape": 0.0}


def test_answers_without_a_skill_count_overall_alone():
    """And a skill of that name is no overall figure, whatever its type."""
    metric = SkillAccuracy()
    metric.update([True, False, False, True], ["colour", None, None, "all"])
    metric.update([False, False], [3, "all (skill)"])
    assert metric.compute() == pytest.approx(
        {"all": 1 / 3, "3": 0.0, "all (skill)": 1.0, "all (skill) (skill)": 0.0, "colour": 1.0}
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.none() | st.integers(-2, 2) | st.text(max_size=8)), min_size=1))
def test_accuracy_is_right_whatever_the_skills_are_called(answers):
    metric = SkillAccuracy()
    metric.update(*zip(*answers, strict=True))
    found = metric.compute()
    assert found.pop("all") == pytest.approx(np.mean([hit for hit, _ in answers]), abs=1e-6)
    named: dict[str, list[bool]] = {}
    for hit, skill in answers:
        if skill is not None:
            named.setdefault(str(skill), []).append(hit)
    assert sorted(found.values()) == pytest.approx(sorted(np.mean(hits) for hits in named.values()), abs=1e-6)


def test_names_in_loggers_stay_apart():
    """Also after TensorBoard has replaced the characters that it does not take."""
    skills = ["a b", "a_b", "a/b", "a  b", "all", "all (skill)", "3", "left-of", "räumlich", "x" * 99, "x" * 98, "?"]
    names = [figure_name(skill) for skill in skills]
    assert len({re.sub(r"[^-/\w\.]", "_", name) for name in names}) == len(skills)
    assert figure_name("colour") == "colour"
    assert "/" not in "".join(names)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("Red.", "red", True), (" left  above", "left above", True), ("red", "blue", False), ("12", "1", False)],
)
def test_answers_match_exactly_up_to_case_space_and_stop(text, answer, right):
    assert matches([text], [answer]) == [right]


# -- shift ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_shift_equals_numpy(offset):
    """In several updates, and far from zero, where fp32 sums of squares cancel."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(offset, 1, (3, 50, 8)), rng.normal(offset + 0.5, 2, (3, 50, 8))
    metric = Shift(3, 8)
    for part in np.array_split(np.arange(50), 4):
        metric.update(*({i: torch.from_numpy(x[i, part]) for i in range(3)} for x in (student, teacher)))
    mean = (student.mean(1) - teacher.mean(1)) ** 2
    spread = (student.std(1) - teacher.std(1)) ** 2
    assert metric.compute().numpy() == pytest.approx((mean + spread).mean(-1), rel=1e-6)


def test_shift_of_equal_states_is_zero():
    states = {0: torch.randn(20, 4), 1: torch.randn(20, 4)}
    metric = Shift(2, 4)
    metric.update(states, states)
    assert metric.compute().tolist() == [0.0, 0.0]


# -- schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("done", "tau"), [(0.0, 1.5), (0.3, 0.85), (0.6, 0.2), (0.8, 0.2), (1.0, 0.2)])
def test_temperature(done, tau):
    assert Anneal().tau(done) == pytest.approx(tau)


@pytest.mark.parametrize(("done", "noise"), [(0.0, 1.0), (0.79, 1.0), (0.8, 0.0), (1.0, 0.0)])
def test_noise(done, noise):
    assert Anneal().noise_scale(done) == noise


@pytest.mark.parametrize(("done", "target"), [(0.0, 1.0), (0.05, 0.5555), (0.1, 0.111), (1.0, 0.111)])
def test_target(done, target):
    assert Anneal().target(0.111, done) == pytest.approx(target, abs=1e-4)


def test_schedules_can_be_turned_off():
    still = Anneal(tau_share=0.0, quiet_share=0.0, target_share=0.0)
    assert still.tau(0.5) == still.tau_end
    assert still.noise_scale(0.999) == 1.0
    assert still.target(0.2, 0.0) == 0.2


# -- losses ---------------------------------------------------------------------------------------------------------
def record_of(hidden: dict[int, torch.Tensor]) -> Record:
    return Record(keep_hidden=True, hidden=hidden)


def test_repair_loss_is_the_mean_over_layers():
    torch.manual_seed(0)
    student, teacher = ({layer: torch.randn(30, 8) for layer in (3, 5)} for _ in range(2))
    loss = repair_loss(record_of(student), record_of(teacher), [3, 5], LossWeights(variance=3.0))
    parts = []
    for layer in (3, 5):
        s, t = student[layer].double().numpy(), teacher[layer].double().numpy()
        parts.append(((s.mean(0) - t.mean(0)) ** 2).mean() + 3 * ((s.var(0) - t.var(0)) ** 2).mean())
    assert loss.item() == pytest.approx(np.mean(parts), rel=1e-5)


def test_budget_share_is_of_each_samples_own_tokens():
    """A sample with fewer than the budget keeps all; one without an image doesn't count."""
    assert budget_share(16, torch.tensor([144, 144, 144])) == 16 / 144
    assert budget_share(16, torch.tensor([64, 0, 10])) == (16 / 64 + 1) / 2


def test_visual_share_is_the_average_over_layers():
    """(1 layer of all + 2 of 6/8 and 4/4 + 3 of 2/8 and 2/4) / 6, over the two samples with an image."""
    gates = torch.zeros(2, 3, 8)
    for stage, counts in enumerate([(6, 4, 0), (2, 2, 0)]):
        for sample, count in enumerate(counts):
            gates[stage, sample, :count] = 1
    gates.requires_grad_()
    record = Record()
    record.trace.total_visual = torch.tensor([8, 4, 0])
    record.stages = [StageRecord(layer, gates[i] > 0, gates[i], None) for i, layer in enumerate((1, 3))]
    share = visual_share(record, 6)
    assert share.item() == pytest.approx((1 + 2 * (0.75 + 1) / 2 + 3 * (0.25 + 0.5) / 2) / 6)
    assert (torch.autograd.grad(share, gates)[0][:, :2] > 0).all()


@pytest.mark.parametrize("relative", [False, True])
def test_a_batch_without_answer_tokens_has_nothing_to_repair(relative):
    """0 with a gradient of 0, not NaN."""
    states = torch.zeros(0, 4, requires_grad=True)
    loss = repair_loss(record_of({3: states}), record_of({3: states.detach()}), [3], LossWeights(relative=relative))
    loss.backward()
    assert loss.item() == 0
    assert states.grad.isfinite().all()


def test_stagewise_distance_is_of_each_stage_in_each_sample():
    """Counts that share the budget out otherwise, or give one sample the other's, meet the average and miss this."""
    pruner = Random(layers=(1, 3), stage_ratios=[3.0, 1.0])
    planned = list(pruner.plan(4, 8, 6).values())

    def distance(counts: list[tuple[int, int, int]]) -> float:
        gates = torch.zeros(2, 3, 8)
        for stage, kept in enumerate(counts):
            for sample, count in enumerate(kept):
                gates[stage, sample, :count] = 1
        record = Record()
        record.trace.total_visual = torch.tensor([8, 8, 0])
        record.stages = [
            StageRecord(layer, gates[i] > 0, gates[i], None, torch.full((3,), planned[i]))
            for i, layer in enumerate((1, 3))
        ]
        return stagewise_distance(record, 6, Anneal(target_share=0.0), 1.0).item()

    one, two = planned
    assert distance([(one, one, 0), (two, two, 0)]) == 0
    assert distance([(one + 1, one - 1, 0), (two, two, 0)]) == pytest.approx(2 / 6 / 8)
    assert distance([(one, one, 0), (two, two + 1, 0)]) == pytest.approx(3 / 6 / 8 / 2)


def test_distillation_is_zero_for_equal_answers_only():
    logits = torch.randn(4, 9)
    assert distillation(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert distillation(logits, torch.randn(4, 9)).item() > 0.1


# -- the oracle's hint ----------------------------------------------------------------------------------------------
def test_regions_measure_how_much_of_a_patch_a_box_covers():
    hint = joined([regions(boxes, (4, 4), (32, 32)) for boxes in ([[0, 0, 16, 8], [4, 4, 12, 12]], [])])["regions"]
    assert hint.shape == (2, 2, 16)
    assert hint[0, 0].tolist() == [1, 1] + [0] * 14
    assert hint[0, 1].tolist() == [0.25, 0.25, 0, 0, 0.25, 0.25] + [0] * 10
    assert (hint[1] == 0).all()


@pytest.mark.parametrize(
    "metric", [Shift(2, 3), LayerTokens(2), Consistency()], ids=lambda metric: type(metric).__name__
)
def test_sums_stay_float64_where_the_module_around_them_is_cast(metric):
    """Before an update and after a reset: ranks with nothing to add sync with those that have something."""
    around = torch.nn.ModuleList([metric])
    for cast in (around.float, around.bfloat16):
        cast()
        metric.reset()
        assert {getattr(metric, name).dtype for name in metric._defaults} == {torch.float64}
