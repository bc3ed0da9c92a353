"""What pruning must not change: the plain model, masking, caches, batches."""

import pytest
import tiny
import torch
from tiny import DEPTH, KEEP, PRUNERS, SILENT, TOLERANCE, VISUAL, batch, forward, gap, generate, real_text, samples
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.compat import cache_keyword, cache_of

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def by_turns(names: str, one: tuple, other: tuple):
    """Every method with both values of two options; the options' four pairs by turns, two for each method."""
    cases = [(path, one[i], other[(i + n) % 2]) for n, path in enumerate(PRUNERS) for i in (0, 1)]
    return pytest.mark.parametrize(f"pruner, {names}", cases, ids=lambda value: getattr(value, "stem", str(value)))


# -- keep-all -------------------------------------------------------------------------------------------------------
@by_turns("side, attention", ("left", "right"), ("sdpa", "eager"))
def test_keep_all_without_repair_strength_is_the_plain_model(request, pruned, pruner, side, attention):
    model = request.getfixturevalue("tiny_model" if attention == "sdpa" else "tiny_eager")

    def attach():
        try:
            return pruned(pruner, keep=VISUAL, model=model)
        except LitPruneError as error:
            if attention == "sdpa":
                raise
            pytest.skip(str(error))

    keep_all_is_the_plain_model(model, attach, batch(samples(), side))


def keep_all_is_the_plain_model(model, attach, inputs, tokens=8):
    """Asserts it to the bit, for a forward and for an answer, once repair does nothing; returns what was recorded."""
    with torch.no_grad():
        logits = model(**inputs).logits
    plain, vlm = generate_plain(model, inputs, tokens), attach()
    for adapter in vlm.plugin.repair.adapters:
        adapter.alpha.data.zero_()
    found, record = forward(vlm, inputs)
    assert torch.equal(found, logits)
    again = generate(vlm, inputs, tokens)
    assert torch.equal(again.sequences, plain.sequences)
    assert torch.equal(again.logits, plain.logits)
    return record


def generate_plain(model, inputs, tokens=8, **options):
    fixed = {"do_sample": False, "suppress_tokens": SILENT, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options, max_new_tokens=tokens, **fixed)
    out.logits = torch.stack(out.logits, 1)
    return out


def test_keep_all_with_a_threshold_is_the_plain_model(tiny_model, pruned):
    inputs = batch(samples())
    with torch.no_grad():
        logits = tiny_model(**inputs).logits
    vlm = pruned(tiny.small_rcp("threshold", bias=1e4), repair=tiny.small_repair(), shaken=False)
    for adapter in vlm.plugin.repair.adapters:
        adapter.alpha.data.zero_()
    found, record = forward(vlm, inputs)
    assert all(stage.kept.all() for stage in record.stages)
    assert torch.equal(found, logits)


def test_keep_all_is_the_plain_model_in_bfloat16(pruned):
    model = tiny.build_model().bfloat16()
    inputs = batch(samples())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        logits = model(**inputs).logits
    vlm = pruned(tiny.small_rcp(), keep=VISUAL, repair=tiny.small_repair(), model=model)
    for adapter in vlm.plugin.repair.adapters:
        adapter.alpha.data.zero_()
    assert torch.equal(forward(vlm, inputs)[0], logits)


def test_teacher_session_is_the_plain_model(tiny_model, pruned):
    inputs = batch(samples())
    with torch.no_grad():
        logits = tiny_model(**inputs).logits
    vlm = pruned(PRUNERS[0])
    assert torch.equal(forward(vlm, inputs, prune=False, repair=False)[0], logits)


def test_pruning_and_repair_change_the_logits(tiny_model, pruned):
    """So that the equalities of this file are about something."""
    inputs = batch(samples())
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    plain = forward(vlm, inputs, prune=False, repair=False)[0]
    bare = forward(vlm, inputs, repair=False)[0]
    repaired = forward(vlm, inputs)[0]
    assert plain.std() > 1
    assert gap(plain[:, -1], bare[:, -1]) > 0.5
    assert gap(bare[:, -1], repaired[:, -1]) > 0.1


