"""The battery of `test_equality.py` on tiny models of every family, their samples differing in visual tokens."""

import copy
import re
from collections.abc import Callable
from functools import lru_cache

import pytest
import tiny
import torch
from families import FAMILIES, IMAGE, KEEP, METHODS, VIDEO, Family, Picture, collate, prompt, prompts
from test_equality import (
    assisted_decoding_equals_greedy,
    cached_decoding_equals_recomputation,
    dialogue_equals_one_forward,
    generate_plain,
    keep_all_is_the_plain_model,
    recomputed,
    second_turn,
)
from tiny import DEPTH, PAD, forward, gap, generate
from torch import Tensor
from transformers import StaticCache

from lit_prune.errors import LitPruneError
from lit_prune.host import DecoderHost, Record, Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.ops.budget import average
from lit_prune.pruners.full import Full
from lit_prune.pruners.random import Random
from lit_prune.pruners.uniform import Uniform
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("name", FAMILIES)
METHOD = pytest.mark.parametrize("method", METHODS)
TOLERANCE = 5e-4  # in fp32; the sequences are twice as long as those of test_equality.py
MROPE = pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])


def by_turns(option: str, *values):
    """Every method on every family, with one value of an option after the other."""
    pairs = [(i + j, name, method) for i, name in enumerate(FAMILIES) for j, method in enumerate(METHODS)]
    cases = [(name, method, values[turn % len(values)]) for turn, name, method in pairs]
    return pytest.mark.parametrize(f"name, method, {option}", cases)


@lru_cache
def built(name: str):
    """The family's model; read-only."""
    return FAMILIES[name].build()


@pytest.fixture
def attach(pruned) -> Callable[..., VLM]:
    """Attaches a method to a family's model until the next one or the end of the test."""

    def make(name: str, method: str = "rcp", keep: int = KEEP, model=None, **options) -> VLM:
        pruner, repair = METHODS[method]
        return pruned(pruner(), keep, repair(), model=model or built(name), **options)

    return make


def cache_options(vlm: VLM, static: bool) -> dict:
    """Options of `generate()` for a cache of a fixed number of columns, or for the usual one."""
    if not static:
        return {}
    made = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=256)
    return {cache_keyword(vlm.model): made, "disable_compile": True}


