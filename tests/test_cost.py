"""Prices against PyTorch's own counter, real caches and published figures."""

import pytest
import tiny
import torch
from tiny import PRUNERS, VISUAL, batch, forward, generate, samples
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from lit_prune.cost import ModelSize, Trace, decoder_layer, decoder_total, kv_bytes, plan, price
from lit_prune.host import Record, Session
from lit_prune.host.sizes import model_size
from lit_prune.pruners.base import Dims
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter

LLAVA = ModelSize(width=4096, depth=32, heads=32, key_heads=32, head_dim=128, mlp=11008, vocab=32064)


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """The full square, for every query head: the CPU's fused attention is unknown to the counter and costs 0 there."""
    rows, heads, length, dim = query
    return 2 * rows * heads * length * key[2] * (dim + value[3])


def counter() -> FlopCounterMode:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, depth=4, custom_mapping={fused: attention_flops})


def counted(vlm, inputs, **session) -> tuple[dict[str, int], Record]:
    """FLOPs by PyTorch's counter: in all, and of the modules that are lines of their own."""
    with counter() as counts:
        _, record = forward(vlm, inputs, **session)
    parts = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counts.get_flop_counts().items()}
    return {
        "total": counts.get_total_flops(),
        "vision": parts["vision_tower"],
        "projector": parts["multi_modal_projector"],
        "lm_head": parts["lm_head"],
    }, record


def agree(found: dict[str, int], parts: dict[str, torch.Tensor]) -> None:
    for name, flops in found.items():
        assert parts[name].item() == pytest.approx(flops, rel=1e-3), name


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
def test_pruned_forward(pruned, pruner):
    """Each method with repair."""
    vlm = pruned(pruner)
    found, record = counted(vlm, {**batch(samples((50,))), "logits_to_keep": 1})
    assert record.trace.repaired.tolist() == [1]
    agree(found, price(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair))


def test_full_forward(pruned):
    vlm = pruned(PRUNERS[0])
    found, record = counted(vlm, {**batch(samples((50,))), "logits_to_keep": 1}, prune=False, repair=False)
    agree(found, price(record.trace, vlm.size))


def test_wide_scorer_and_adapter(pruned):
    """Plug-ins that weigh as much as the decoder: an error in their lines would show."""
    rcp = RCP(layers=[1, 3, 5], shape=[4.0, 2.0, 1.0], select="topk", inner=512)
    repair = RepairAdapter([5, 7], [1, 2], bottleneck=512, condition=256, code=64)
    vlm = pruned(rcp, repair=repair)
    inputs = batch(samples((50,)), answers=6)
    found, record = counted(vlm, inputs)
    parts = price(record.trace, vlm.size, rcp, repair, lm_rows=50)
    assert record.trace.repaired.tolist() == [6]
    assert parts["pruner"] > 0.1 * parts["total"]
    assert parts["repair"] > 0.1 * parts["total"]
    agree(found, parts)


def test_each_part_alone():
    """Small parts too, which an error would not show in a whole forward."""
    width, visual, words, rows = 64, 36, 11, 5
    dims, states = Dims(width, 8, visual), torch.randn(1, visual, width)
    alive, text = torch.ones(1, visual, dtype=torch.bool), torch.randn(1, words, width)
    rcp, repair = RCP(layers=[1], shape=[1.0], inner=64), RepairAdapter([5, 7], [0, 0], code=32, condition=8)
    for part in (rcp, repair):
        part.build(dims)
    with counter() as counts:
        rcp.scorers[0](states, alive, text, torch.ones(1, words, dtype=torch.bool))
    price_of = rcp.flops(torch.tensor([visual]), torch.tensor([words]), width)
    assert price_of.item() == pytest.approx(counts.get_total_flops(), rel=1e-3)
    with counter() as counts:
        essence = repair.essence(states, torch.arange(visual)[None], alive, torch.rand(1, visual).round())
    price_of = repair.context_flops(torch.tensor([visual]), torch.tensor([visual]), width)
    unknown = 2 * visual * 32  # codes by one query: the counter doesn't know a matrix by a vector
    assert price_of.item() == pytest.approx(counts.get_total_flops() + unknown, rel=1e-3)
    with counter() as counts:
        for adapter in range(2):
            repair(torch.randn(1, rows, width), essence, torch.ones(1, rows, dtype=torch.bool), adapter)
    assert repair.adapter_flops(torch.tensor([rows]), width).item() == pytest.approx(counts.get_total_flops(), rel=1e-3)