# -- dropping and masking -------------------------------------------------------------------------------------------
@by_turns("side, cache", ("left", "right"), (True, False))
def test_dropping_equals_masking(pruned, pruner, side, cache):
    """Training passes no cache, generation does."""
    inputs = {**batch(samples(), side, answers=4), "use_cache": cache}
    vlm = pruned(pruner)
    dropped, hard = forward(vlm, inputs)
    masked, soft = forward(vlm, inputs, soft=True)
    text = real_text(inputs)
    assert_same_choice(hard, soft)
    assert gap(dropped[text], masked[text]) <= TOLERANCE
    assert hard.trace.average_visual().tolist() == soft.trace.average_visual().tolist()


@EVERY
def test_dropping_equals_masking_in_double_precision(pruned, pruner, monkeypatch):
    def double_norm(self, states):  # the library's casts to fp32, which rounds differently from machine to machine
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)
    model = tiny.build_model().double()
    inputs = batch(samples(), answers=4)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    vlm = pruned(pruner, model=model)
    if vlm.plugin.repair is not None:
        vlm.plugin.repair.double()
    text = real_text(inputs)
    dropped, masked = forward(vlm, inputs)[0], forward(vlm, inputs, soft=True, eps=1e-30)[0]
    assert gap(dropped[text], masked[text]) <= 1e-9  # scores and gates stay in fp32


def test_attention_of_the_layer_before_may_be_rcps_baseline(pruned):
    """Dropping equals masking, cached decoding equals recomputation, and it is another choice than by own attention."""
    inputs = {**batch(samples(), answers=4)}
    vlm = pruned(tiny.small_rcp(attention_layer="previous"), repair=tiny.small_repair())
    dropped, hard = forward(vlm, inputs)
    masked, soft = forward(vlm, inputs, soft=True)
    assert_same_choice(hard, soft)
    assert gap(dropped[real_text(inputs)], masked[real_text(inputs)]) <= TOLERANCE
    out = generate(vlm, batch(samples()))
    assert gap(recomputed(vlm, batch(samples()), out), out.logits) <= TOLERANCE
    assert {stage.reads for stage in hard.trace.stages} == {"previous"}
    _, own = forward(pruned(tiny.small_rcp(), repair=tiny.small_repair()), inputs)
    assert not torch.equal(own.stages[0].kept, hard.stages[0].kept)


@SIDES
@pytest.mark.parametrize("cache", [True, False])
def test_dropping_equals_masking_with_unequal_budgets(pruned, side, cache):
    inputs = {**batch(samples(), side, answers=4), "use_cache": cache}
    vlm = pruned(tiny.small_rcp("threshold", bias=0.0), repair=tiny.small_repair())
    dropped, hard = forward(vlm, inputs)
    masked, soft = forward(vlm, inputs, soft=True)
    assert len(set(hard.stages[0].kept.sum(1).tolist())) > 1
    assert_same_choice(hard, soft)
    text = real_text(inputs)
    assert gap(dropped[text], masked[text]) <= TOLERANCE


def test_soft_masks_in_eager_attention_are_refused(pruned, tiny_eager):
    """Eager attention can't be wrapped: a bias would be ignored without a word."""
    vlm = pruned(PRUNERS[-1], model=tiny_eager)
    with pytest.raises(LitPruneError, match="eager"):
        forward(vlm, batch(samples()), soft=True)


def assert_same_choice(a: Record, b: Record) -> None:
    for one, other in zip(a.stages, b.stages, strict=True):
        assert torch.equal(one.kept, other.kept)


# -- caches ---------------------------------------------------------------------------------------------------------
def recomputed(vlm, inputs, out, asked=None, **options):
    """Logits that predict the generated tokens, from one forward over prompt and answer.

    `asked`: first and last column of a second question, which is in the prompt of the second answer.
    """
    start = inputs["input_ids"].shape[1]
    labels, new = out.sequences.clone(), out.sequences.shape[1] - start
    labels[:, :start] = -100
    if asked is not None:
        labels[:, slice(*asked)] = -100
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    whole = {**inputs, "input_ids": out.sequences, "attention_mask": mask, "labels": labels}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    return forward(vlm, whole, **options)[0][:, (asked[1] if asked else start) - 1 : -1]


@EVERY
def test_cached_decoding_equals_recomputation(pruned, pruner):
    inputs = batch(samples())
    vlm = pruned(pruner)
    out = cached_decoding_equals_recomputation(vlm, inputs)
    assert gap(recomputed(vlm, inputs, out, repair=False), out.logits) > 0.05, "repair took no part"


