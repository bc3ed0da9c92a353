"""Proportional attention: equal to a literal attention with a bias of log(size), in prefill and in decoding."""

import pytest
import tiny
import torch
from test_equality import (
    assisted_decoding_equals_greedy,
    cached_decoding_equals_recomputation,
    dialogue_equals_one_forward,
    keep_all_is_the_plain_model,
    mixed_batch_equals_its_samples,
)
from test_syncs import looks
from tiny import IMAGE, PRUNERS, TOLERANCE, VISUAL, Chosen, batch, forward, gap, generate, real_text, samples

from lit_prune.cost.flops import price
from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.ops.merging import collect_sizes, rectified_sizes
from lit_prune.plugin import Plugin
from lit_prune.vlm import VLM, plugin_from_yaml

HOW = pytest.mark.parametrize("how", ["count", "similarity"])
# A learned method with three stages, one that reads the layer before, one that reads its own, one that merges.
SOME = [path for path in PRUNERS if path.stem in ("rcp", "fastv", "text_attention", "sparsevlm", "visionzip")]
ERA = next(path for path in PRUNERS if path.stem == "era_bias")
EACH = pytest.mark.parametrize("pruner", SOME, ids=lambda path: path.stem)


def literal_sizes(states, sizes, alive, keep, how):
    """Token by token, in float64."""
    found = sizes.clone()
    for token in range(len(states)):
        if alive[token] and not keep[token]:
            near = [torch.cosine_similarity(states[token], states[k], dim=0).item() for k in keep.nonzero()[:, 0]]
            best = max(range(len(near)), key=near.__getitem__)
            found[keep.nonzero()[best, 0]] += sizes[token] * (max(near[best], 0.0) if how == "similarity" else 1.0)
    return found


@HOW
def test_sizes_are_collected_as_written(how):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 20, 8, generator=generator, dtype=torch.float64)
    sizes = 1 + 3 * torch.rand(3, 20, generator=generator, dtype=torch.float64)
    alive = torch.rand(3, 20, generator=generator) < 0.8
    keep = alive & (torch.rand(3, 20, generator=generator) < 0.4)
    found = collect_sizes(states, sizes, alive, keep, weighted=how == "similarity")
    for row in range(3):
        assert gap(found[row], literal_sizes(states[row], sizes[row], alive[row], keep[row], how)) < 1e-6
    if how == "count":
        kept, there = (found * keep).sum(1), (sizes * alive).sum(1)
        assert gap(kept, there) < 1e-9, "none is lost"


def test_rectified_sizes_give_a_kept_token_its_groups_attention():
    """Softmax over the kept ones, with log(size), is the full softmax summed by nearest kept token, twice in a row."""
    generator = torch.Generator().manual_seed(1)
    states, logits = torch.randn(3, 20, 8, generator=generator), torch.randn(3, 20, generator=generator)
    alive = torch.rand(3, 20, generator=generator) < 0.8
    sizes = torch.ones(3, 20)
    for share in (0.6, 0.3):
        attention = (logits + sizes.log()).masked_fill(~alive, float("-inf")).softmax(1)
        keep = alive & (torch.rand(3, 20, generator=generator) < share)
        sizes = rectified_sizes(states, sizes, alive, keep, attention)
        after = (logits + sizes.log()).masked_fill(~keep, float("-inf")).softmax(1)
        for row in range(3):
            expected = dict.fromkeys(keep[row].nonzero()[:, 0].tolist(), 0.0)
            for token in alive[row].nonzero()[:, 0].tolist():
                likeness = {c: torch.cosine_similarity(states[row, token], states[row, c], dim=0) for c in expected}
                home = token if keep[row, token] else max(likeness, key=likeness.get)
                expected[home] += attention[row, token].item()
            for token, total in expected.items():
                assert after[row, token].item() == pytest.approx(total, abs=1e-5)
        alive = keep


def test_eras_bias_changes_the_answer_and_is_cached(pruned):
    inputs = batch(samples())
    out = cached_decoding_equals_recomputation(pruned(ERA, repair=None), inputs)
    counted = generate(pruned(ERA, proportional_attention="count"), inputs)
    bare = generate(pruned(ERA, proportional_attention="none"), inputs)
    assert gap(out.logits[:, 0], bare.logits[:, 0]) > 0.05
    assert gap(out.logits[:, 0], counted.logits[:, 0]) > 0.05