def test_text_only_forward(pruned):
    vlm = pruned(PRUNERS[0])
    with counter() as counts:
        _, record = forward(vlm, {**batch(samples((20,), (False,))), "logits_to_keep": 1})
    parts = price(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair)
    assert parts["total"].item() == pytest.approx(counts.get_total_flops(), rel=1e-3)
    assert parts["vision"].item() == 0


def test_parts_add_up_and_padding_is_free(pruned):
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    prompts = samples()
    _, together = forward(vlm, batch(prompts))
    parts = price(together.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair)
    torch.testing.assert_close(sum(v for k, v in parts.items() if k != "total"), parts["total"])
    for row, sample in enumerate(prompts):
        _, alone = forward(vlm, batch([sample]))
        lone = price(alone.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair)
        assert lone["total"].item() == parts["total"][row].item()


def test_soft_masks_cost_what_dropping_would(pruned):
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    prices = []
    for soft in (False, True):
        _, record = forward(vlm, batch(samples()), soft=soft)
        prices.append(decoder_total(price(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair)))
    # Own attention rows are read over the columns present, which in soft mode are more.
    torch.testing.assert_close(prices[0], prices[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
def test_cache_bytes_are_those_of_the_cache(pruned, pruner):
    vlm = pruned(pruner)
    inputs, record = batch(samples((50,))), Record()
    forward(vlm, inputs, record=record)
    cache = generate(vlm, inputs, tokens=1).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(record.trace, vlm.size, 4).tolist() == [real]


# -- LLaVA-1.5-7B ---------------------------------------------------------------------------------------------------


def tokens(count: float) -> torch.Tensor:
    return torch.tensor([count])


def test_llava_prefill_is_8_5_teraflops():
    """576 visual and 64 text tokens; the same as the counter gives on the meta device."""
    trace = Trace(queries=[tokens(640)] * 32, keys=[tokens(640)] * 32, visual=[tokens(576)] * 32)
    assert price(trace, LLAVA)["decoder"].item() == pytest.approx(8.504e12, rel=1e-4)
    assert kv_bytes(trace, LLAVA, 2).item() == pytest.approx(336e6, rel=2e-3)


@pytest.mark.parametrize(("count", "teramacs"), [(576, 3.82), (192, 1.25), (128, 0.83), (64, 0.42)])
def test_papers_convention(count, teramacs):
    """Image tokens only, a multiply-add as one operation."""
    assert 32 * decoder_layer(LLAVA, tokens(count), tokens(count)).item() / 2e12 == pytest.approx(teramacs, abs=0.006)


def test_vision_tower_and_projector_of_llava():
    """CLIP-L/14 at 336 pixels: 24 layers of width 1024 over 577 tokens, one crop whatever the image's size."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    size = model_size(LlavaConfig(vision_config=vision, text_config=LlamaConfig()))
    parts = price(plan({}, visual=576, text=64, depth=32), size)
    layers = 24 * 577 * (24 * 1024 * 1024 + 4 * 577 * 1024)
    assert parts["vision"].item() == layers + 2 * 576 * 588 * 1024
    assert parts["projector"].item() == 2 * 576 * (1024 * 4096 + 4096 * 4096)


def test_trace_averages_over_layers():
    trace = Trace(visual=[tokens(576)] * 2 + [tokens(30)] * 30)
    assert trace.average_visual().item() == pytest.approx((2 * 576 + 30 * 30) / 32)


def test_recording_is_of_the_first_forward_only(pruned):
    vlm = pruned(PRUNERS[0])
    record = Record()
    with vlm.using(Session(hints=tiny.hints(3), record=record)):
        for _ in range(2):
            with torch.no_grad():
                vlm.model(**batch(samples()))
    assert len(record.trace.queries) == tiny.DEPTH
    assert record.trace.total_visual.tolist() == [VISUAL] * 3
