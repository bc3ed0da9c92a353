"""The torchmetrics metric of a rule: several ranks give the figures of one, repeated questions count once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_prune.evaluation.scorers import Question, rule_of
from lit_prune.evaluation.scorers.metric import Scorer

SPLITS = ("random", "popular")


def questions(count: int) -> list[Question]:
    labels = ["yes" if n % 3 else "no" for n in range(count)]
    return [Question(n, f"{n}.jpg", "é\n?", {"label": label}, SPLITS[n % 2], n) for n, label in enumerate(labels)]


def scorer(answers: list[str], asked: list[Question], size: int = 3) -> Scorer:
    metric = Scorer(rule_of("pope"))
    for start in range(0, len(asked), size):
        metric.update(answers[start : start + size], asked[start : start + size])
    return metric


ANSWERS = st.lists(st.sampled_from(["Yes", "No", "a\nb", "", "no.\u2028yes", "é"]), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(ANSWERS, st.randoms(), st.integers(1, 5))
def test_order_and_batches_make_no_difference(answers, random, size):
    asked = questions(len(answers))
    pairs = list(zip(asked, answers, strict=True))
    expected = rule_of("pope").score(pairs)
    random.shuffle(pairs)
    metric = scorer([answer for _, answer in pairs], [question for question, _ in pairs], size)
    assert metric.compute() == expected


@settings(max_examples=50, deadline=None)
@given(ANSWERS, st.integers(1, 4))
def test_ranks_that_repeat_questions_give_the_figures_of_one(answers, ranks):
    """A distributed sampler deals questions in turn and fills up with the first ones."""
    asked = questions(len(answers))
    padded = [*range(len(answers))] + [n % len(answers) for n in range(-len(answers) % ranks)]
    metrics = [
        scorer([answers[n] for n in dealt], [asked[n] for n in dealt])
        for dealt in (padded[r::ranks] for r in range(ranks))
    ]
    first = metrics[0]
    for other in metrics[1:]:
        first.merge_state(other)
    assert first.compute() == scorer(answers, asked).compute()


def test_two_processes_give_the_figures_of_one(tmp_path: Path):
    """One of three ranks has answered nothing; gathering is gloo's."""
    script = Path(__file__).with_name("scorer_ranks.py")
    starts = [[sys.executable, str(script), str(tmp_path), str(rank), "3"] for rank in range(3)]
    running = [subprocess.Popen(start, stderr=subprocess.PIPE, text=True) for start in starts]
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    answers = ["Yes", "No", "Yes", "Yes", "No"]
    assert found == [scorer(answers, questions(5)).compute()] * 3


def test_answers_that_differ_are_noticed_and_one_is_taken_whatever_the_order():
    asked = questions(4)
    with pytest.warns(UserWarning, match="1 questions were answered twice"):
        first = scorer(["Yes", "Yes", "Yes", "Yes", "No"], [*asked, asked[1]]).compute()
    with pytest.warns(UserWarning, match="1 questions were answered twice"):
        second = scorer(["No", "Yes", "Yes", "Yes", "Yes"], [asked[1], asked[0], *asked[1:]]).compute()
    assert first == second


def test_casts_and_checkpoints_keep_what_was_counted():
    asked, answers = questions(4), ["Yes", "No", "Yes", "No"]
    metric = scorer(answers, asked)
    expected = metric.compute()
    metric.persistent(True)
    saved = metric.state_dict()
    again = Scorer(rule_of("pope"))
    again.persistent(True)
    again.load_state_dict(saved)
    assert again.compute() == expected
    module = torch.nn.ModuleList([scorer(answers, asked)]).half().to(torch.bfloat16)
    assert module[0].compute() == expected
    metric.reset()
    metric.update([], [])
    metric.update(answers[:2], asked[:2])
    assert metric.compute() == scorer(answers[:2], asked[:2]).compute()


def test_as_many_answers_as_questions():
    with pytest.raises(ValueError, match="argument 2"):
        Scorer(rule_of("pope")).update(["Yes"], questions(2))


def test_headline():
    assert Scorer(rule_of("mme")).headline == "perception"
