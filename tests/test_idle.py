"""What teacher and student have in common runs once, and changes no bit; only what is looked at runs at all."""

import pytest
import tiny
import torch
from families import FAMILIES, METHODS, collate, prompts
from tiny import batch, forward, samples
from transformers import DynamicCache

from lit_prune.errors import LitPruneError
from lit_prune.host import Prefix, Record, Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.pruners.rcp import RCP
from lit_prune.training.losses import answer_loss
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("name", FAMILIES)
WANTED = frozenset({6, 7})


def attach(name: str, layer: str = "own") -> tuple[VLM, dict]:
    """RCP with repair in training mode on a tiny model of a family, and three prompts with answers of 3 tokens."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    rcp = RCP(layers=[2, 4, 6], stage_ratios=[4.0, 2.0, 1.0], select="topk", inner=16, attention_layer=layer)
    vlm = tiny.attach(family.build(), rcp, 26, METHODS["rcp"][1]())
    vlm.plugin.train()
    return vlm, collate(family, prompts(family), answers=3)


def step(vlm: VLM, inputs: dict, shared: bool, soft: bool) -> tuple[list, list, Record]:
    """Teacher and student by way of training: their answer states, the plug-in's gradients, the student's record."""
    plain, pruned = (Record(keep_hidden=WANTED) for _ in range(2))
    common = {"prefix": Prefix(vlm.host.shared), "answers_only": True} if shared else {}
    stop = max(WANTED) if shared else None
    torch.manual_seed(1)
    with torch.no_grad(), vlm.using(Session(False, False, record=plain, stop=stop and stop + 1, **common)):
        vlm.model(**inputs, use_cache=False)
    with vlm.using(Session(soft=soft, record=pruned, **common)):
        vlm.model(**inputs, use_cache=False)
    states = [record.hidden[layer] for record in (plain, pruned) for layer in sorted(WANTED)]
    loss = sum((state.float() * torch.linspace(-1, 1, state.numel()).view_as(state)).sum() for state in states)
    return states, torch.autograd.grad(loss, list(vlm.plugin.parameters()), allow_unused=True), pruned


@EVERY
def test_images_encoded_ahead_give_the_same_and_the_tower_runs_once(name):
    vlm, inputs = attach(name)
    vlm.plugin.eval()
    plain, _ = forward(vlm, inputs)
    calls, tower = [], vlm.model.model.visual if hasattr(vlm.model.model, "visual") else vlm.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    encoded = vlm.encode_images(inputs)
    for _ in range(2):
        logits, _ = forward(vlm, encoded)
    handle.remove()
    assert torch.equal(logits, plain)
    assert len(calls) == 1


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "drop"])
@EVERY
def test_a_student_that_starts_from_the_teachers_states_is_the_same_bit_for_bit(name, soft):
    vlm, inputs = attach(name)
    assert vlm.host.shared == 2
    apart, together = (step(vlm, inputs, shared, soft) for shared in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(apart[0], together[0], strict=True))
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in apart[1])
    for one, other in zip(apart[1], together[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    first, second = (run[2].trace for run in (apart, together))
    assert all(torch.equal(a, b) for a, b in zip(first.visual, second.visual, strict=True)), "what the method costs"


def test_the_layer_whose_attention_is_read_runs_in_the_student_too():
    vlm, inputs = attach("llava-1.5", "previous")
    assert vlm.host.shared == 1
    apart, together = (step(vlm, inputs, shared, True) for shared in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(apart[0], together[0], strict=True))


def test_idle_layers_see_one_column(pruned):
    """The student's below the first stage, the teacher's behind the last layer that is looked at."""
    vlm, inputs, seen = pruned(tiny.small_rcp(), tiny.KEEP), batch(samples()), []
    layers = vlm.host.parts.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for layer in layers]
    prefix, full = Prefix(vlm.host.shared), inputs["input_ids"].shape[1]
    forward(vlm, inputs, prune=False, repair=False, prefix=prefix, stop=6)
    forward(vlm, inputs, soft=True, prefix=prefix)
    for handle in handles:
        handle.remove()
    assert seen == [full] * 6 + [1] * 2 + [1] + [full] * 7


def test_nothing_is_shared_below_the_first_layer(pruned):
    assert pruned(tiny.Chosen([0], torch.ones(1, tiny.VISUAL, dtype=torch.bool)), tiny.KEEP).host.shared == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "drop"])
def test_answer_positions_alone_give_the_librarys_loss(pruned, side, soft):
    """Two turns: labels in two places. Nothing else gets logits."""
    vlm = pruned(tiny.small_rcp(), tiny.KEEP)
    inputs = batch(samples((47, 52, 49)), side, answers=4)
    for row, count in enumerate((2, 0, 1)):
        last = int(inputs["labels"][row].ne(-100).nonzero()[0])
        inputs["labels"][row, last - 3 : last - 3 + count] = inputs["input_ids"][row, last - 3 : last - 3 + count]
    record = Record()
    with torch.no_grad(), vlm.using(Session(soft=soft)):
        theirs = vlm.model(**inputs, use_cache=False).loss
    with torch.no_grad(), vlm.using(Session(soft=soft, answers_only=True, record=record)):
        output = vlm.model(**inputs, use_cache=False)
    assert output.loss is None
    assert output.logits.shape == (1, 3 * 4 + 3, tiny.VOCABULARY)
    assert answer_loss(output.logits[0], record.targets).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_label_right_behind_an_image_is_left_out(pruned):
    """A visual token would have to predict it, and that may be gone."""
    vlm, inputs = pruned(tiny.small_rcp(), tiny.KEEP), batch(samples((45,)), answers=7)
    for soft in (True, False):
        record = Record()
        with torch.no_grad(), vlm.using(Session(soft=soft, answers_only=True, record=record)):
            logits = vlm.model(**inputs, use_cache=False).logits
        assert record.targets.tolist() == inputs["input_ids"][0, -6:].tolist()
        assert logits.shape[1] == 6


def test_a_batch_without_answers_costs_nothing():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = answer_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


def test_named_layers_alone_are_recorded(pruned):
    vlm, record = pruned(tiny.small_rcp(), tiny.KEEP, tiny.small_repair()), Record(keep_hidden=frozenset({5}))
    with torch.no_grad(), vlm.using(Session(record=record)):
        vlm.model(**batch(samples(), answers=2))
    assert list(record.hidden) == [5]


@pytest.mark.parametrize("parts", [{"stop": 6}, {"prefix": Prefix(1)}], ids=["stop", "prefix"])
def test_layers_that_are_left_out_leave_no_cache(pruned, parts):
    """They have no keys, so nothing can go on from there: no cache by default, and none that is asked for."""
    vlm, inputs = pruned(tiny.small_rcp(), tiny.KEEP), batch(samples())
    with torch.no_grad(), vlm.using(Session(**parts)):
        assert cache_of(vlm.model(**inputs)) is None
        for asked in ({"use_cache": True}, {cache_keyword(vlm.model): DynamicCache()}):
            with pytest.raises(LitPruneError, match="use_cache=False"):
                vlm.model(**inputs, **asked)