def test_sampling_with_a_seed_equals_recomputation(pruned):
    inputs = batch(samples())
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    torch.manual_seed(0)
    out = generate(vlm, inputs, tokens=5, do_sample=True, temperature=0.8)
    torch.manual_seed(0)
    again = generate(vlm, inputs, tokens=5, do_sample=True, temperature=0.8)
    assert torch.equal(out.sequences, again.sequences)
    assert not torch.equal(out.sequences, generate(vlm, inputs, tokens=5).sequences)
    assert gap(recomputed(vlm, inputs, out), out.logits) <= TOLERANCE


def second_turn(vlm, inputs, question, rows=None, tokens=5, **options):
    """Answer, ask again on the same cache, answer: the second answer, and where its question stands."""
    first = generate(vlm, inputs, tokens=4, rows=rows, **options)
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    turn, cache = {"input_ids": ids, "attention_mask": mask}, {cache_keyword(vlm.model): cache_of(first)}
    return generate(vlm, turn, tokens, rows, **{**options, **cache}), (first.sequences.shape[1], ids.shape[1])


def dialogue_equals_one_forward(vlm, inputs, question, tolerance=TOLERANCE, **options):
    """Asserts it, and returns the second answer."""
    out, asked = second_turn(vlm, inputs, question, **options)
    assert gap(recomputed(vlm, inputs, out, asked), out.logits) <= tolerance
    return out


def cached_decoding_equals_recomputation(vlm, inputs, tokens=8, tolerance=TOLERANCE):
    """Asserts it for dynamic and static caches; returns what was generated."""
    out = generate(vlm, inputs, tokens)
    assert gap(recomputed(vlm, inputs, out), out.logits) <= tolerance
    static = generate(vlm, inputs, tokens, cache_implementation="static", disable_compile=True)
    assert static.sequences.tolist() == out.sequences.tolist()
    assert gap(static.logits, out.logits) <= tolerance
    return out


def assisted_decoding_equals_greedy(vlm, inputs, tokens=24):
    """Asserts it: rejected candidates leave the cache, and what is remembered about it, again."""
    greedy = generate(vlm, inputs, tokens)
    assisted = generate(vlm, inputs, tokens, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert assisted.sequences.tolist() == greedy.sequences.tolist()


def mixed_batch_equals_its_samples(vlm, prompts=None):
    """Asserts it for greedy answers and for beams; one sample has no image."""
    prompts = prompts or samples((45, 14, 52), (True, False, True))
    together = generate(vlm, batch(prompts))
    beams = generate(vlm, batch(prompts), tokens=5, num_beams=3).sequences[:, -5:]
    for row, sample in enumerate(prompts):
        alone = generate(vlm, batch([sample]), rows=[row])
        assert alone.sequences[0, -8:].tolist() == together.sequences[row, -8:].tolist()
        assert gap(alone.logits[0], together.logits[row]) <= TOLERANCE
        single = generate(vlm, batch([sample]), tokens=5, rows=[row], num_beams=3).sequences[0, -5:]
        assert single.tolist() == beams[row].tolist()


@EVERY
def test_second_turn_on_the_pruned_cache(pruned, pruner):
    """Equal to the samples alone and to one forward over the whole dialogue."""
    prompts, question = samples(), torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(7))
    vlm = pruned(pruner)
    out = dialogue_equals_one_forward(vlm, batch(prompts), question)

    for row, sample in enumerate(prompts):
        alone, _ = second_turn(vlm, batch([sample]), question[row : row + 1], rows=[row])
        assert alone.sequences[0, -5:].tolist() == out.sequences[row, -5:].tolist()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("layers", [[0, 4], [1, 4]])
def test_an_image_after_a_turn_of_text(tiny_model, pruned, layers, attached, count, padding, static):
    """The cache has columns that no stage has seen, of the plain model or of a plug-in with nothing to prune."""
    keep = torch.rand(2, VISUAL, generator=torch.Generator().manual_seed(4)) > 0.6
    first, second = batch(samples((9, 14, 11)[:count], (False,) * count)), batch(samples((45,) * count, seed=9))
    first = {name: torch.nn.functional.pad(part, (padding, 0)) for name, part in first.items()}
    options = {}
    if static:
        made = StaticCache(config=tiny_model.config.get_text_config(), max_cache_len=128)
        options = {cache_keyword(tiny_model): made, "disable_compile": True}
    if attached == "before":
        vlm = pruned(tiny.Chosen(layers, keep))
        one = generate(vlm, first, tokens=3, **options)
    else:
        one = generate_plain(tiny_model, first, tokens=3, **options)
        vlm = pruned(tiny.Chosen(layers, keep))
    ids = torch.cat([one.sequences, second["input_ids"]], 1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1)
    turn = {**second, "input_ids": ids, "attention_mask": mask}
    two = generate(vlm, turn, tokens=5, **{**options, cache_keyword(tiny_model): cache_of(one)})
    assert gap(recomputed(vlm, turn, two), two.logits) <= TOLERANCE


