"""Copies of a model with a plug-in attached: by `copy`, `pickle`, `torch.save` and another process."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import tiny
import torch
from test_vlm import hooks
from tiny import PRUNERS, batch, forward, generate, samples
from torch import nn

from lit_prune.host import Record, Session, host_of
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)


def saved(thing):
    """Through a file of `torch.save`."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPY = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": saved}
WAYS = pytest.mark.parametrize("way", COPY.values(), ids=COPY)


@pytest.fixture
def own_model() -> nn.Module:
    """A model that no other test has."""
    return tiny.build_model()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def modules_of(vlm: VLM) -> set[int]:
    """Everything that a host reaches: modules of the model, the plug-in, the hooks' owners."""
    host = vlm.host
    parts = [*vlm.model.modules(), host, host.layers, host.layers.runner, host.pruner, host.parts.decoder]
    return {id(part) for part in parts}


@EVERY
@pytest.mark.parametrize("way", [COPY["deepcopy"], COPY["pickle"]], ids=["deepcopy", "pickle"])
def test_a_copy_prunes_by_itself(own_model, pruner, way):
    """It answers as the original does, shares nothing with it, and detaching either leaves the other alone."""
    inputs = batch(samples())
    with torch.no_grad():
        plain = own_model(**inputs).logits
    vlm = tiny.attach(own_model, pruner)
    expected, record = forward(vlm, inputs)
    answers = generate(vlm, inputs, tokens=3).sequences
    twin: VLM = way(vlm)
    assert twin.host is host_of(twin.model)
    assert not modules_of(twin) & modules_of(vlm)
    found, own = forward(twin, inputs)
    assert torch.equal(found, expected)
    assert torch.equal(generate(twin, inputs, tokens=3).sequences, answers)
    assert torch.equal(own.trace.average_visual(), record.trace.average_visual())

    tiny.shake(twin.plugin)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(0.01)
    forward(twin, inputs)
    assert torch.equal(forward(vlm, inputs)[0], expected), "the original has its own weights"
    before, own = hooks(vlm.model), len(twin.host.handles)
    assert own == len(vlm.host.handles)
    assert hooks(twin.detach().model) == before - own
    assert hooks(vlm.model) == before
    assert torch.equal(forward(vlm, inputs)[0], expected)
    vlm.detach()
    with torch.no_grad():
        assert torch.equal(own_model(**inputs).logits, plain)


@WAYS
def test_a_copied_model_without_its_vlm(own_model, way):
    """It prunes, can be taken over by another VLM, and be detached there."""
    inputs = batch(samples())
    with torch.no_grad():
        plain = own_model(**inputs).logits
        vlm = tiny.attach(own_model, tiny.small_rcp(), repair=tiny.small_repair())
        pruned = own_model(**inputs).logits
        twin = way(own_model)
        assert torch.equal(twin(**inputs).logits, pruned)
        other = VLM(twin, None).attach(tiny.small_rcp(), keep=20)
        assert not torch.equal(twin(**inputs).logits, pruned)
        VLM(twin, None).detach()
        assert torch.equal(twin(**inputs).logits, plain)
        assert torch.equal(own_model(**inputs).logits, pruned)
    assert other.host.handles == []
    vlm.detach()


@WAYS
def test_a_model_that_was_pruned_can_be_copied(own_model, way):
    """Also after a forward, in which the library adds hooks of its own, which are not picklable."""
    vlm, inputs = tiny.attach(own_model, tiny.small_rcp()), batch(samples())
    forward(vlm, inputs)
    assert hooks(own_model) > hooks(vlm.detach().model) > 0
    twin = way(vlm)
    with torch.no_grad():
        found = twin.model(**inputs, output_hidden_states=True)
        expected = own_model(**inputs, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))


