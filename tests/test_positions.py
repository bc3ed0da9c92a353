"""Positions without gaps: what renumbering means, and that caches, batches and masks still agree."""

import json
import logging

import pytest
import tiny
import torch
from families import FAMILIES
from test_equality import (
    cached_decoding_equals_recomputation,
    dialogue_equals_one_forward,
    keep_all_is_the_plain_model,
    mixed_batch_equals_its_samples,
)
from tiny import DEPTH, IMAGE, PRUNERS, TOLERANCE, VISUAL, batch, forward, gap, generate, real_text, samples

from lit_prune.errors import LitPruneError
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.options import HostOptions
from lit_prune.plugin import SETTINGS, Plugin
from lit_prune.pruners.base import Context, Kept, Pruner
from lit_prune.pruners.uniform import Uniform
from lit_prune.vlm import VLM, plugin_from_yaml

NEW = {"positions": "renumbered"}
# A learned method with three stages, one stage that reads the layer before, one that reads its own, one in the tower.
SOME = [path for path in PRUNERS if path.stem in ("rcp", "fastv", "text_attention", "visionzip")]
EACH = pytest.mark.parametrize("pruner", SOME, ids=lambda path: path.stem)


def test_the_methods_are_there():
    assert len(SOME) == 4


def chosen(counts: tuple[int, ...]) -> torch.Tensor:
    """Tokens to keep at one stage, by place, other ones for each sample."""
    generator = torch.Generator().manual_seed(4)
    keep = torch.zeros(len(counts), VISUAL, dtype=torch.bool)
    for row, count in enumerate(counts):
        keep[row, torch.randperm(VISUAL, generator=generator)[:count]] = True
    return keep


class PerSample(Pruner):
    """Keeps the tokens that it is told to keep, a row for each sample, at one stage."""

    def __init__(self, layer: int, keep: torch.Tensor) -> None:
        super().__init__([layer])
        self.kept = keep

    def prune(self, context: Context) -> Kept:
        return Kept(self.kept.gather(1, context.ordinal) & context.alive)