@EVERY
def test_decoding_behind_padding_on_the_right(pruned, pruner):
    """By hand, since `generate()` reads the last column. Padding leaves at the first stage, and is masked before it."""
    prompts, vlm = samples(), pruned(pruner)
    inputs, hint = batch(prompts, "right"), tiny.hints(3)
    ends = inputs["attention_mask"].sum(1)
    tokens = torch.tensor([[7, 8, 9], [11, 12, 13], [21, 22, 23]])
    with torch.no_grad(), vlm.using(Session(hints=hint)):
        out = vlm.model(**inputs, use_cache=True)
        mask, found = inputs["attention_mask"], [out.logits[torch.arange(3), ends - 1]]
        for step in range(2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = {"position_ids": (ends + step)[:, None], cache_keyword(vlm.model): cache_of(out)}
            out = vlm.model(input_ids=tokens[:, step : step + 1], attention_mask=mask, **positions)
            found.append(out.logits[:, 0])
    for row, (ids, pixels) in enumerate(prompts):
        whole = torch.cat([ids, tokens[row]])[None]
        labels = whole.clone()
        labels[:, : len(ids)] = -100
        hint = {"regions": tiny.hints(3)["regions"][[row]]}
        logits, _ = forward(vlm, {"input_ids": whole, "pixel_values": pixels[None], "labels": labels}, hints=hint)
        assert gap(torch.stack(found, 1)[row], logits[0, -4:-1]) <= TOLERANCE


def test_cache_keeps_only_what_was_kept(pruned):
    inputs = batch(samples((50,)))
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    cache = cache_of(generate(vlm, inputs, tokens=4))
    schedule, now, expected = vlm.host.schedule, VISUAL, []
    for layer in range(DEPTH):
        now = schedule.get(layer, now)
        expected.append(50 - VISUAL + now + 3)
    assert [layer.keys.shape[2] for layer in cache.layers] == expected


@EVERY
def test_assisted_decoding_equals_greedy(pruned, pruner):
    assisted_decoding_equals_greedy(pruned(pruner), batch(samples((45,))))


# -- batches --------------------------------------------------------------------------------------------------------
@EVERY
def test_generation_of_a_batch_equals_its_samples_alone(pruned, pruner):
    """The one without an image is neither pruned nor repaired, also while decoding."""
    mixed_batch_equals_its_samples(pruned(pruner), samples((*tiny.LENGTHS, 14), (True, True, True, False)))


def test_generation_with_unequal_budgets_equals_the_samples_alone(pruned):
    prompts = samples()
    vlm = pruned(tiny.small_rcp("threshold", bias=0.0), repair=tiny.small_repair())
    together = generate(vlm, batch(prompts))
    for row, sample in enumerate(prompts):
        alone = generate(vlm, batch([sample]))
        assert alone.sequences[0, -8:].tolist() == together.sequences[row, -8:].tolist()
        assert gap(alone.logits[0], together.logits[row]) <= TOLERANCE


@by_turns("side, cache", ("left", "right"), (True, False))
def test_forward_of_a_batch_equals_its_samples_alone(pruned, pruner, side, cache):
    """One sample has no image."""
    prompts = samples((*tiny.LENGTHS, 14), (True, True, True, False))
    vlm = pruned(pruner)
    inputs = {**batch(prompts, side, answers=3), "use_cache": cache}
    together, record = forward(vlm, inputs)
    for row, sample in enumerate(prompts):
        single = {**batch([sample], answers=3), "use_cache": cache}
        alone, own = forward(vlm, single, hints={"regions": tiny.hints(8)["regions"][[row]]})
        mine = together[row][inputs["attention_mask"][row].bool()]
        text = real_text(single)[0]
        assert gap(mine[text], alone[0][text]) <= TOLERANCE
        for stage, lone in zip(record.stages, own.stages, strict=False):
            assert torch.equal(stage.kept[row], lone.kept[0])


@EVERY
@SIDES
def test_mixed_batch_leaves_the_sample_without_image_alone(tiny_model, pruned, pruner, side):
    prompts = samples((45, 14), (True, False))
    inputs = batch(prompts, side)
    with torch.no_grad():
        plain = tiny_model(**inputs).logits[1]
    vlm = pruned(pruner)
    found, record = forward(vlm, inputs, repair=False)
    real = inputs["attention_mask"][1].bool()
    assert gap(found[1][real], plain[real]) <= TOLERANCE
    assert record.trace.average_visual().tolist() == [KEEP, 0]


@EVERY
def test_text_only_input_is_untouched(tiny_model, pruned, pruner):
    inputs = batch(samples((20, 14), (False, False)))
    with torch.no_grad():
        plain = tiny_model(**inputs).logits
    tokens = generate_plain(tiny_model, inputs).sequences
    vlm = pruned(pruner)
    logits, record = forward(vlm, inputs)
    assert torch.equal(logits, plain)
    assert torch.equal(generate(vlm, inputs).sequences, tokens)
    assert record.stages == []


@EVERY
def test_prompts_without_a_question_are_pruned_too(pruned, pruner):
    """Nothing stands behind the image: methods that read the question have nothing to read."""
    prompts = [(ids[: 2 + VISUAL], pixels) for ids, pixels in samples()]
    vlm = pruned(pruner)
    logits, record = forward(vlm, batch(prompts))
    assert logits[:, -1].isfinite().all()
    assert record.trace.average_visual().tolist() == [KEEP] * 3


# -- what was kept --------------------------------------------------------------------------------------------------
@by_turns("side, soft", ("left", "right"), (False, True))
def test_masks_are_cumulative_and_counts_exact(pruned, pruner, side, soft):
    vlm = pruned(pruner)
    _, record = forward(vlm, batch(samples(), side), soft=soft)
    before = torch.ones(3, VISUAL, dtype=torch.bool)
    for stage, (layer, count) in zip(record.stages, vlm.host.schedule.items(), strict=True):
        assert stage.layer == layer
        assert stage.kept.sum(1).tolist() == [count] * 3
        assert not (stage.kept & ~before).any()
        before = stage.kept
    assert record.trace.average_visual().tolist() == [KEEP] * 3


def test_masks_of_a_threshold_are_cumulative(pruned):
    vlm = pruned(tiny.small_rcp("threshold", bias=0.0), repair=tiny.small_repair())
    for soft in (False, True):
        _, record = forward(vlm, batch(samples()), soft=soft)
        first, second, third = (stage.kept for stage in record.stages)
        assert (second <= first).all()
        assert (third <= second).all()
        assert third.any(1).all(), "every sample keeps at least one token"


def test_soft_masks_are_no_start_of_a_generation(pruned):
    """They hide tokens in one forward; later ones would see them again."""
    vlm, inputs = pruned(tiny.small_rcp(), KEEP), batch(samples())
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": SILENT}
    with vlm.using(Session(soft=True)):
        with pytest.raises(LitPruneError, match="soft"):
            vlm.model.generate(**inputs, **options)
        again = vlm.model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(again, vlm.model.generate(**inputs, **options))


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_a_cache_by_hand(pruned, tiny_model, mode):
    """Prefill, then a step, as in training mode too: there a cache is there if it is asked for."""
    vlm, inputs = pruned(tiny.small_rcp(), KEEP), batch(samples())
    with torch.no_grad():
        expected = generate(vlm, inputs, tokens=2).logits[:, 1]
        tiny_model.train(mode)
        vlm.plugin.eval()
        first = tiny_model(**inputs, use_cache=True)
        token = first.logits[:, -1].index_fill(1, torch.tensor(SILENT), float("-inf")).argmax(-1, keepdim=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        second = tiny_model(input_ids=token, attention_mask=mask, **{cache_keyword(tiny_model): cache_of(first)})
        assert (cache_of(tiny_model(**inputs)) is None) == mode
    tiny_model.eval()
    assert gap(second.logits[:, -1], expected) <= TOLERANCE


def test_session_is_restored_after_an_error(pruned):
    vlm = pruned(PRUNERS[0])
    before = vlm.host.session
    with pytest.raises(RuntimeError), vlm.using(Session(prune=False)):
        raise RuntimeError
    assert vlm.host.session is before
