"""The delayed repair adapter: what it reads, what it changes, what it weighs."""

import pytest
import tiny
import torch
from tiny import KEEP, VISUAL, batch, forward, samples

from lit_prune import repair as repair_module
from lit_prune.errors import LitPruneError
from lit_prune.pruners.base import Dims
from lit_prune.repair import Adapter, RepairAdapter

DIMS = Dims(width=6, depth=8, visual=5)


@pytest.fixture(params=["published", "first"])
def repair(request):
    torch.manual_seed(0)
    module = RepairAdapter([6], [0], bottleneck=7, condition=3, code=4, form=request.param)
    module.build(DIMS)
    tiny.shake(module)
    return module


def test_adapter_equals_its_formula():
    torch.manual_seed(0)
    adapter = Adapter(6, 7, 3, 0.1)
    tiny.shake(adapter)
    states, essence = torch.randn(2, 4, 6), torch.randn(2, 3)
    condition = essence[:, None] + adapter.query(states)
    inner = adapter.gamma(condition) + 1
    inner = inner * torch.nn.functional.gelu(adapter.down(states)) + adapter.beta(condition)
    torch.testing.assert_close(adapter(states, essence), adapter.alpha * adapter.up(inner))


def test_adapter_starts_without_conditioning():
    adapter = Adapter(6, 7, 3, 0.1)
    states = torch.randn(2, 4, 6)
    start = 0.1 * adapter.up(torch.nn.functional.gelu(adapter.down(states)))
    torch.testing.assert_close(adapter(states, torch.randn(2, 3)), start)


def test_essence_equals_its_formula(repair):
    """Where: pooled codes of kept tokens. What: mean state of the tokens that this stage prunes."""
    states = torch.randn(1, 4, 6)
    ordinal, alive = torch.tensor([[0, 2, 3, 4]]), torch.tensor([[True, True, True, False]])
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    where, what = repair.essence(states, ordinal, alive, gate)
    codes = repair.codes * torch.tensor([1.0, 0, 0, 1, 0])[:, None]
    scale = 0.5 if repair.form == "published" else 1.0  # 1 / sqrt(4)
    pooled = (codes @ repair.code_query * scale).softmax(0) @ codes
    torch.testing.assert_close(where[0], repair.where(pooled))
    torch.testing.assert_close(what[0], repair.what(states[0, 1]))


def essence_by_places(repair, gate, total):
    """e_mask for one sample whose tokens are all there."""
    tokens = gate.shape[0]
    alive = torch.ones(1, tokens, dtype=torch.bool)
    return repair.essence(torch.zeros(1, tokens, 6), torch.arange(tokens)[None], alive, gate[None], total)[0]


def test_tokens_share_position_codes_by_their_place(repair):
    """Five codes: of ten tokens two share one by their mean; of three, at places 0, 1 and 3, the gaps repeat them."""
    gate = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    expected = essence_by_places(repair, gate.view(5, 2).mean(1), None)
    assert torch.equal(essence_by_places(repair, gate, torch.tensor([10])), expected)
    stretched = essence_by_places(repair, torch.tensor([1.0, 0, 0, 1, 1]), None)
    assert torch.equal(essence_by_places(repair, torch.tensor([1.0, 0, 1]), torch.tensor([3])), stretched)
    seven = torch.tensor([1.0, 1, 0, 1, 1, 0, 1])  # places 0, 0, 1, 2, 2, 3, 4 of seven tokens
    expected = essence_by_places(repair, torch.tensor([1.0, 0, 1, 0, 1]), None)
    assert torch.equal(essence_by_places(repair, seven, torch.tensor([7])), expected)


def test_as_many_tokens_as_codes_change_nothing(repair):
    gate = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(essence_by_places(repair, gate, torch.tensor([5])), essence_by_places(repair, gate, None))