def text(inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    return inputs["attention_mask"].bool() & (ids != IMAGE) & (ids != VIDEO)


def assert_alone_equals_batch(vlm: VLM, family: Family, samples: list, tokens: int = 5, **options) -> None:
    together = generate(vlm, collate(family, samples), tokens, **options)
    for row, sample in enumerate(samples):
        alone = generate(vlm, collate(family, [sample]), tokens, **options)
        assert alone.sequences[0, -tokens:].tolist() == together.sequences[row, -tokens:].tolist()


# -- keep-all, drop and mask ----------------------------------------------------------------------------------------
@EVERY
@METHOD
def test_keep_all_without_repair_strength_is_the_plain_model(attach, name, method):
    samples = prompts(FAMILIES[name])
    inputs = collate(FAMILIES[name], samples[::2] if name == "llava-1.5" else samples)  # one image, so that keep fits
    all_of_it = 36 if name == "llava-1.5" else 1000
    record = keep_all_is_the_plain_model(built(name), lambda: attach(name, method, keep=all_of_it), inputs, 5)
    assert all(torch.equal(stage.kept.sum(1), record.trace.total_visual) for stage in record.stages)


@by_turns("side", "left", "right")
def test_dropping_equals_masking_at_the_same_budget(attach, name, method, side):
    """And the budget of every sample is spent exactly, whatever its images."""
    inputs = {**collate(FAMILIES[name], prompts(FAMILIES[name]), side, answers=3), "use_cache": False}
    vlm = attach(name, method)
    dropped, hard = forward(vlm, inputs)
    masked, soft = forward(vlm, inputs, soft=True)
    for one, other in zip(hard.stages, soft.stages, strict=True):
        assert torch.equal(one.kept, other.kept)
    real = text(inputs)
    assert gap(dropped[real], masked[real]) <= TOLERANCE
    totals = hard.trace.total_visual.tolist()
    planned = [average(vlm.plugin.pruner.plan(KEEP, n, DEPTH), n, DEPTH) for n in totals]
    assert hard.trace.average_visual().tolist() == soft.trace.average_visual().tolist() == pytest.approx(planned)
    assert planned == pytest.approx([KEEP] * 3, abs=0.4), "within what whole counts allow"
    assert gap(dropped[real], forward(vlm, inputs, prune=False, repair=False)[0][real]) > 0.3


@EVERY
def test_backward_over_kept_rows_gives_the_same_gradients(attach, name):
    vlm, found = attach(name), []
    inputs = {**collate(FAMILIES[name], prompts(FAMILIES[name]), answers=3), "use_cache": False}
    vlm.plugin.train()
    for backward in ("all", "kept"):
        torch.manual_seed(1)
        with vlm.using(Session(soft=True, backward=backward, answers_only=True, eps=1e-12)):
            logits = vlm.model(**inputs).logits
        found.append(torch.autograd.grad(logits.square().sum(), list(vlm.plugin.parameters()), allow_unused=True))
    pairs = [pair for pair in zip(*found, strict=True) if pair[0] is not None]
    assert not all(torch.equal(one, other) for one, other in pairs), "the other way"
    assert all((one - other).norm() <= 1e-4 * one.norm() + 1e-4 for one, other in pairs)


@EVERY
def test_dropping_equals_masking_in_double_precision(attach, name):
    family = FAMILIES[name]
    inputs = {**collate(family, prompts(family), answers=3), "use_cache": False}
    inputs = {key: value.double() if key.startswith("pixel") else value for key, value in inputs.items()}
    vlm = attach(name, model=family.build().double())
    dropped, masked = forward(vlm, inputs)[0], forward(vlm, inputs, soft=True, eps=1e-30)[0]
    real = text(inputs)
    assert gap(dropped[real], masked[real]) <= 1e-5  # norms and repair stay in fp32


# -- caches ---------------------------------------------------------------------------------------------------------
@EVERY
@METHOD
def test_cached_decoding_equals_recomputation(attach, name, method):
    """By labels, by `generate()` without a cache, and with one of a fixed number of columns."""
    inputs = collate(FAMILIES[name], prompts(FAMILIES[name]))
    vlm = attach(name, method)
    out = cached_decoding_equals_recomputation(vlm, inputs, 5, TOLERANCE)
    assert gap(recomputed(vlm, inputs, out, repair=False), out.logits) > 0.05, "repair took no part"
    uncached = generate(vlm, inputs, 5, use_cache=False)
    assert uncached.sequences.tolist() == out.sequences.tolist()
    assert gap(uncached.logits, out.logits) <= TOLERANCE


@by_turns("static", False, True)
def test_second_turn_on_the_pruned_cache(attach, name, method, static):
    family, vlm = FAMILIES[name], attach(name, method)
    question = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(7))
    inputs = collate(family, prompts(family))
    out = dialogue_equals_one_forward(vlm, inputs, question, TOLERANCE, tokens=4, **cache_options(vlm, static))
    for row, sample in enumerate(prompts(family)):
        options = {"tokens": 4, **cache_options(vlm, static)}
        alone, _ = second_turn(vlm, collate(family, [sample]), question[row : row + 1], **options)
        assert alone.sequences[0, -4:].tolist() == out.sequences[row, -4:].tolist()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3-vl"])
def test_second_turn_on_a_cache_pruned_at_layer_0(pruned, name, static):
    """The library counts columns by layer 0; with M-RoPE its positions don't count them either."""
    family, question = FAMILIES[name], torch.randint(2, 50, (1, 6), generator=torch.Generator().manual_seed(7))
    vlm = pruned(Random([0, 4]), KEEP, METHODS["text attention"][1](), model=built(name))
    inputs = collate(family, prompts(family)[1:2])
    dialogue_equals_one_forward(vlm, inputs, question, TOLERANCE, tokens=4, **cache_options(vlm, static))


