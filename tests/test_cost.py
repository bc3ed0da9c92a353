"""Prices against PyTorch's own counter, real caches and published figures."""

import pytest
import tiny
import torch
from tiny import PRUNERS, VISUAL, batch, forward, generate, samples
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from lit_prune import load
from lit_prune.cost.flops import decode, decoder_layer, decoder_total, kv_bytes, price
from lit_prune.cost.sizes import model_size
from lit_prune.cost.towers import tower_trace
from lit_prune.cost.trace import Trace, plan, step
from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.loading import shipped_config
from lit_prune.micro.world import VALIDATION_SEED, make_scene
from lit_prune.ops.budget import average
from lit_prune.pruners.base import Dims
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM

LLAVA = model_size(shipped_config("llava-hf/llava-1.5-7b-hf"))


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """The full square, for every query head: the CPU's fused attention is unknown to the counter and costs 0 there."""
    rows, heads, length, dim = query
    return 2 * rows * heads * length * key[2] * (dim + value[3])


def vector_flops(matrix, vector, *_, **__) -> int:
    """Of a matrix times a vector, which PyTorch's counter leaves out: scores of one sample's position codes."""
    return 2 * matrix[0] * matrix[1]


def counter() -> FlopCounterMode:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = {fused: attention_flops, torch.ops.aten.mv: vector_flops}
    return FlopCounterMode(display=False, depth=4, custom_mapping=own)


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
    if record.trace.tower is not None and len(record.trace.tower.stages) > 1:
        found.pop("vision")  # a stage between two layers: PyTorch counts its own arithmetic as the tower's
    agree(found, price(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair))


@pytest.fixture(scope="module")
def micro() -> VLM:
    return load("micro")


@pytest.mark.parametrize("keep", [48, 16, 4])
@pytest.mark.parametrize("path", PRUNERS, ids=lambda path: path.stem)
def test_every_shipped_method_on_the_shipped_model(micro, path, keep):
    """Where what a method adds is a tenth of all: an error of a percent of that would show."""
    try:
        micro.attach(path, keep=keep)
    except LitPruneError as error:
        if "can't be reached" not in str(error):
            raise
        pytest.skip("a decoder's first layers alone cost more")
    scene = make_scene(VALIDATION_SEED)
    inputs = {**micro.encode([scene.image()], [scene.questions({"colour": 1})[0].text]), "logits_to_keep": 1}
    record, regions = Record(), torch.rand(1, 2, 144, generator=torch.Generator().manual_seed(0))
    try:
        with counter() as counts, torch.no_grad(), micro.using(Session(record=record, hints={"regions": regions})):
            micro.model(**inputs)
        parts = price(record.trace, micro.size, micro.plugin.pruner, micro.plugin.repair)
    finally:
        micro.detach()
    assert parts["total"].item() == pytest.approx(counts.get_total_flops(), rel=5e-5)


def test_full_forward(pruned):
    vlm = pruned(PRUNERS[0])
    found, record = counted(vlm, {**batch(samples((50,))), "logits_to_keep": 1}, prune=False, repair=False)
    agree(found, price(record.trace, vlm.size))


def test_wide_scorer_and_adapter(pruned):
    """Plug-ins that weigh as much as the decoder: an error in their lines would show."""
    rcp = RCP(layers=[1, 3, 5], stage_ratios=[4.0, 2.0, 1.0], select="topk", inner=256)
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
    rcp, repair = RCP(layers=[1], stage_ratios=[1.0], inner=64), RepairAdapter([5, 7], [0, 0], code=32, condition=8)
    for part in (rcp, repair):
        part.build(dims)
    with counter() as counts:
        rcp.scorers[0](states, alive, text, torch.ones(1, words, dtype=torch.bool))
    price_of = rcp.flops(torch.tensor([visual]), torch.tensor([words]), width, torch.tensor([visual]))
    assert price_of.item() == pytest.approx(counts.get_total_flops(), rel=1e-3)
    with counter() as counts:
        essence = repair.essence(states, torch.arange(visual)[None], alive, torch.rand(1, visual).round())
    price_of = repair.context_flops(torch.tensor([visual]), torch.tensor([visual]), width)
    assert price_of.item() == pytest.approx(counts.get_total_flops(), rel=1e-3)
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
    cache = cache_of(generate(vlm, inputs, tokens=1))
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(record.trace, vlm.size, 4).tolist() == [real]


# -- LLaVA-1.5-7B ---------------------------------------------------------------------------------------------------
def tokens(count: float) -> torch.Tensor:
    return torch.tensor([count])


def test_llava_prefill_is_8_5_teraflops():
    """576 visual and 64 text tokens."""
    trace = plan({}, visual=576, text=64, depth=32)
    assert price(trace, LLAVA)["decoder"].item() == pytest.approx(8.504e12, rel=1e-4)
    assert kv_bytes(trace, LLAVA, 2).item() == pytest.approx(336e6, rel=2e-3)


