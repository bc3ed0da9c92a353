"""A method of the tower, then one of the decoder."""

import pytest
import tiny
import torch

from lit_prune.budget import average
from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.uniform import Uniform
from lit_prune.pruners.visionzip import VisionZip


def rcp() -> RCP:
    return RCP(layers=[1, 3, 5], shape=[4.0, 2.0, 1.0], select="topk", inner=16)


def test_schedule_spends_the_budget_behind_the_tower():
    """Four of 36 tokens on average: out of reach for a decoder that sees all in its first layer."""
    chain = Chain(VisionZip(), rcp(), middle=2.0)
    schedule = chain.schedule(4, 36, 8)
    assert list(schedule) == [0, 1, 3, 5]
    assert schedule[0] == 8
    assert average(schedule, 36, 8) == 4
    with pytest.raises(LitPruneError, match="can't be reached"):
        rcp().schedule(4, 36, 8)


def test_both_methods_run(pruned):
    vlm = pruned(
        Chain(VisionZip(), rcp()), keep=4, repair=tiny.RepairAdapter([6], [3], bottleneck=16, condition=8, code=4)
    )
    _, record = tiny.forward(vlm, tiny.batch(tiny.samples()))
    assert record.trace.tower.projected.tolist() == [12] * 3
    assert [stage.kept.sum(1).tolist() for stage in record.stages] == [[n] * 3 for n in vlm.host.schedule.values()]
    assert record.trace.average_visual().tolist() == [4] * 3


def test_gradients_reach_the_decoders_method(pruned):
    """In soft masks, with the tower's tokens gone for good."""
    vlm = pruned(Chain(VisionZip(), rcp()), keep=4)
    vlm.plugin.train()
    inputs = tiny.batch(tiny.samples(), answers=3)
    with vlm.using(tiny.Session(soft=True)):
        vlm.model(**inputs).loss.backward()
    missing = [name for name, p in vlm.plugin.pruner.then.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("token_score.2" in name or "fold" in name for name in missing), missing
    vlm.plugin.pruner.anneal(0.3, 0.1)
    assert (vlm.plugin.pruner.then.tau, vlm.plugin.pruner.then.noise) == (0.3, 0.1)


def test_saved_and_loaded_with_both_parts(pruned, tmp_path):
    vlm = pruned(Chain(VisionZip(contextual=0.3), rcp()), keep=4)
    vlm.save_pretrained(tmp_path)
    again = Plugin.from_pretrained(tmp_path)
    assert again.pruner.first.contextual == 0.3
    inputs = tiny.batch(tiny.samples())
    before = tiny.forward(vlm, inputs)[0]
    vlm.attach(again)
    assert torch.equal(tiny.forward(vlm, inputs)[0], before)


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (rcp(), VisionZip(), "tower first"),
        (VisionZip(), VisionZip(), "tower first"),
        (VisionZip(), Uniform(), "layer 1"),
    ],
)
def test_what_does_not_chain(first, then, words):
    with pytest.raises(LitPruneError, match=words):
        Chain(first, then)