@EACH
def test_keep_all_is_the_plain_model(tiny_model, pruned, pruner):
    keep_all_is_the_plain_model(tiny_model, lambda: pruned(pruner, keep=VISUAL, **NEW), batch(samples()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pruned_at_layer_0_it_is_the_plain_model_on_a_shorter_prompt(tiny_model, pruned, side):
    """Embeddings without the dropped ones, positions 0 to n - 1, one sample at a time, then greedy decoding."""
    prompts, keep = samples(), chosen((7, 12, 12))
    inputs, embeds = batch(prompts, side), []
    handle = tiny_model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        tiny_model(**inputs)
    handle.remove()
    vlm = pruned(PerSample(0, keep), **NEW)
    with torch.no_grad():
        found = forward(vlm, inputs, repair=False)[0]
        original = forward(pruned(PerSample(0, keep)), inputs, repair=False)[0]
    vlm.detach()
    for row, (ids, _) in enumerate(prompts):
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[ids == IMAGE] = keep[row]
        real = inputs["attention_mask"][row].bool()
        short = embeds[0][row][real][stays][None]
        with torch.no_grad():
            logits = tiny_model(inputs_embeds=short, position_ids=torch.arange(short.shape[1])[None]).logits[0]
        words = (ids != IMAGE)[stays]
        assert gap(found[row][real][stays][words], logits[words]) <= TOLERANCE
        assert gap(original[row][real][stays][-1], logits[-1]) > 0.1, "the original positions are others"


@EACH
def test_decoding_goes_on_from_the_new_length(pruned, pruner):
    inputs = batch(samples())
    out = cached_decoding_equals_recomputation(pruned(pruner, **NEW), inputs)
    old = generate(pruned(pruner, positions="original"), inputs)
    assert gap(old.logits[:, 0], out.logits[:, 0]) > 0.05


def test_each_layer_has_its_own_numbers(tiny_model, pruned):
    """Before the first stage the plain model's, behind a stage those of its tokens, also for generated tokens."""
    vlm, ropes = pruned(Uniform([2, 5], [2.0, 1.0]), keep={2: 20, 5: 6}, **NEW), []
    inputs = batch(samples((45, 52)))

    def seen(module, args, kwargs):
        ropes.append(kwargs["position_embeddings"][0])

    handles = [
        tiny_model.model.language_model.layers[layer].register_forward_pre_hook(seen, with_kwargs=True)
        for layer in (1, 2, 4, 5, 7)
    ]
    generate(vlm, inputs, tokens=2)
    for handle in handles:
        handle.remove()
    rotary, less = tiny_model.model.language_model.rotary_emb, (0, VISUAL - 20, VISUAL - 20, VISUAL - 6, VISUAL - 6)
    for rope, gone in zip(ropes[:5], less, strict=True):
        for row, length in enumerate((45, 52)):
            expected = rotary(rope, torch.arange(length - gone)[None])[0][0]
            assert torch.equal(rope.expand(2, -1, -1)[row, -len(expected) :], expected)
    for rope, gone in zip(ropes[5:], less, strict=True):
        assert torch.equal(rope.expand(2, -1, -1), rotary(rope, torch.tensor([[45], [52]]) - gone)[0])


@EACH
def test_masking_equals_dropping(pruned, pruner):
    """Hidden tokens have numbers too, but nobody sees them."""
    inputs = batch(samples(), answers=4)
    vlm = pruned(pruner, **NEW)
    text = real_text(inputs)
    assert gap(forward(vlm, inputs)[0][text], forward(vlm, inputs, soft=True, eps=1e-30)[0][text]) <= TOLERANCE


@EACH
def test_generation_of_a_mixed_batch_equals_its_samples_alone(pruned, pruner):
    mixed_batch_equals_its_samples(pruned(pruner, **NEW))


@EACH
def test_second_turn_goes_on_from_the_new_length(pruned, pruner):
    inputs, question = batch(samples()), torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(7))
    dialogue_equals_one_forward(pruned(pruner, **NEW), inputs, question)


def test_a_second_image_goes_on_from_the_new_length(pruned):
    """An image in a later turn: the cache's numbers and this forward's are both less."""
    first, second = samples((45, 50), seed=1), samples((44, 47), seed=9)
    vlm = pruned(Uniform([2, 5], [2.0, 1.0]), **NEW)
    out = generate(vlm, batch(first), tokens=4)
    new = batch(second[:1])
    with torch.no_grad():
        alone = generate(vlm, batch(first[:1]), tokens=4)
        cached = forward_on(vlm, alone, new)
        both = forward_on(vlm, out, {name: torch.cat([part, part]) for name, part in new.items()})
    assert gap(cached[0], both[0]) <= TOLERANCE
    state = cache_of(alone).lit_prune
    assert state.removed[2].tolist() == [2 * (VISUAL - vlm.host.schedule[2])]
    assert state.removed[5].tolist() == [2 * (VISUAL - vlm.host.schedule[5])]


def forward_on(vlm, out, new):
    """Logits of new columns on a generated sequence's cache."""
    before = (out.sequences != tiny.PAD).long()[:, :-1]
    mask = torch.cat([before, new["attention_mask"]], 1)
    start = before.sum(1, keepdim=True)
    positions = start + torch.arange(new["input_ids"].shape[1])
    return vlm.model(
        **{**new, "attention_mask": mask}, position_ids=positions, **{cache_keyword(vlm.model): cache_of(out)}
    ).logits


@pytest.mark.parametrize("name", [name for name in FAMILIES if "qwen" in name])
def test_tokens_with_several_positions_are_refused(name):
    with pytest.raises(LitPruneError, match="M-RoPE"):
        VLM(FAMILIES[name].build(), None).attach(Uniform([DEPTH // 2]), keep=12, **NEW)


def test_a_file_asks_for_what_a_model_may_not_have(caplog):
    """Shipped methods run on models with several positions per token too, and say that these stay."""
    vlm = VLM(FAMILIES[next(name for name in FAMILIES if "qwen" in name)].build(), None)
    with caplog.at_level(logging.WARNING, "lit_prune"):
        vlm.attach(tiny.ROOT / "configs" / "pruners" / "divprune.yaml", keep=12)
    assert vlm.host.renumbering is None
    assert vlm.plugin.options.positions == "original"
    assert len(caplog.messages) == 1
    assert "original positions" in caplog.messages[0]


RENUMBERED = {"cdpruner", "divprune", "id_selection", "prumerge_plus", "pyramiddrop", "scope", "sparsevlm", "tops"}


def test_files_have_the_authors_positions():
    """A title says where a method's positions are not its authors'."""
    for path in PRUNERS:
        plugin = plugin_from_yaml(path)
        expected = "renumbered" if path.stem in RENUMBERED | {"visionzip"} else "original"
        assert plugin.options.positions == plugin.pruner.positions == expected, path.stem
        assert "positions" not in plugin.title
    plugin = plugin_from_yaml(tiny.ROOT / "configs" / "pruners" / "scope.yaml")
    plugin.options = HostOptions("original", "count")
    assert plugin.title == "SCOPE, original positions, proportional attention"
    plugin = plugin_from_yaml(tiny.ROOT / "configs" / "pruners" / "fastv.yaml")
    plugin.options = HostOptions("renumbered")
    assert plugin.title == "FastV, renumbered positions"


def test_a_plugin_remembers_it(pruned, tiny_model, tmp_path):
    """Older folders say nothing and mean the original positions; an argument overrides."""
    pruned(PRUNERS[0], **NEW).save_pretrained(tmp_path)
    assert Plugin.from_pretrained(tmp_path).options.positions == "renumbered"
    again = VLM(tiny_model, None, "tiny")
    assert again.attach(tmp_path).host.renumbering is not None
    assert again.attach(tmp_path, positions="original").host.renumbering is None
    again.detach()
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"positions": "backwards"}))
    with pytest.raises(LitPruneError, match=r"plugin\.json: positions: 'backwards' is not one of original, renumbered"):
        Plugin.from_pretrained(tmp_path)
    del settings["positions"]
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    assert Plugin.from_pretrained(tmp_path).options.positions == "original"


def test_a_yaml_may_say_so(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {pruner: {class_path: lit_prune.pruners.uniform.Uniform}, positions: renumbered}")
    assert plugin_from_yaml(path).options.positions == "renumbered"
    path.write_text("model: {pruner: {class_path: lit_prune.pruners.uniform.Uniform}, positions: backwards}")
    with pytest.raises(LitPruneError, match=r"mine\.yaml"):
        plugin_from_yaml(path)