def test_essence_ignores_filler(repair):
    states = torch.randn(1, 3, 6)
    ordinal, alive, gate = torch.tensor([[1, 2, 4]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.0, 1, 1]])
    plain = repair.essence(states, ordinal, alive, gate)
    padded = repair.essence(
        torch.cat([states, torch.randn(1, 2, 6)], 1),
        torch.cat([ordinal, torch.zeros(1, 2, dtype=torch.long)], 1),
        torch.cat([alive, torch.zeros(1, 2, dtype=torch.bool)], 1),
        torch.cat([gate, torch.ones(1, 2)], 1),
    )
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b)


def test_essence_passes_gradients_to_the_gate(repair):
    gate = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    where, what = repair.essence(torch.randn(1, 3, 6), torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool), gate)
    assert (torch.autograd.grad((where + what).sum(), gate)[0] != 0).all()


def test_a_stage_sums_what_it_prunes_once(pruned, monkeypatch):
    """Also one that feeds an adapter and isn't the last, as its price says."""
    summed, add = [], repair_module._add_lost
    monkeypatch.setattr(repair_module, "_add_lost", lambda *given: summed.append(1) or add(*given))
    vlm = pruned(tiny.small_rcp(), repair=RepairAdapter([6, 7], [1, 2], bottleneck=8, condition=6, code=4))
    forward(vlm, batch(samples()))
    assert len(summed) == len(vlm.host.stages)


def test_only_gated_positions_change(repair):
    states = torch.randn(2, 5, 6)
    gate = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    essence = (torch.randn(2, 3), torch.randn(2, 3))
    repaired = repair(states, essence, gate, 0)
    assert torch.equal(repaired[~gate], states[~gate])
    change = repair.adapters[0](states, sum(essence))
    torch.testing.assert_close(repaired[gate], (states + change)[gate])


@pytest.mark.parametrize("side", ["left", "right"])
def test_host_repairs_what_predicts_answers(pruned, side):
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    inputs = batch(samples(), side, answers=4)
    repaired, _ = forward(vlm, inputs)
    bare, _ = forward(vlm, inputs, repair=False)
    predicts = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    changed = (repaired != bare).any(-1)
    assert changed[predicts].all()
    before = (predicts.cumsum(1) == 0) & tiny.real_text(inputs)
    assert not changed[before].any(), "the last repair layer's output is read by no earlier position"


def test_keeping_all_prunes_nothing_to_repair(pruned):
    """e_pruned of no tokens is the projection of zero, not NaN."""
    vlm = pruned(tiny.small_rcp(), keep=VISUAL, repair=tiny.small_repair())
    logits, _ = forward(vlm, batch(samples()))
    assert logits.isfinite().all()


# -- bad input ------------------------------------------------------------------------------------------------------
def test_repair_before_its_stage():
    with pytest.raises(LitPruneError, match="repair layer 3 is fed by pruning layer 5, which comes later"):
        RepairAdapter([3], [1]).feeds((1, 5), 8)


def test_repair_outside_the_model():
    with pytest.raises(LitPruneError, match="repair layer 29 is outside the model: its decoder has 8 layers"):
        RepairAdapter([29], [0]).feeds((1,), 8)


def test_repair_of_a_stage_that_is_not_there():
    with pytest.raises(LitPruneError, match="repair layer 7 reads pruning stage 2, but there are 1 stages"):
        RepairAdapter([7], [2]).feeds((1,), 8)


def test_two_adapters_on_one_layer():
    """As written, or where a shallower decoder brings them together: one of them would be left out."""
    for layers, depth in (([6, 6], None), ([12, 13], 32)):
        with pytest.raises(LitPruneError, match="give each adapter a layer of its own"):
            RepairAdapter(layers, [0, 0], depth=depth).feeds((1,), 8)


def test_one_stage_per_repair_layer():
    with pytest.raises(LitPruneError, match="one feeding stage each"):
        RepairAdapter([6, 7], [0])


def test_layers_move_with_the_depth():
    assert RepairAdapter([22, 29], [1, 2], depth=32).feeds((1, 6, 12), 16) == {11: (0, 1), 14: (1, 2)}


def test_attaching_refuses_too(pruned):
    with pytest.raises(LitPruneError, match="comes later"):
        pruned(tiny.small_rcp(), keep=KEEP, repair=RepairAdapter([2], [2]))
