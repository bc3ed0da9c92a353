"""A method of the tower, then one of the decoder."""

from dataclasses import fields

import pytest
import tiny
import torch

from lit_prune.cost.flops import price
from lit_prune.errors import LitPruneError
from lit_prune.ops.budget import average
from lit_prune.plugin import Plugin
from lit_prune.pruners import by_image
from lit_prune.pruners.base import Context, Dims, Pruner, PruningMethod, VisionPruner
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dcp import DCPPrune, TextAwareClusters
from lit_prune.pruners.random import Random
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.uniform import Uniform
from lit_prune.pruners.visionzip import VisionZip


def rcp() -> RCP:
    return RCP(layers=[1, 3, 5], stage_ratios=[4.0, 2.0, 1.0], select="topk", inner=16)


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
    assert all(
        any(part in name for part in ("token_score.0", "token_score.1", "fold", "unused")) for name in missing
    ), missing
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


# -- a chain is a list of stages, and nothing that a part does is lost ------------------------------------------------
def test_the_host_walks_the_stages_of_both():
    chain = Chain(VisionZip(), rcp())
    walk = chain.walk(8)
    assert [(stage.layer, stage.index) for stage in walk] == [(0, 0), (1, 0), (3, 1), (5, 2)]
    assert [stage.pruner for stage in walk] == [chain.first.arrival, *[chain.then] * 3]
    assert chain.tower is chain.first
    assert chain.repairs is chain.then.repairs


def test_nothing_is_forwarded():
    """What the host asks of a stage it asks of the pruner in `walk`, so a chain has no code for it."""
    of_a_stage = {name for name in vars(Pruner) if not name.startswith("_")} - set(vars(PruningMethod))
    of_a_tower = {name for name in vars(VisionPruner) if not name.startswith("_")} - set(vars(PruningMethod))
    assert of_a_stage >= {"reads", "exact", "score", "prune", "flops", "needs_embeds", "needs_states", "needs_keys"}
    assert of_a_tower >= {"vision_schedule", "prune_vision", "image_side", "vision_flops", "needs_values"}
    assert not hasattr(Chain, "prune")
    assert not (of_a_stage | of_a_tower) & set(dir(Chain))


def test_every_part_is_built_annealed_and_asked():
    class Counting(RCP):
        def anneal(self, tau, noise):
            super().anneal(tau, noise)
            calls.append("anneal")

    calls: list[str] = []
    chain = Chain(VisionZip(), Counting([1, 3], [2.0, 1.0], select="threshold", inner=16))
    chain.build(Dims(64, 8, 36))
    assert len(chain.then.scorers) == 2
    chain.anneal(0.5, 0.1)
    assert (chain.then.tau, chain.then.noise, calls) == (0.5, 0.1, ["anneal"])
    assert chain.free
    assert not Chain(VisionZip(), rcp()).free


def test_embeddings_are_kept_for_the_part_that_wants_them(pruned):
    """DCP-Prune's clusters look at embeddings, RCP doesn't; alone or in a chain the arrival gets them."""
    seen = []

    class Watched(TextAwareClusters):
        def prune(self, context):
            seen.append(context)
            return super().prune(context)

    method = DCPPrune((1, -1), (2.0, 1.0), 2)
    method.arrival = Watched()
    tiny.forward(pruned(Chain(method, rcp()), keep=4), tiny.batch(tiny.samples()))
    assert seen[0].visual_embeds is not None
    assert seen[0].stage == 0


def test_a_drawing_part_is_drawn():
    chain = Chain(VisionZip(), Random([1, 3], seed=2))
    assert chain.random
    chain.redraw(5)
    assert chain.then.seed == 7
    assert not Chain(VisionZip(), rcp()).random


def test_its_price_has_the_towers_method(pruned):
    """The same tower's method by itself, at the middle budget, costs as much there."""
    costs = []
    for pruner, keep in ((Chain(VisionZip(), rcp(), middle=3.0), 4), (VisionZip(), 12)):
        vlm = pruned(pruner, keep=keep, repair=tiny.RepairAdapter([6], [0], bottleneck=16, condition=8, code=4))
        _, record = tiny.forward(vlm, tiny.batch(tiny.samples()))
        bare = price(record.trace, vlm.size)["total"]
        costs.append(price(record.trace, vlm.size, vlm.plugin.pruner)["total"] - bare)
    scorers = price(record.trace, vlm.size)["pruner"]
    assert (costs[0] > costs[1]).all(), "that and the decoder's"
    assert (costs[1] > scorers).all()


def test_images_by_themselves_are_shown_the_whole_context():
    """Every field of it is split by image, repeated for each, or made anew."""
    made_anew = {"alive", "images", "count", "total", "row_attention"}
    alike = {"stage", "hints"}  # of the whole batch: hints go by sample
    assert {field.name for field in fields(Context)} == {*by_image.BY_TOKEN, *by_image.BY_SAMPLE} | made_anew | alike
