"""An attach that fails leaves the model as it was: what was attached goes on pruning, nothing else stays."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_vlm import hooks
from tiny import KEEP, batch, forward, samples
from torch import nn

from lit_prune.errors import LitPruneError
from lit_prune.host import host_of
from lit_prune.plugin import Plugin
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.random import Random
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM


class Broken(Random):
    """Fails where it is told to."""

    def __init__(self, at: str) -> None:
        super().__init__([1])
        self.at = at

    def build(self, dims):
        self.fail("build")

    def stages(self, depth):
        self.fail("stages")
        return super().stages(depth)

    def reads(self, stage):
        self.fail("reads")
        return super().reads(stage)

    def schedule(self, keep, visual, depth):
        self.fail("schedule")
        return super().schedule(keep, visual, depth)

    def _apply(self, function, *args, **options):
        self.fail("device")
        return super()._apply(function, *args, **options)

    def fail(self, at: str) -> None:
        if self.at == at:
            raise RuntimeError(f"no {at}")


class BrokenRepair(RepairAdapter):
    def build(self, dims):
        raise RuntimeError("no repair")


class BrokenTower(VisionZip):
    def vision_schedule(self, keep, visual, depth):
        raise RuntimeError("no vision_schedule")


def other_dims() -> Plugin:
    plugin = Plugin(tiny.small_rcp(), None, KEEP)
    vlm = VLM(tiny.build_model(width=32), None).attach(plugin)
    vlm.detach()
    return plugin


def other_weights() -> Plugin:
    plugin = Plugin(tiny.small_rcp(), None, KEEP)
    VLM(tiny.build_model(seed=7), None).attach(plugin).detach()
    return plugin


def damaged(folder: Path) -> Path:
    Plugin(Random(), None, KEEP).save_pretrained(folder)
    (folder / "plugin.json").write_text("{")
    return folder


FAILURES: dict[str, Callable[[VLM, Path], object]] = {
    "no budget": lambda vlm, tmp: vlm.attach(Random()),
    "budget of nothing": lambda vlm, tmp: vlm.attach(Random(), keep=0),
    "budget above the image": lambda vlm, tmp: vlm.attach(Random(), keep=99),
    "budget out of reach": lambda vlm, tmp: vlm.attach(Random([6]), keep=3),
    "schedule at other layers": lambda vlm, tmp: vlm.attach(Random([1]), keep={2: 5}),
    "no such file": lambda vlm, tmp: vlm.attach(tmp / "missing.yaml"),
    "no such folder": lambda vlm, tmp: vlm.attach(tmp / "missing"),
    "no plug-in in the folder": lambda vlm, tmp: vlm.attach(tmp),
    "damaged folder": lambda vlm, tmp: vlm.attach(damaged(tmp)),
    "layers outside": lambda vlm, tmp: vlm.attach(Random([8]), keep=5),
    "layers that rise not": lambda vlm, tmp: vlm.attach(Random([3, 2]), keep=5),
    "ratios of another length": lambda vlm, tmp: vlm.attach(Random([1], [1.0, 2.0]), keep=5),
    "no layer before the first": lambda vlm, tmp: vlm.attach(FastV([0]), keep=5),
    "repair before pruning": lambda vlm, tmp: vlm.attach(Random([4]), RepairAdapter([2], [0]), keep=20),
    "repair outside": lambda vlm, tmp: vlm.attach(Random([4]), RepairAdapter([8], [0]), keep=20),
    "unknown positions": lambda vlm, tmp: vlm.attach(Random(), keep=5, positions="none"),
    "unknown proportional_attention": lambda vlm, tmp: vlm.attach(Random(), keep=5, proportional_attention="all"),
    "stages of its own": lambda vlm, tmp: vlm.attach(Broken("stages"), keep=5),
    "reads of its own": lambda vlm, tmp: vlm.attach(Broken("reads"), keep=5),
    "schedule of its own": lambda vlm, tmp: vlm.attach(Broken("schedule"), keep=5),
    "build of its own": lambda vlm, tmp: vlm.attach(Broken("build"), keep=5),
    "no room on the device": lambda vlm, tmp: vlm.attach(Broken("device"), keep=5),
    "repair of its own": lambda vlm, tmp: vlm.attach(Random(), BrokenRepair([4], [0]), keep=5),
    "tower of its own": lambda vlm, tmp: vlm.attach(BrokenTower(), keep=5),
    "another size of model": lambda vlm, tmp: vlm.attach(other_dims()),
    "another model's weights": lambda vlm, tmp: vlm.attach(other_weights()),
    "the same plug-in at a bad budget": lambda vlm, tmp: vlm.attach(vlm.plugin or Random(), keep=99),
}


def all_hooks(model: nn.Module) -> list:
    """And what stands for a method of the model's."""
    hooks = [(id(m), list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in model.modules()]
    return [*hooks, vars(model).get("_prefill")]


@pytest.fixture
def model(tiny_model):
    """After a forward, in which the library adds hooks of its own."""
    with torch.no_grad():
        tiny_model(**batch(samples()))
    yield tiny_model
    VLM(tiny_model, None).detach()


@pytest.mark.parametrize("before", ["nothing", "a method", "a method in the tower", "another VLM's"])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failed_attach_changes_nothing(model, tmp_path, failure, before):
    vlm, inputs = VLM(model, None, "tiny"), batch(samples())
    if before != "nothing":
        owner = VLM(model, None, "tiny") if before == "another VLM's" else vlm
        owner.attach(VisionZip() if before == "a method in the tower" else tiny.small_rcp(), keep=KEEP)
    state = (vlm.host, vlm.plugin, host_of(model), all_hooks(model))
    kept = vlm.plugin and (vlm.plugin.keep, vlm.plugin.options, vlm.plugin.base)
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        logits = model(**inputs).logits
    with pytest.raises((LitPruneError, RuntimeError)):
        failure(vlm, tmp_path)
    assert (vlm.host, vlm.plugin, host_of(model), all_hooks(model)) == state
    assert (vlm.plugin and (vlm.plugin.keep, vlm.plugin.options, vlm.plugin.base)) == kept
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    vlm.attach(Random(), keep=7)
    assert forward(vlm, inputs)[1].trace.average_visual().tolist() == [7] * 3


@pytest.mark.parametrize("at", ["layers", "tower"])
def test_hooks_that_cannot_be_added_are_taken_back(model, monkeypatch, at):
    """Such as by a key pressed at that moment: those before the last are there already."""
    vlm = VLM(model, None, "tiny").attach(tiny.small_rcp(), keep=KEEP)
    last = vlm.host.parts.layers[-1] if at == "layers" else model.model.vision_tower.encoder.layers[-1]
    before = all_hooks(model)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "register_forward_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vlm.attach(VisionZip(), keep=5)
    assert all_hooks(model) == before


def test_a_tower_that_cannot_be_pruned(model, monkeypatch):
    vlm = VLM(model, None, "tiny").attach(tiny.small_rcp(), keep=KEEP)
    before, count = all_hooks(model), hooks(model)
    monkeypatch.setattr(model.config.vision_config, "num_hidden_layers", 9)
    with pytest.raises(LitPruneError, match="vision tower"):
        vlm.attach(VisionZip(), keep=5)
    assert all_hooks(model) == before
    assert hooks(model) == count


def test_eager_attention_keeps_what_it_has(tiny_eager):
    vlm = VLM(tiny_eager, None, "tiny").attach(Random([1]), keep=KEEP)
    before = all_hooks(tiny_eager)
    for options in ({"pruner": FastV([2])}, {"pruner": Random([1]), "proportional_attention": "count"}):
        with pytest.raises(LitPruneError, match="eager"):
            vlm.attach(**options, keep=20)
    assert all_hooks(tiny_eager) == before
    vlm.detach()
    assert all_hooks(tiny_eager)[-1] is None