@pytest.mark.parametrize("name", ["divprune", "visionzip", "dcp_rcp"])
def test_eras_bias_needs_attention_at_each_stage(pruned, name):
    with pytest.raises(LitPruneError, match="reads attention at each of its stages"):
        pruned(ERA.with_stem(name), proportional_attention="attention")


def test_sizes_of_a_sample_that_keeps_nothing_are_lost():
    states, alive = torch.randn(1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
    assert collect_sizes(states, torch.ones(1, 5), alive, ~alive).isfinite().all()


@HOW
def test_dropping_equals_attention_with_log_size(pruned, how):
    """A plain forward at full length, in float64, with a 4-D float mask: -inf on dropped keys, log size on others."""
    model = tiny.build_model().double()
    ids, pixels = samples((50,))[0]
    inputs = batch([(ids, pixels.double())])
    generator = torch.Generator().manual_seed(3)
    first = torch.randperm(VISUAL, generator=generator)[:14]
    keep = torch.zeros(2, VISUAL, dtype=torch.bool)
    keep[0, first], keep[1, first[:5]] = True, True
    image = (ids == IMAGE).nonzero()[:, 0]
    sizes, alive, masks = torch.ones(VISUAL).double(), torch.ones(VISUAL, dtype=torch.bool), {}

    def literal(index):
        def hook(module, args, kwargs):
            nonlocal sizes, alive
            if index in (2, 5):
                mine = keep[(2, 5).index(index)] & alive
                sizes, alive = literal_sizes(args[0][0, image], sizes, alive, mine, how), mine
                bias = torch.zeros(50).double()
                bias[image] = torch.where(alive, sizes.log(), float("-inf"))
                masks[index] = torch.full((50, 50), float("-inf")).double().triu(1) + bias
            mask = masks.get(5, masks.get(2))
            return None if mask is None else (args, {**kwargs, "attention_mask": mask[None, None]})

        return hook

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(literal(index), with_kwargs=True) for index, layer in enumerate(layers)]
    with torch.no_grad():
        expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    vlm = pruned(Chosen([2, 5], keep), model=model, proportional_attention=how)
    text = real_text(inputs)
    found = forward(vlm, inputs, repair=False)[0]
    assert gap(found[text], expected[text]) <= 1e-6
    bare = forward(pruned(Chosen([2, 5], keep), model=model), inputs, repair=False)[0]
    assert gap(bare[text], expected[text]) > 0.1, "sizes change something"


def test_what_the_tower_dropped_is_spread_over_what_arrives(tiny_model, pruned):
    """A plain forward on the tower's features: -inf on places of dropped patches, log(36 / 12) on the others."""
    inputs = batch(samples((50,)))
    path = next(path for path in PRUNERS if path.stem == "visionzip")
    vlm = pruned(path, proportional_attention="count", positions="original", keep=12)
    found = forward(vlm, inputs, repair=False)[0]
    with torch.no_grad():
        features = tiny_model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    vlm.detach()
    image = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    there = (features.pooler_output[0] != 0).any(-1)
    bias = torch.zeros(50)
    bias[image] = torch.where(there, torch.tensor(3.0).log(), float("-inf"))
    mask = torch.full((50, 50), float("-inf")).triu(1) + bias
    mask[image[~there], 0] = 0.0  # a row of nothing but -inf has no softmax; nobody looks at these
    rest = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}}
    with torch.no_grad():
        expected = tiny_model(**rest, attention_mask=mask[None, None], position_ids=torch.arange(50)[None]).logits
    assert there.sum() == 12
    assert gap(found[real_text(inputs)], expected[real_text(inputs)]) <= TOLERANCE


@EACH
@HOW
def test_cached_decoding_equals_recomputation(pruned, pruner, how):
    inputs = batch(samples())
    out = cached_decoding_equals_recomputation(pruned(pruner, proportional_attention=how), inputs)
    bare = generate(pruned(pruner), inputs)
    assert gap(bare.logits[:, 0], out.logits[:, 0]) > 0.05