def test_an_image_in_a_later_turn_has_a_budget_of_its_own(attach):
    """With nothing to prune the dialogue is the plain model's; else each turn's image is pruned by itself."""
    family, model = FAMILIES["llava-1.5"], built("llava-1.5")
    first = collate(family, [prompt(family, [Picture((24, 24), 1)], 5, 1)])
    second = collate(family, [prompt(family, [Picture((24, 24), 2)], 6, 2)])

    def dialogue(run):
        one = run(first)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        turn = {"input_ids": ids, "pixel_values": second["pixel_values"], cache_keyword(model): cache_of(one)}
        return run(turn)

    expected = dialogue(lambda inputs: generate_plain(model, inputs, 4))
    vlm = attach("llava-1.5", keep=36)
    for adapter in vlm.plugin.repair.adapters:
        adapter.alpha.data.zero_()
    same = dialogue(lambda inputs: generate(vlm, inputs, 4))
    assert torch.equal(same.sequences, expected.sequences)
    vlm = attach("llava-1.5", keep=12)
    cache = cache_of(dialogue(lambda inputs: generate(vlm, inputs, 4)))
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    kept = vlm.host.schedule[6]
    assert lengths[0] - lengths[7] == 2 * (36 - kept)


@EVERY
@METHOD
def test_assisted_decoding_equals_greedy(attach, name, method):
    assisted_decoding_equals_greedy(attach(name, method), collate(FAMILIES[name], prompts(FAMILIES[name])[:1]), 12)


# -- batches --------------------------------------------------------------------------------------------------------
@EVERY
@METHOD
def test_generation_of_a_batch_equals_its_samples_alone(attach, name, method):
    family = FAMILIES[name]
    samples = [*prompts(family), prompt(family, [], 9, 5)]
    assert_alone_equals_batch(attach(name, method), family, samples)


