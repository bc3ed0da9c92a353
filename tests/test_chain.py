"""A method of the tower, then one of the decoder."""

import importlib
import inspect
import pkgutil
import typing
from dataclasses import fields

import pytest
import tiny
import torch

from lit_prune import pruners
from lit_prune.cost.flops import price
from lit_prune.errors import LitPruneError
from lit_prune.ops.budget import average
from lit_prune.plugin import Plugin
from lit_prune.pruners import by_image
from lit_prune.pruners.base import Context, Dims, Pruner
from lit_prune.pruners.chain import Chain
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


# -- nothing of the contract is forgotten ---------------------------------------------------------------------------

CONTRACT = {name for name in vars(Pruner) if not name.startswith("_")}
OWN = {  # what the base's own way is right for, since it asks the chain's other methods
    "attention": "`reads` stands in front of it",
    "plan": "asks `schedule`",
    "nominal_schedule": "asks `schedule` and `plan`",
    "score": "only the base's `prune` asks it",
    "flops": "only the base's `stage_flops` asks it",
    "config": "the chain's own arguments",
}
BATCH = torch.tensor([9.0])
CALLS = {  # how each method is called, and which part has to answer
    "random": [((), "first"), ((), "then")],
    "redraw": [((1,), "first"), ((1,), "then")],
    "title": [((), "first"), ((), "then")],
    "repairs": [((), "then")],
    "free": [((), "then")],
    "acts_in_tower": [],
    "needs_embeds": [],
    "needs_states": [],
    "needs_keys": [],
    "needs_values": [],
    "stages": [((8,), "then")],
    "schedule": [((4, 36, 8), "then")],
    "exact": [((0,), "first"), ((1,), "then")],
    "anneal": [((0.5, 0.1), "first"), ((0.5, 0.1), "then")],
    "reads": [((0,), "first"), ((1,), "then")],
    "vision_schedule": [((4, 36, 2), "first")],
    "prune_vision": [],  # `test_both_methods_run`
    "image_side": [((4, 6), "first")],
    "build": [((Dims(64, 8, 36),), "first"), ((Dims(64, 8, 36),), "then")],
    "prune": [],  # likewise
    "stage_flops": [((0, BATCH, BATCH, 64, BATCH), "first"), ((1, BATCH, BATCH, 64, BATCH), "then")],
    "vision_flops": [((BATCH, BATCH, 64), "first")],
}


def wrappers() -> list[type]:
    """Every class of the package that is made of other pruners."""
    modules = [importlib.import_module(f"{pruners.__name__}.{m.name}") for m in pkgutil.iter_modules(pruners.__path__)]
    kinds = {k for m in modules for k in vars(m).values() if inspect.isclass(k) and issubclass(k, Pruner)}
    return [k for k in kinds if Pruner in typing.get_type_hints(k.__init__).values()]


@pytest.mark.parametrize("wrapper", wrappers())
def test_a_wrapper_answers_for_everything_in_the_contract(wrapper):
    """A method that is added to the contract has to be forwarded, or to stand in `OWN` with a reason."""
    made = wrapper(VisionZip(), rcp())
    missing = [name for name in CONTRACT - OWN.keys() if name not in vars(wrapper) and name not in vars(made)]
    assert missing == []


def test_the_list_of_calls_is_the_contract():
    assert wrappers() == [Chain]
    assert CALLS.keys() | OWN.keys() == CONTRACT


@pytest.mark.parametrize("name", [name for name, calls in CALLS.items() if calls])
def test_every_method_reaches_its_part(name, monkeypatch):
    class First(VisionZip):
        pass

    class Then(RCP):
        pass

    chain = Chain(First(), Then(layers=[1, 3, 5], stage_ratios=[4.0, 2.0, 1.0], select="topk", inner=16))
    asked: list[str] = []
    for part, kind in (("first", First), ("then", Then)):
        original = inspect.getattr_static(kind, name)
        plain = original.fget if isinstance(original, property) else original if callable(original) else None

        def spy(self, *args, part=part, plain=plain, original=original):
            asked.append(part)
            return plain(self, *args) if plain else original

        wrap = property(spy) if plain is None or isinstance(original, property) else spy
        monkeypatch.setattr(kind, name, wrap)
    for args, part in CALLS[name]:
        asked.clear()
        own = inspect.getattr_static(Chain, name)
        getattr(chain, name) if isinstance(own, property) else getattr(chain, name)(*args)
        assert part in asked


def test_flags_are_those_of_both_parts():
    chain = Chain(VisionZip(), rcp())
    for flag in ("needs_embeds", "needs_states", "needs_keys"):
        chain.then.__class__ = type("Needing", (RCP,), {flag: True})
        assert getattr(Chain(VisionZip(), chain.then), flag)
    needing = type("Needing", (VisionZip,), {"needs_values": True, "needs_embeds": True})()
    assert Chain(needing, rcp()).needs_values
    assert Chain(needing, rcp()).needs_embeds
    assert Chain(VisionZip(), rcp()).acts_in_tower


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
        bare = price(record.trace, vlm.size, None)["total"]
        costs.append(price(record.trace, vlm.size, vlm.plugin.pruner)["total"] - bare)
    scorers = price(record.trace, vlm.size, None)["pruner"]
    assert (costs[0] > costs[1]).all(), "that and the decoder's"
    assert (costs[1] > scorers).all()


def test_images_by_themselves_are_shown_the_whole_context():
    """Every field of it is split by image, repeated for each, or made anew."""
    made_anew = {"alive", "images", "count", "total", "row_attention"}
    alike = {"stage", "hints"}  # of the whole batch: hints go by sample
    assert {field.name for field in fields(Context)} == {*by_image.BY_TOKEN, *by_image.BY_SAMPLE} | made_anew | alike