@EACH
def test_generation_of_a_mixed_batch_equals_its_samples_alone(pruned, pruner):
    mixed_batch_equals_its_samples(pruned(pruner, proportional_attention="count", positions="renumbered"))


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_masking_equals_dropping(pruned, pruner, side):
    inputs = batch(samples(), side, answers=4)
    vlm = pruned(pruner, proportional_attention="count")
    text = real_text(inputs)
    assert gap(forward(vlm, inputs)[0][text], forward(vlm, inputs, soft=True, eps=1e-30)[0][text]) <= TOLERANCE


@EACH
def test_second_turn_attends_with_the_sizes(pruned, pruner):
    inputs, question = batch(samples()), torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(7))
    dialogue_equals_one_forward(pruned(pruner, proportional_attention="count"), inputs, question)


def test_a_second_image_finds_the_sizes_of_the_first(pruned):
    """Batch and sample alone agree, and the cache knows the sizes of both images."""
    vlm = pruned(Chosen([2], torch.arange(VISUAL)[None] % 4 == 0), proportional_attention="count")
    new = batch(samples((44,), seed=9))
    caches = {}
    for rows in (1, 2):
        out = generate(vlm, batch(samples((45, 50))[:rows]), tokens=4)
        before = (out.sequences != tiny.PAD).long()[:, :-1]
        again = {name: torch.cat([part] * rows) for name, part in new.items()}
        again["attention_mask"] = torch.cat([before, again["attention_mask"]], 1)
        positions = before.sum(1, keepdim=True) + torch.arange(44)
        with torch.no_grad():
            logits = vlm.model(**again, position_ids=positions, **{cache_keyword(vlm.model): cache_of(out)}).logits
        caches[rows] = logits[0], cache_of(out).lit_prune.bias[2][0].exp()
    assert gap(caches[1][0], caches[2][0]) <= TOLERANCE
    extra = caches[1][1] - 1
    assert round(extra.sum().item()) == 2 * VISUAL * 3 // 4


def test_assisted_decoding_equals_greedy(pruned):
    assisted_decoding_equals_greedy(pruned(SOME[0], proportional_attention="count"), batch(samples((45,))))


@EACH
def test_keep_all_is_the_plain_model(tiny_model, pruned, pruner):
    counted = {"keep": VISUAL, "proportional_attention": "count"}
    keep_all_is_the_plain_model(tiny_model, lambda: pruned(pruner, **counted), batch(samples()))


def test_it_takes_no_further_look_at_the_device(tiny_model, pruned, monkeypatch):
    inputs, counts = batch(samples()), []
    for how in ("none", "count"):
        vlm = pruned(SOME[0], proportional_attention=how)
        with torch.no_grad(), vlm.using(Session()), looks(monkeypatch) as found:
            tiny_model(**inputs)
        counts.append(found)
    assert counts[0] == counts[1]


def test_the_nearest_kept_token_has_a_price(pruned):
    inputs, costs = batch(samples()), []
    for how in ("none", "count"):
        vlm = pruned(Chosen([2], torch.arange(VISUAL)[None] % 4 == 0), proportional_attention=how)
        costs.append(price(forward(vlm, inputs)[1].trace, vlm.size)["scoring"][0].item())
    assert costs[1] - costs[0] == 2 * VISUAL * (VISUAL // 4) * tiny.WIDTH


def test_eager_attention_is_refused(pruned, tiny_eager):
    with pytest.raises(LitPruneError, match="eager"):
        pruned(PRUNERS[0], model=tiny_eager, proportional_attention="count")


def test_a_plugin_remembers_it(pruned, tiny_model, tmp_path):
    pruned(PRUNERS[0], proportional_attention="similarity").save_pretrained(tmp_path)
    assert Plugin.from_pretrained(tmp_path).options.proportional_attention == "similarity"
    again = VLM(tiny_model, None, "tiny").attach(tmp_path, proportional_attention="none")
    assert again.host.proportional is None
    assert again.plugin.settings()["proportional_attention"] == "none"
    again.detach()
    path = tmp_path / "mine.yaml"
    path.write_text("model: {pruner: {class_path: lit_prune.pruners.uniform.Uniform}, proportional_attention: count}")
    assert plugin_from_yaml(path).options.proportional_attention == "count"
