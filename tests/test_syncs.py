"""A pruned forward with a fixed budget looks at the device once: on a GPU every further look would wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prune.host import Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.step import StepKey, Teaching

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Looks(TorchDispatchMode):
    """Operators whose result has to reach Python, or whose output's size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(LOOKS) or boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects them, and `tolist`, which goes by no operator on a CPU."""
    mode = Looks()
    plain = torch.Tensor.tolist
    with monkeypatch.context() as patch, mode:
        patch.setattr(torch.Tensor, "tolist", lambda self: (mode.found.append("tolist"), plain(self))[1])
        yield mode.found


@pytest.mark.parametrize("lengths", [(50, 50, 50), tiny.LENGTHS], ids=["equal", "padded"])
@pytest.mark.parametrize("pruner", ["rcp", "fastv", "text_attention", "random"])
def test_a_prefill_looks_once_more_than_the_plain_models(tiny_model, pruned, monkeypatch, pruner, lengths):
    inputs = tiny.batch(tiny.samples(lengths))
    vlm = pruned(tiny.ROOT / "configs" / "pruners" / f"{pruner}.yaml")
    counts = {}
    for name, session in (("plain", Session(prune=False, repair=False)), ("pruned", Session())):
        with torch.no_grad(), vlm.using(session), looks(monkeypatch) as found:
            tiny_model(**inputs)
        counts[name] = found
    assert counts["pruned"] == counts["plain"], "both look at the ids once"
    vlm.detach()
    with torch.no_grad(), looks(monkeypatch) as bare:
        tiny_model(**inputs)
    assert sorted(counts["pruned"]) == sorted([*bare, "tolist"])


@pytest.mark.parametrize("lengths", [(50, 50, 50), tiny.LENGTHS], ids=["equal", "padded"])
def test_a_decoding_step_looks_no_oftener_than_the_plain_models(tiny_model, pruned, monkeypatch, lengths):
    inputs = tiny.batch(tiny.samples(lengths))
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    counts = []
    for attached in (True, False):
        if not attached:
            vlm.detach()
        with torch.no_grad():
            cache = cache_of(tiny_model(**inputs, use_cache=True))
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            step = {"input_ids": torch.full((3, 1), 5), "attention_mask": mask, cache_keyword(tiny_model): cache}
            with looks(monkeypatch) as found:
                tiny_model(**step)
        counts.append(found)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("mode", "backward"), [("soft", "all"), ("soft", "kept"), ("drop", "all")])
def test_a_training_step_looks_once_more_in_each_forward_than_the_plain_model(
    tiny_model, pruned, monkeypatch, mode, backward
):
    """Padded prompts, labels, two repaired layers, clipped gates: forward of teacher and student, losses, backward."""
    inputs = tiny.batch(tiny.samples(), answers=3)
    with torch.no_grad(), looks(monkeypatch) as bare:
        tiny_model(**{name: part for name, part in inputs.items() if name != "labels"}, use_cache=False)
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    vlm.plugin.train()
    options = {"train_mode": mode, "contenders": None, "gate_clip": 1.0, "checkpoint_activations": False, "watch": ()}
    teaching = Teaching(vlm, tiny.KEEP, LossWeights(distill=1.0), Anneal(), **options, backward=backward)
    with looks(monkeypatch) as found:
        teaching.step({"inputs": inputs}, StepKey(seed=1, done=0.5)).total.backward()
    vlm.plugin.zero_grad()
    vlm.plugin.eval()
    assert sorted(found) == sorted([*bare, "tolist"] * 2)


def test_a_threshold_has_to_look(pruned, monkeypatch):
    """So that the tests above could fail."""
    vlm = pruned(tiny.small_rcp("threshold", bias=0.0), repair=tiny.small_repair())
    with torch.no_grad(), looks(monkeypatch) as found:
        vlm.model(**tiny.batch(tiny.samples()))
    assert found.count("_local_scalar_dense") > 5


@pytest.mark.gpu
def test_no_wait_between_the_decoders_layers():
    """On a GPU, PyTorch's own watch: nothing in decoder layers, hooks included, waits."""
    model = tiny.build_model().cuda()
    vlm = tiny.attach(model, tiny.small_rcp(), repair=tiny.small_repair())
    inputs = {name: part.cuda() for name, part in tiny.batch(tiny.samples((50, 50))).items()}
    first = vlm.host.parts.layers[0]
    last = vlm.host.parts.layers[-1]
    start = first.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"), prepend=True)
    stop = last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        start.remove()
        stop.remove()
        vlm.detach()