@EVERY
def test_beams_of_a_batch_equal_the_beams_of_its_samples(attach, name):
    """Also where each step feeds the whole sequence again."""
    family, vlm = FAMILIES[name], attach(name)
    assert_alone_equals_batch(vlm, family, prompts(family), 4, num_beams=3)
    inputs = collate(family, prompts(family))
    cached, uncached = (generate(vlm, inputs, 4, num_beams=3, use_cache=cache) for cache in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()


@EVERY
def test_sampling_with_a_seed_equals_recomputation(attach, name):
    inputs = collate(FAMILIES[name], prompts(FAMILIES[name]))
    vlm = attach(name)
    torch.manual_seed(0)
    out = generate(vlm, inputs, 4, do_sample=True, temperature=0.8)
    assert not torch.equal(out.sequences, generate(vlm, inputs, 4).sequences)
    assert gap(recomputed(vlm, inputs, out), out.logits) <= TOLERANCE


# -- training -------------------------------------------------------------------------------------------------------
@EVERY
@pytest.mark.parametrize("soft", [True, False])
def test_training_step_reaches_every_plugin(attach, name, soft):
    """Of the pruner and the repair; nothing of the model itself."""
    inputs = {**collate(FAMILIES[name], prompts(FAMILIES[name]), "right", answers=3), "use_cache": False}
    vlm = attach(name)
    vlm.plugin.pruner.train()
    with vlm.using(Session(soft=soft, eps=1e-4)):
        vlm.model(**inputs).loss.backward()
    missing = [key for key, p in vlm.plugin.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    idle = ("code", ".unused")  # what no loss reaches, or nothing
    still = [key for key, p in vlm.plugin.named_parameters() if not p.grad.any() and not any(n in key for n in idle)]
    assert still == []
    assert all(p.grad is None for p in vlm.model.parameters())


# -- positions ------------------------------------------------------------------------------------------------------
@MROPE
def test_positions_are_the_plain_models(attach, name):
    """Kept tokens keep their three-part positions, and decoding goes on from where the plain model would."""
    family = FAMILIES[name]
    inputs = collate(family, prompts(family))
    seen: list[Tensor] = []
    decoder = built(name).model.language_model
    spy = decoder.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    try:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        built(name).generate(**inputs, **options)
        plain, seen = seen, []
        generate(attach(name), inputs, 4)
    finally:
        spy.remove()
    assert len(plain) == len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert plain[0].shape[0] == 3
    assert not torch.equal(plain[0][0], plain[0][1]), "time and height differ inside an image"


@MROPE
def test_rotary_embeddings_follow_the_kept_tokens(attach, name):
    family = FAMILIES[name]
    inputs = {**collate(family, prompts(family)[:1]), "use_cache": False}
    vlm, ropes = attach(name), {}
    layers = vlm.host.parts.layers

    def spy(index):
        return lambda _, args, kwargs: ropes.update({index: kwargs["position_embeddings"]})

    handles = [layers[i].register_forward_pre_hook(spy(i), with_kwargs=True) for i in (0, 7)]
    _, record = forward(vlm, inputs)
    for handle in handles:
        handle.remove()
    visual = inputs["input_ids"][0] == IMAGE
    stays = ~visual
    stays[visual] = record.stages[-1].kept[0]
    for whole, part in zip(ropes[0], ropes[7], strict=True):
        assert torch.equal(whole[:, stays], part)


# -- several images -------------------------------------------------------------------------------------------------
def kept_per_image(family: Family, record: Record, row: int, pictures: list[Picture]) -> list[list[int]]:
    ends = torch.tensor([family.length(p) for p in pictures]).cumsum(0).tolist()
    return [
        [int(stage.kept[row, a:b].sum()) for a, b in zip([0, *ends[:-1]], ends, strict=True)] for stage in record.stages
    ]


@EVERY
@METHOD
def test_images_of_one_prompt_share_its_budget(attach, name, method):
    """In proportion to their tokens at every stage, and a batch equals its samples alone."""
    family = FAMILIES[name]
    pictures = [Picture(size, 20 + i) for i, size in enumerate(family.sizes)]
    pair = pictures[::2]
    samples = [prompt(family, pictures, 6, 3), prompt(family, pictures[:1], 5, 4), prompt(family, pair, 8, 5)]
    vlm = attach(name, method, keep=34 if name == "llava-1.5" else 60)
    _, record = forward(vlm, collate(family, samples))
    for row, mine in ((0, pictures), (2, pair)):
        sizes = torch.tensor([family.length(p) for p in mine])
        for counts in kept_per_image(family, record, row, mine):
            fair = sum(counts) * sizes / sizes.sum()
            assert (torch.tensor(counts) - fair).abs().max() < 2
            assert min(counts) > 0
    assert_alone_equals_batch(vlm, family, samples, 4)


@pytest.mark.parametrize(("name", "kept"), [("llava-1.5", [3, 3]), ("internvl", [4, 2])])
def test_images_without_a_word_between_them(pruned, name, kept):
    """Where all images have one length they are told apart still; else a run of visual tokens is one image."""
    family = FAMILIES[name]
    pictures = [Picture(family.sizes[0], 3), Picture(family.sizes[0], 4)]
    inputs = collate(family, [prompt(family, pictures, 6, 1, between=0)])
    _, record = forward(pruned(Halves(), {2: 6}, model=built(name)), inputs)
    half = family.length(pictures[0])
    found = record.stages[0].kept[0]
    assert [int(found[:half].sum()), int(found[half:].sum())] == (kept if name == "llava-1.5" else [6, 0])


def test_an_image_with_its_class_token_is_one_image(pruned):
    """Its length is read off the tower, not off `image_seq_length`, which such checkpoints leave as it is."""
    config = FAMILIES["llava-1.5"].config()
    config.vision_feature_select_strategy = "full"
    model = FAMILIES["llava-1.5"].model(config).eval()
    ids = torch.cat([torch.tensor([3, 4]), torch.full((2 * 37,), IMAGE), torch.tensor([5, 6, 7])])[None]
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    _, record = forward(pruned(Halves(), {2: 6}, model=model), {"input_ids": ids, "pixel_values": pixels})
    assert [int(half.sum()) for half in record.stages[0].kept[0].split(37)] == [3, 3]


def test_contenders_of_a_soft_mask_are_those_of_each_image(pruned):
    """Twice as many tokens as each image keeps stay in the sequence."""
    family = FAMILIES["internvl"]
    pictures = [Picture((2,), 3), Picture((3,), 4)]
    inputs = collate(family, [prompt(family, pictures, 6, 1)])
    vlm, seen = pruned(Halves(), {2: 10}, model=built("internvl")), []
    layer = vlm.host.parts.layers[7]
    spy = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    _, record = forward(vlm, inputs, soft=True, contenders=2.0)
    spy.remove()
    columns = seen[0]["lit_prune_forward"].packed.columns[0]
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    there = torch.isin(visual, columns)
    assert [int(there[:32].sum()), int(there[32:].sum())] == [8, 12]
    assert [int(record.stages[0].kept[0, :32].sum()), int(record.stages[0].kept[0, 32:].sum())] == [4, 6]


class Halves(Random):
    """Prefers early tokens."""

    def __init__(self) -> None:
        super().__init__([2])

    def score(self, context):
        return -context.ordinal.float()


# -- videos ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].video is not None])
@METHOD
def test_video_and_image_share_one_budget(attach, name, method):
    family = FAMILIES[name]
    video = Picture(family.video, 9, "video")
    image = Picture(family.sizes[0], 8)
    samples = [prompt(family, [video], 5, 1), prompt(family, [video, image], 6, 2), prompt(family, [image], 7, 3)]
    vlm = attach(name, method, keep=28)
    inputs = collate(family, samples)
    _, record = forward(vlm, inputs)
    assert record.trace.total_visual.tolist() == [sum(family.length(p) for p in s.pictures) for s in samples]
    assert record.trace.average_visual().tolist() == pytest.approx([28] * 3, abs=0.4)
    for shares in kept_per_image(family, record, 1, [video, image]):
        assert min(shares) > 0
    assert_alone_equals_batch(vlm, family, samples, 4)
    out = generate(vlm, inputs, 5)
    assert gap(recomputed(vlm, inputs, out), out.logits) <= TOLERANCE


def test_the_example_of_the_docs(capsys):
    """`docs/models.md` shows what its code prints."""
    page = (tiny.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", page, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == shown


# -- refusals -------------------------------------------------------------------------------------------------------
@EVERY
def test_chunked_prefill_is_refused(attach, name):
    family = FAMILIES[name]
    inputs = collate(family, prompts(family)[:1])
    vlm = attach(name)
    for size in (20, inputs["input_ids"].shape[1] - 2):
        with pytest.raises(LitPruneError, match="prefill_chunk_size"):
            generate(vlm, inputs, 2, prefill_chunk_size=size)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_prompt_without_an_image_may_come_in_chunks(attach, static):
    """Nothing of it is pruned, so that the answer is the one to the whole prompt."""
    family = FAMILIES["llava-1.5"]
    inputs, vlm = collate(family, [prompt(family, [], 15, 0)]), attach("llava-1.5")
    assert "pixel_values" not in inputs
    whole = generate(vlm, inputs, **cache_options(vlm, static))
    chunks = generate(vlm, inputs, prefill_chunk_size=4, **cache_options(vlm, static))
    assert torch.equal(chunks.sequences, whole.sequences)
    assert gap(chunks.logits, whole.logits) <= TOLERANCE


def chunks_are_refused(model, inputs) -> bool:
    """Whether the model's own `generate()` refuses chunks; the library itself may refuse those that hold an image."""
    try:
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=20, pad_token_id=PAD)
    except (LitPruneError, ValueError, RuntimeError) as error:
        return "pruned one by one" in str(error)
    return False


def test_chunks_are_refused_by_whichever_method_is_attached(attach):
    """By the one that replaces another, after an attach that failed, in a copy, and by none once it is detached."""
    family = FAMILIES["llava-1.5"]
    inputs, vlm = collate(family, prompts(family)[:1]), attach("llava-1.5", model=family.build())
    assert chunks_are_refused(vlm.model, inputs)
    vlm.attach(Uniform([1]), keep=KEEP)
    assert chunks_are_refused(vlm.model, inputs)
    with pytest.raises(LitPruneError):
        vlm.attach(Uniform([99]), keep=KEEP)
    assert chunks_are_refused(vlm.model, inputs)
    with vlm.using(Session(prune=False)):
        assert not chunks_are_refused(vlm.model, inputs)
    twin = copy.deepcopy(vlm)
    vlm.detach()
    assert not chunks_are_refused(vlm.model, inputs)
    assert chunks_are_refused(twin.model, inputs)
    assert not chunks_are_refused(twin.detach().model, inputs)


@pytest.mark.parametrize("layer", [0, 1])
def test_stages_before_deepstack_is_done(layer):
    """Vision features that belong behind the first layers reach the tokens that are left: dropping = masking."""
    family, vlm = FAMILIES["qwen3-vl"], VLM(built("qwen3-vl"), None).attach(Uniform([layer]), keep=KEEP)
    samples = prompts(family)
    inputs = collate(family, samples)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    dropped, masked = (forward(vlm, inputs, soft=soft)[0] for soft in (False, True))
    assert gap(dropped[text], masked[text]) < 5e-4
    with torch.no_grad(), vlm.using(Session(prune=False)):
        assert gap(vlm.model(**inputs).logits[text], dropped[text]) > 0.01
    for row, sample in enumerate(samples):
        alone = forward(vlm, collate(family, [sample]))[0][0]
        assert gap(alone[-4:], dropped[row, -4:]) < 5e-4
    vlm.detach()


WINDOW = pytest.mark.parametrize(
    ("name", "window"),
    [
        ("llava-next-mistral", {"sliding_window": 32}),
        ("qwen2.5-vl", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}),
        ("internvl", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}),
    ],
)