def test_a_copy_is_outside_of_the_session(own_model):
    """What a session records is its caller's, and what it records may have gradients, which can't be copied."""
    vlm = tiny.attach(own_model, tiny.small_rcp(), repair=tiny.small_repair())
    record = Record(keep_hidden=True)
    with vlm.using(Session(record=record, soft=True)):
        own_model(**batch(samples(), answers=2), use_cache=False)
        twin = copy.deepcopy(vlm)
    assert twin.host.session == Session()
    assert record.hidden[7].requires_grad


def test_a_copy_can_be_attached_and_saved_again(own_model, tmp_path):
    inputs, vlm = batch(samples()), tiny.attach(own_model, tiny.small_rcp(), repair=tiny.small_repair())
    expected = forward(vlm, inputs)[0]
    twin = pickle.loads(pickle.dumps(vlm))
    twin.save_pretrained(tmp_path)
    twin.detach().attach(tmp_path)
    assert torch.equal(forward(twin, inputs)[0], expected)


@pytest.mark.parametrize(("way", "positions"), product(COPY.values(), ["original", "renumbered"]))
def test_options_of_the_host_are_copied(own_model, way, positions):
    inputs = batch(samples())
    vlm = tiny.attach(own_model, tiny.small_rcp(), proportional_attention="count", positions=positions)
    expected = generate(vlm, inputs)
    assert torch.equal(generate(way(vlm), inputs).logits, expected.logits)


@WAYS
def test_a_pruned_cache_can_be_copied(pruned, way):
    """As a prompt's cache is, to ask it several questions."""
    inputs, question = batch(samples()), torch.randint(2, 50, (3, 5), generator=torch.Generator().manual_seed(7))
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())

    def ask(change: Callable):
        first = generate(vlm, inputs, tokens=3)
        cache = change(cache_of(first))
        ids = torch.cat([first.sequences, question], 1)
        mask = nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        if change is not _same:
            generate(
                vlm, turn, tokens=3, **{cache_keyword(vlm.model): cache_of(first)}
            )  # the original goes another way
        return generate(vlm, turn, tokens=3, **{cache_keyword(vlm.model): cache}).logits

    assert torch.equal(ask(way), ask(_same))


def _same(cache):
    return cache


@WAYS
def test_compiled_layers_of_a_copy_run_its_own_weights(own_model, uncompiled, way):
    """Nothing is really compiled here, which would take a minute; what would be run is."""
    inputs = batch(samples())
    vlm = tiny.attach(own_model, tiny.small_rcp(), repair=tiny.small_repair()).compile()
    expected = forward(vlm, inputs)[0]
    twin = way(vlm)
    assert torch.equal(forward(twin, inputs)[0], expected)
    with torch.no_grad():
        for parameter in twin.host.parts.layers[7].parameters():
            parameter.zero_()
    assert not torch.equal(forward(twin, inputs)[0], expected)
    assert torch.equal(forward(vlm, inputs)[0], expected)


def answers_elsewhere(models: list[nn.Module], pipe) -> None:
    """Run in a process that has never made a model or attached anything."""
    torch.set_num_threads(1)
    with torch.no_grad():
        pipe.send([model(**batch(samples())).logits.numpy() for model in models])


def test_another_process(own_model):
    """Attention is wrapped there too: FastV reads it, and proportional attention biases it."""
    context = torch.multiprocessing.get_context("spawn")
    other = tiny.build_model(seed=1)
    vlms = [
        tiny.attach(own_model, tiny.ROOT / "configs" / "pruners" / "fastv_repair.yaml", proportional_attention="count"),
        tiny.attach(other, tiny.ROOT / "configs" / "pruners" / "dcp_rcp.yaml"),
    ]
    with torch.no_grad():
        expected = [vlm.model(**batch(samples())).logits for vlm in vlms]
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answers_elsewhere, args=([own_model, other], sender))
    process.start()
    sender.close()  # so that a process that fails is an end of file here
    answers = receiver.recv()
    process.join()
    for found, logits in zip(answers, expected, strict=True):
        assert tiny.gap(torch.from_numpy(found), logits) <= 1e-6
