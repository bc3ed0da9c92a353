"""Samples that share rows inside the decoder's layers: the same states, losses and gradients as one row each."""

import pytest
import tiny
import torch
from families import FAMILIES, collate, prompts
from tiny import ROOT, batch, gap, samples

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.kinds import Kind
from lit_prune.host.masks import Masks
from lit_prune.host.packing import Layout, check_packable, layout
from lit_prune.training.losses import LossWeights
from lit_prune.training.step import StepKey
from lit_prune.vlm import plugin_from_yaml

LENGTHS, PICTURED = (45, 52, 12, 80, 44, 9), (True, True, False, True, True, False)
METHODS = ("fastv", "divprune", "sparsevlm", "pyramiddrop", "dart", "dcp_rcp", "rcp")


@pytest.fixture(scope="module")
def inputs():
    return batch(samples(LENGTHS, PICTURED), side="right", answers=3)


def states(vlm, inputs, **session):
    """Answer logits, the record, and how many rows each layer ran over."""
    rows, record = [], Record(keep_hidden=True)
    layers = vlm.host.parts.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0])) for layer in layers]
    torch.manual_seed(4)
    with vlm.using(Session(record=record, answers_only=True, watch=(6,), **session)):
        logits = vlm.model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, record, rows


@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_unpacked_for_every_kind_of_method(pruned, inputs, method, soft):
    """A text of nine tokens beside an image, a mask by stage, rows read from their own and from the layer before."""
    vlm = pruned(ROOT / f"configs/pruners/{method}.yaml", proportional_attention="count" if method == "dart" else None)
    vlm.plugin.train()
    found = []
    for pack in (False, True):
        logits, record, rows = states(vlm, inputs, soft=soft, pack=pack)
        weights = list(vlm.plugin.parameters())
        loss = (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
        found.append((logits, record, rows, torch.autograd.grad(loss, weights, allow_unused=True)))
    (plain, one, rows, grads), (packed, other, fewer, packed_grads) = found
    assert gap(plain, packed) < 1e-4, "logits are of standard deviation 1.6"
    assert set(rows) == {len(LENGTHS)}
    assert fewer[0] == (3 if method == "divprune" and not soft else 4), (
        "45 + 12 + 9, 52, 80, 44; fewer tokens where layer 0 prunes"
    )
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(one.stages, other.stages, strict=True))
    assert all(gap(a, other.hidden[layer]) < 1e-4 * a.std() for layer, a in one.hidden.items())
    assert gap(one.attention[6], other.attention[6]) < 1e-5
    assert one.trace.average_visual().equal(other.trace.average_visual())
    for a, b in zip(grads, packed_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or gap(a, b) <= 1e-3 * max(1.0, a.abs().max().item())


def test_a_mask_that_kept_samples_apart_no_longer_would_show(pruned, inputs, monkeypatch):
    vlm = pruned(ROOT / "configs/pruners/rcp.yaml")
    plain, *_ = states(vlm, inputs)
    whole = property(lambda self: torch.ones(len(self.source), 1, *[self.source.shape[1]] * 2, dtype=torch.bool).tril())
    monkeypatch.setattr(Layout, "allowed", whole)
    assert gap(plain, states(vlm, inputs, pack=True)[0]) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_packed(name):
    family = FAMILIES[name]
    vlm = tiny.attach(family.build(), plugin_from_yaml(ROOT / "configs/pruners/fastv.yaml").pruner, 12)
    several = collate(family, prompts(family), answers=3)
    assert gap(states(vlm, several, pack=True)[0], states(vlm, several)[0]) < 1e-4


@pytest.mark.parametrize("kind", [Kind(window=4), Kind(attends=False, recurrent=True), Kind(given=True), Kind(chunk=8)])
def test_layers_that_would_mix_samples_are_refused(tiny_model, kind):
    masks = Masks(tiny_model.config.text_config, (Kind(), kind))
    with pytest.raises(LitPruneError, match=r"^data\.pack: this model has layers \[1\] .* data\.pack: false$"):
        check_packable(masks)


def test_tokens_are_laid_out_in_as_few_rows_as_fit():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    found = layout(valid, [2, 4, 1, 1], one_row=False)
    assert found.sample.tolist() == [[1, 1, 1, 1], [0, 0, 2, 3]]
    assert found.source.tolist() == [[4, 5, 6, 7], [2, 3, 8, 13]]
    values = torch.arange(16.0).view(4, 4)
    assert torch.equal(found.unfold(found.fold(values))[valid], values[valid])
    assert found.allowed[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    flash = layout(valid, [2, 4, 1, 1], one_row=True)
    assert flash.source.shape == (1, 8)
    arguments = flash.arguments({"position_ids": torch.zeros(4, 4)}, values, flash=True)
    assert arguments["cu_seq_lens_q"].tolist() == [0, 4, 6, 7, 8]
    assert arguments["max_length_k"] == 4
    assert layout(torch.ones(2, 4, dtype=torch.bool), [4, 4], one_row=False) is None


def test_eager_attention_is_refused(tiny_eager):
    vlm = tiny.attach(tiny_eager, ROOT / "configs/pruners/divprune.yaml")
    try:
        with pytest.raises(LitPruneError, match=r"data\.pack needs sdpa or flash attention, and this model has eager"):
            states(vlm, batch(samples()), pack=True)
    finally:
        vlm.detach()


@pytest.mark.parametrize("mode", ["soft", "drop"])
def test_a_training_step_has_the_same_losses_packed(student, world, mode):
    """Over real questions of the micro world, of two lengths, through the option of the data module."""
    module = student(train_mode=mode, loss=LossWeights(attention=1.0), watch=[8])
    data = world(pack=True)
    assert data.pack
    data.prepare_data()
    data.setup("fit")
    items = next(iter(data.train_dataloader()))
    items["inputs"]["attention_mask"][0, -3:] = 0  # a shorter sample
    steps = [module.train().step({**items, "pack": pack}, StepKey(3, 0.5)) for pack in (False, True)]
    for name, value in steps[0].losses.items():
        assert steps[1].losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
