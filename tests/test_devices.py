"""A decoder spread over two devices answers as on one: `device_map`, with accelerate's hooks on the layers.

No machine of ours has two GPUs: the devices are this CPU under two names, see `two_devices.py`. What a GPU does beside
refusing to mix tensors (streams, copies that overlap, rounding of its own) is not run here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from two_devices import FIRST, SECOND, Devices, spread

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.devices import check_devices, check_tower
from lit_prune.host.lora import LoRA
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Full
from lit_prune.pruners.random import Random
from lit_prune.vlm import VLM, as_plugin, load

pytest.importorskip("accelerate")
HALVES = dict.fromkeys(range(7, 16), SECOND)
TURNS = dict.fromkeys(range(1, 16, 2), SECOND)  # a map that nobody would choose: every layer is another device's
METHODS = ["rcp", "fastv", "sparsevlm", "dcp", "dcp_proportional", "visionzip", "fastv_repair", "era_bias"]


def on_two(places: dict[int, torch.device]) -> VLM:
    """Micro-LLaVA with its decoder's layers on two devices, as `dispatch_model` leaves it."""
    vlm = load("micro")
    layers = {f"model.language_model.layers.{i}": places.get(i, FIRST) for i in range(16)}
    ends = {"": FIRST, "model.language_model.norm": SECOND, "lm_head": SECOND}
    spread(vlm.model, {**ends, **layers})
    return vlm


@pytest.fixture(scope="module")
def two() -> VLM:
    return on_two(TURNS)


@pytest.fixture(scope="module")
def one() -> VLM:
    return load("micro")


@pytest.fixture(scope="module")
def inputs(one) -> dict:
    """Two samples of different length, with the answers' labels."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 336, 336, 3), dtype=np.uint8)
    found = dict(one.encode(list(noise), ["Which colour?", "How many circles are there in the picture?"]))
    labels = torch.full_like(found["input_ids"], -100)
    labels[:, -3:] = found["input_ids"][:, -3:]
    return {**found, "labels": labels}


@contextmanager
def devices(vlm: VLM, one: VLM) -> Iterator[Devices | None]:
    """The two devices, for the model that is on them."""
    with nullcontext() if vlm is one else Devices() as found:
        yield found


def ran(vlm: VLM, one: VLM, inputs: dict, **session) -> tuple[torch.Tensor, Record, torch.Tensor]:
    """Logits, the record, and the tokens of an answer."""
    record = Record(keep_hidden=True, keep_embeds=True)
    prompts = {name: value for name, value in inputs.items() if name != "labels"}
    with devices(vlm, one), torch.no_grad():
        with vlm.using(Session(record=record, **session)):
            logits = vlm.model(**inputs, use_cache=False).logits
        assert {value.device for value in record.hidden.values()} == {inputs["input_ids"].device}
        record.trace.average_visual()
        with vlm.using(Session(**{name: value for name, value in session.items() if name != "soft"})):
            tokens = vlm.model.generate(**prompts, max_new_tokens=6, do_sample=False)
    return logits, record, tokens


def attached(vlm: VLM, one: VLM, plugin: Plugin | str, **options) -> VLM:
    with devices(vlm, one):
        return vlm.attach(plugin, keep=None if isinstance(plugin, Plugin) else 48, **options)


def equal(two: VLM, one: VLM, inputs: dict, **session) -> None:
    found, record, tokens = ran(two, one, inputs, **session)
    expected, known, answer = ran(one, one, inputs, **session)
    assert torch.equal(found, expected)
    assert torch.equal(tokens, answer)
    assert torch.equal(torch.stack(record.trace.visual), torch.stack(known.trace.visual))
    assert all(torch.equal(record.hidden[layer], known.hidden[layer]) for layer in known.hidden)


def test_the_two_devices_do_not_mix():
    """Else nothing here would mean anything."""
    with Devices() as found:
        there = torch.ones(2).to(SECOND)
        assert (there.device, found.moves) == (SECOND, 1)
        with pytest.raises(RuntimeError, match="mixes"):
            _ = torch.ones(2) + there


def test_keep_all_is_the_plain_model(two, one, inputs):
    """Of the plain model on two devices, bit for bit."""
    two.detach()
    with devices(two, one), torch.no_grad():
        plain = two.model(**inputs, use_cache=False).logits
    for pruner in (Full(), Random([3])):  # the latter's stage runs, and drops nothing
        attached(two, one, Plugin(pruner, keep=144))
        assert torch.equal(ran(two, one, inputs)[0], plain)


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_and_answer_what_they_do_on_one_device(method, two, one, inputs):
    for vlm in (two, one):
        torch.manual_seed(0)
        attached(vlm, one, method)
    equal(two, one, inputs)


def test_halves(one, inputs):
    """The usual map: one way, once."""
    halves = on_two(HALVES)
    for vlm in (halves, one):
        torch.manual_seed(0)
        attached(vlm, one, "rcp")
    equal(halves, one, inputs)


def test_renumbered_positions(two, one, inputs):
    for vlm in (two, one):
        attached(vlm, one, "fastv", positions="renumbered")
    equal(two, one, inputs)


def test_soft_masks_and_lora(two, one, inputs):
    """As a training of one's own has them; the adapters are where their layers are."""
    for vlm in (two, one):
        torch.manual_seed(0)
        plugin = as_plugin("rcp")
        plugin = Plugin(plugin.pruner, plugin.repair, 48, lora=LoRA())
        attached(vlm, one, plugin)
        for name, adapter in plugin.lora.adapters.items():
            torch.manual_seed(len(name))
            torch.nn.init.normal_(adapter.up, std=0.02)
    equal(two, one, inputs, soft=True)


def test_without_the_moves_devices_mix(two, one, inputs):
    attached(two, one, "fastv")
    two.host.devices = two.host.layers.devices = None
    with pytest.raises(RuntimeError, match="mixes"):
        ran(two, one, inputs)


def test_layers_that_must_be_together():
    with pytest.raises(
        LitPruneError, match="layer 2 reads the attention of layer 3, which is on cpu:1 and not on cpu:0"
    ):
        check_devices((FIRST, FIRST, FIRST, SECOND), {1: 1, 2: 3})
    parts = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta")]
    with pytest.raises(LitPruneError, match=r"spread over cpu, meta, .* keeps model.vision_tower together"):
        check_tower(parts)