@WINDOW
def test_windows_of_attention_behind_a_stage_go_by_position(attach, name, window):
    """A window reaches as far back as it does in the plain model, whatever has left: in prefill and in decoding."""
    family = FAMILIES[name]
    inputs = collate(family, prompts(family))
    model = family.build(**window)
    vlm = attach(name, model=model)
    dropped = forward(vlm, inputs)[0]
    masked = forward(vlm, inputs, soft=True, eps=1e-30)[0]  # pruned tokens keep no weight at all
    assert gap(dropped[text(inputs)], masked[text(inputs)]) <= TOLERANCE
    wide = forward(attach(name), inputs)[0]
    assert gap(dropped[text(inputs)], wide[text(inputs)]) > 0.1, "the window hid nothing"
    vlm = attach(name, model=model)
    out = generate(vlm, inputs)
    assert gap(recomputed(vlm, inputs, out), out.logits) <= TOLERANCE
    static = generate(vlm, inputs, cache_implementation="static", disable_compile=True)
    assert gap(static.logits, out.logits) <= TOLERANCE
    assert_alone_equals_batch(vlm, family, prompts(family))


@WINDOW
def test_windows_are_refused_where_masks_cannot_be_cut(name, window):
    model = FAMILIES[name].build(**window)
    model.config._attn_implementation = model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(LitPruneError, match=r"sliding_window=None"):
        VLM(model, None).attach(Uniform([2]), keep=KEEP)


