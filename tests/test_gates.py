"""Gradients that return through the gates: clipped, and centred, so that they say which tokens and not how many."""

import pytest
import tiny
import torch
from families import FAMILIES, Picture, collate, prompt
from torch import Tensor

from lit_prune.host import checkpointing
from lit_prune.ops.selection import centre_gradient, clip_gradient
from lit_prune.pruners.base import Kept
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.step import Step, StepKey, Teaching

LLAVA = FAMILIES["llava-1.5"]
MODES = [{}, {"train_mode": "drop"}, {"contenders": 2.0}, {"gate_clip": 0.01}, {"checkpoint_activations": True}]


def prompts() -> dict[str, Tensor]:
    """Two images, one, and none, padded on the left, with answers."""
    pictures = [[Picture((24, 24), 0), Picture((24, 24), 1)], [Picture((24, 24), 2)], []]
    return collate(LLAVA, [prompt(LLAVA, each, 4, seed) for seed, each in enumerate(pictures)], "left", 2)


def training_step(pruned, select: str = "threshold", **options) -> tuple[Step, list[Kept], list[Tensor]]:
    """A step of RCP with its repair adapter, and each stage's decision and tokens then alive."""
    vlm = pruned(tiny.small_rcp(select, bias=0.0), repair=tiny.small_repair())
    if options.get("checkpoint_activations"):
        checkpointing.prepare(vlm.model)
    vlm.plugin.train()
    decisions, alive, decide = [], [], vlm.plugin.pruner.prune

    def prune(context):
        kept = decide(context)
        kept.scores.retain_grad()
        decisions.append(kept)
        alive.append(context.alive)
        return kept

    vlm.plugin.pruner.prune = prune
    settings = {"train_mode": "soft", "contenders": None, "gate_clip": None, "checkpoint_activations": False}
    teaching = Teaching(vlm, tiny.KEEP, LossWeights(), Anneal(), watch=(), **settings | options)
    return teaching.step({"inputs": prompts()}, StepKey(seed=1, done=0.5)), decisions, alive


def uneven(scores: Tensor) -> Tensor:
    """Sum of each sample's gradients, as a share of the sum of their sizes."""
    return scores.grad.sum(1).abs() / scores.grad.abs().sum(1).clamp(min=1e-30)


@pytest.mark.parametrize("loss", ["task", "repair"])
@pytest.mark.parametrize("select", ["threshold", "topk"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_task_and_repair_do_not_say_how_many_tokens(pruned, mode, select, loss):
    """Over a sample's tokens, of all its images; pruned tokens and padding get nothing."""
    step, decisions, alive = training_step(pruned, select, gate_centre=True, **mode)
    step.losses[loss].backward()
    for kept, there in zip(decisions[:3], alive[:3], strict=True):
        assert kept.scores.grad[:2].any(1).all(), "which tokens"
        assert (uneven(kept.scores) < 1e-4).all(), "not how many"
        assert not kept.scores.grad[~there].any()
        assert not kept.scores.grad[2].any(), "no image"


def test_off_they_do(pruned):
    """So that the test above could fail, loss by loss."""
    for loss in ("task", "repair"):
        step, decisions, _ = training_step(pruned)
        step.losses[loss].backward()
        assert all((uneven(kept.scores)[:2] > 1e-2).any() for kept in decisions[:3])


def test_the_budget_loss_passes_as_it_is(pruned):
    """To the last stage's scores, bit for bit; values of all losses and of the record too."""
    plain, centred = (training_step(pruned, gate_centre=centre) for centre in (False, True))
    for step, *_ in (plain, centred):
        step.losses["budget"].backward()
    last, same = plain[1][2].scores.grad, centred[1][2].scores.grad
    assert last.any()
    assert torch.equal(last, same)
    assert all((uneven(kept.scores)[:2] > 0.5).all() for kept in centred[1][:3])
    assert {name: loss.item() for name, loss in plain[0].losses.items()} == {
        name: loss.item() for name, loss in centred[0].losses.items()
    }
    for before, after in zip(plain[0].student.stages, centred[0].student.stages, strict=True):
        assert torch.equal(before.gate, after.gate)


def test_centred_gradient_is_weighed_by_the_slope():
    scores = torch.randn(2, 6, requires_grad=True)
    among = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    gate, pull = scores.sigmoid(), torch.randn(2, 6)
    centred = centre_gradient(gate, among, (gate * (1 - gate)).detach())
    assert torch.equal(centred, gate)
    (centred * pull).sum().backward()
    assert scores.grad[0, :4].all()
    assert scores.grad[0].sum().abs() < 1e-6
    assert not scores.grad[~among].any()


def test_without_a_slope_all_tokens_weigh_the_same():
    gate, pull = torch.rand(1, 4, requires_grad=True), torch.tensor([[1.0, 2.0, 6.0, 100.0]])
    (centre_gradient(gate, torch.tensor([[True, True, True, False]])) * pull).sum().backward()
    assert gate.grad.tolist() == [[-2.0, -1.0, 3.0, 0.0]]


def test_a_clipped_gradient_is_centred_first():
    """The common part doesn't use up the norm, and what is left still sums to 0."""
    gate, pull = torch.rand(1, 4, requires_grad=True), torch.tensor([[1e6, 1e6 + 1, 1e6, 1e6 - 1]])
    (centre_gradient(clip_gradient(gate, 0.5), torch.ones(1, 4).bool()) * pull).sum().backward()
    assert gate.grad.norm() == pytest.approx(0.5)
    assert gate.grad.sum().abs() < 1e-6


def test_gates_without_gradients_pass_as_they_are():
    gate = torch.rand(1, 4)
    assert centre_gradient(gate, torch.ones(1, 4).bool()) is gate


@pytest.mark.parametrize("centre", [False, True])
def test_the_option_reaches_the_students_session_alone(student, centre):
    teacher, own = student("threshold", **({"gate_centre": True} if centre else {})).teaching.sessions(ranks=2)
    assert (teacher.gate_centre, own.gate_centre) == (False, centre)
