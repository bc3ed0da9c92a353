"""Compiled decoder layers: the same numbers, no graph break that the plain model hasn't, hooks outside."""

from collections.abc import Iterator

import jaxtyping
import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from lit_prune.errors import LitPruneError
from lit_prune.vlm import VLM

DEEP = 10  # more layers than the compiler's usual limit of 8 variants


@pytest.fixture
def model() -> Iterator[torch.nn.Module]:
    torch._dynamo.reset()
    counters.clear()
    jaxtyping.config.update("jaxtyping_disable", True)  # checks of shapes in tests; the compiler can't read them
    yield tiny.build_model(depth=DEEP)
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


ANSWER = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.PAD]}


@pytest.mark.parametrize("pruner", ["rcp", pytest.param("fastv", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_without_graph_breaks(model, pruner):
    """Prefill and decoding; FastV reads the attention of the layer before, inside the compiled layer."""
    inputs = tiny.batch(tiny.samples((50, 50)))
    vlm = tiny.attach(model, tiny.ROOT / "configs" / "pruners" / f"{pruner}.yaml")
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, **ANSWER)
        vlm.compile(backend="eager", fullgraph=True)
        assert tiny.gap(model(**inputs).logits, logits) < tiny.TOLERANCE
        assert torch.equal(model.generate(**inputs, **ANSWER), tokens)
    assert counters["stats"]["unique_graphs"] >= DEEP
    assert not counters["graph_break"]
    vlm.detach()


@pytest.mark.slow
def test_plug_ins_come_and_go_on_compiled_layers(model):
    """The plain model has no graph break either."""
    inputs = tiny.batch(tiny.samples((50, 50)))
    with torch.no_grad():
        plain, tokens = model(**inputs).logits, model.generate(**inputs, **ANSWER)
        vlm = VLM(model, None, "tiny").compile(backend="eager", fullgraph=True)
        assert tiny.gap(model(**inputs).logits, plain) < tiny.TOLERANCE
        assert torch.equal(model.generate(**inputs, **ANSWER), tokens)
        assert counters["stats"]["unique_graphs"] >= DEEP
        assert not counters["graph_break"]
        tiny.attach(model, tiny.small_rcp(), repair=tiny.small_repair())
        assert tiny.gap(model(**inputs).logits[:, -1], plain[:, -1]) > 0.1
        vlm.detach()
        assert tiny.gap(model(**inputs).logits, plain) < tiny.TOLERANCE


@pytest.mark.parametrize("part", ["model", "layer"])
def test_a_model_that_was_compiled_as_a_whole_is_refused(model, part):
    (model if part == "model" else model.model.language_model.layers[3]).compile(backend="eager")
    with pytest.raises(LitPruneError, match=r"VLM\.compile"):
        tiny.attach(model, tiny.small_rcp())


@pytest.mark.slow
def test_compiled_by_inductor(model):
    inputs = tiny.batch(tiny.samples((50, 50)))
    vlm = tiny.attach(model, tiny.small_rcp(), repair=tiny.small_repair())
    with torch.no_grad():
        logits = model(**inputs).logits
        vlm.compile()
        assert tiny.gap(model(**inputs).logits, logits) < 10 * tiny.TOLERANCE