def test_windows_as_long_as_the_context_do_nothing(attach):
    family = FAMILIES["llava-next-mistral"]
    wide = family.build(sliding_window=512)
    samples = prompts(family)
    expected = generate(attach("llava-next-mistral"), collate(family, samples))
    vlm = attach("llava-next-mistral", model=wide)
    found = generate(vlm, collate(family, samples))
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert gap(found.logits, expected.logits) <= TOLERANCE


def test_budget_that_a_sample_cannot_meet(attach, caplog):
    """The layers before the first stage see all its tokens: it is pruned as far as can be, and reported once."""
    family = FAMILIES["llava-next-vicuna"]
    vlm = attach("llava-next-vicuna", keep=14)
    _, record = forward(vlm, collate(family, prompts(family)))
    assert record.trace.total_visual.tolist() == [52, 88, 70]
    assert record.trace.average_visual().tolist() == pytest.approx([14, (2 * 88 + 6) / 8, (2 * 70 + 6) / 8], abs=0.4)
    assert record.trace.excess().tolist() == [0, 22.75 - 14, 18.25 - 14]
    forward(vlm, collate(family, prompts(family)))
    assert len(caplog.messages) == 1
    assert "in 1 image can't be pruned to keep=14" in caplog.messages[0]


def test_embeddings_in_place_of_ids_are_refused(attach):
    vlm = attach("llava-1.5")
    embeds = torch.randn(1, 8, tiny.WIDTH)
    with pytest.raises(LitPruneError, match="give input_ids"):
        vlm.model(inputs_embeds=embeds)
    with torch.no_grad(), vlm.using(Session(prune=False)):
        assert vlm.model(inputs_embeds=embeds).logits.isfinite().all()


def test_two_hosts_on_one_model_are_refused():
    model = built("llava-1.5")
    host = DecoderHost(model, Full(), None, 0)
    with pytest.raises(LitPruneError, match="detach it first"):
        DecoderHost(model, Full(), None, 0)
    host.detach()