def test_llava_on_the_meta_device():
    """The real shape without weights, counted by PyTorch: a prefill, then a step on its cache."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shipped_config("llava-hf/llava-1.5-7b-hf")).eval()
        ids, pixels = torch.zeros(1, 640, dtype=torch.long), torch.zeros(1, 3, 336, 336)
        with counter() as prefill:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        with counter() as step_counts:
            model(input_ids=ids[:, :1], use_cache=True, **{cache_keyword(model): cache_of(out)})
        with counter() as vision:
            model.get_image_features(pixels)
    trace = plan({}, visual=576, text=64, depth=32)
    parts, next_parts = price(trace, LLAVA), price(step(trace, 1), LLAVA)
    assert prefill.get_total_flops() == parts["decoder"] + parts["lm_head"]
    assert step_counts.get_total_flops() == next_parts["total"]
    assert vision.get_total_flops() == parts["vision"] + parts["projector"]


@pytest.mark.parametrize(("count", "teramacs"), [(576, 3.82), (192, 1.25), (128, 0.83), (64, 0.42)])
def test_papers_convention(count, teramacs):
    """Image tokens only, a multiply-add as one operation."""
    assert 32 * decoder_layer(LLAVA, tokens(count), tokens(count)).item() / 2e12 == pytest.approx(teramacs, abs=0.006)


def test_vision_tower_and_projector_of_llava():
    """CLIP-L/14 at 336 pixels: 24 layers of width 1024 over 577 tokens, one crop whatever the image's size."""
    parts = price(plan({}, visual=576, text=64, depth=32), LLAVA)
    layers = 24 * 577 * (24 * 1024 * 1024 + 4 * 577 * 1024)
    assert parts["vision"].item() == layers + 2 * 576 * 588 * 1024
    assert parts["projector"].item() == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert price(plan({}, visual=1152, text=64, depth=32), LLAVA)["vision"] == 2 * parts["vision"]


# Average, pruning layers, kept shares in % and the published reduction of FLOPs in % (RCP, arXiv 2604.04972).
RCP_7B = [
    (192, (4, 14, 24), (60.2, 7.5, 1.6), 63.3),
    (128, (4, 14, 24), (25.8, 4.1, 1.5), 75.0),
    (64, (1, 13, 25), (16.7, 4.6, 1.4), 85.7),
]


@pytest.mark.parametrize(("keep", "layers", "shares", "published"), RCP_7B)
def test_reductions_of_rcp(keep, layers, shares, published):
    """Reached with a short prompt, 22 text tokens; `docs/cost.md` has the rest of the story."""
    schedule = {layer: round(576 * share / 100) for layer, share in zip(layers, shares, strict=True)}
    full, pruned = (price(plan(s, visual=576, text=22, depth=32), LLAVA)["decoder"] for s in ({}, schedule))
    assert 100 * (1 - pruned / full).item() == pytest.approx(published, abs=0.5)
    assert average(schedule, 576, 32) == pytest.approx(keep, abs=4.2)


# -- Schedules and decoding -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
def test_a_plan_is_what_runs(pruned, pruner):
    """The trace written from a schedule has the price of the one that a forward leaves, without a bias of sizes."""
    vlm = pruned(pruner, proportional_attention="none")
    inputs = batch(samples((50,)))
    _, record = forward(vlm, inputs)
    plugin, before = vlm.plugin, 2
    made = plan(
        plugin.pruner.schedule(tiny.KEEP, VISUAL, tiny.DEPTH), VISUAL, 50 - VISUAL, tiny.DEPTH, plugin.pruner,
        plugin.repair, question=50 - VISUAL - before,
    )  # fmt: skip
    if plugin.pruner.tower is not None:
        made.tower = tower_trace(vlm.model.config, plugin.pruner, tiny.KEEP, patches=36)
    planned, ran = (price(trace, vlm.size, plugin.pruner, plugin.repair) for trace in (made, record.trace))
    assert {part: flops.item() for part, flops in planned.items()} == {part: f.item() for part, f in ran.items()}


def test_decoding_is_priced_step_by_step(pruned):
    """Five steps of stock `generate()` on a pruned cache, with repair, to the last FLOP."""
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    inputs, record = batch(samples((50,))), Record()
    forward(vlm, inputs, record=record)
    with counter() as short:
        generate(vlm, inputs, tokens=1)
    with counter() as long:
        out = generate(vlm, inputs, tokens=6)
    parts = decode(record.trace, vlm.size, 5, vlm.plugin.repair)
    assert parts["repair"].item() == 5 * price(step(record.trace, 3), vlm.size, repair=vlm.plugin.repair)["repair"]
    assert parts["total"].item() == long.get_total_flops() - short.get_total_flops()
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(out).layers)
    assert kv_bytes(step(record.trace, 5), vlm.size, 4).tolist() == [real]
    assert decode(record.trace, vlm.size, 0)["total"].item() == 0


def test_decoding_is_the_sum_of_its_steps():
    trace = plan({2: 64}, visual=576, text=64, depth=32)
    steps = sum(price(step(trace, index), LLAVA)["total"].item() for index in range(1, 8))
    assert decode(trace, LLAVA, 7)["total"].item() == steps


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
