"""Beams, second turns, renumbered positions and proportional attention on decoders of many kinds."""

import pytest
import torch

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.laws import TOLERANCE, generate, longer, stages
from lit_prune.evaluation.laws import _alone_gap as alone_gap
from lit_prune.evaluation.laws import _cached_gap as cached_gap
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.parts import find
from lit_prune.host.positions import renumbers
from lit_prune.host.zoo.inputs import prompts
from lit_prune.host.zoo.shrink import listed, tiny_model
from lit_prune.pruners.uniform import Uniform
from lit_prune.vlm import VLM

KINDS = {
    "aria": "experts",
    "gemma3": "images whose tokens see each other both ways, beside windows",
    "kimi_k25": "latent attention",
    "lfm2_vl": "convolutions",
    "mistral3": "images of their own sizes, a text token behind each row",
    "qwen3_5": "linear attention, M-RoPE",
}
REFUSED = {("qwen3_5", "positions"): "M-RoPE", ("gemma3", "positions"): "one rotary embedding for all layers"}
FEW = {"gemma3", "lfm2_vl", "mistral3"}  # by default
OPTIONS = {"positions": "renumbered", "proportional_attention": "count"}
SOME = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FEW)) for kind in KINDS]


@pytest.fixture(scope="module")
def made():
    """A class's model, pruned at two stages, and its prompts; one of each, for all tests."""
    known = {}

    def of(kind, **options):
        if kind not in listed():
            pytest.skip(f"this version of transformers has no {kind}")
        if kind not in known:
            model = tiny_model(kind)
            known[kind] = VLM(model, None, kind), prompts(kind, model)
        vlm, given = known[kind]
        layers = stages(vlm.model)
        return vlm.attach(Uniform([layers[0], layers[-1]]), keep="50%", **options), given

    return of


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", SOME)
def test_options_of_the_host(made, kind, option):
    """Each sample as in a batch, and with its cache as without; the option changes what is computed."""
    vlm, given = made(kind)
    before = generate(vlm, given.batch()).logits
    if (reason := REFUSED.get((kind, option))) is not None:
        with pytest.raises(LitPruneError, match=reason):
            made(kind, **{option: OPTIONS[option]})
        return
    vlm, given = made(kind, **{option: OPTIONS[option]})
    assert (generate(vlm, given.batch()).logits - before).abs().max() > 10 * TOLERANCE
    assert alone_gap(vlm, given) <= TOLERANCE
    assert cached_gap(vlm, given) <= TOLERANCE


@pytest.mark.parametrize("kind", SOME)
def test_beams_of_a_batch_are_those_of_its_samples(made, kind):
    vlm, given = made(kind)
    together = generate(vlm, given.batch(), 3, num_beams=3).sequences[:, -3:]
    for row in range(3):
        assert generate(vlm, given.batch([row]), 3, num_beams=3).sequences[0, -3:].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", SOME)
def test_a_second_turn_on_the_pruned_cache(made, kind):
    """Equal to one forward over the dialogue, images and all."""
    vlm, given = made(kind)
    inputs, question = given.batch([0]), torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(7))
    first = generate(vlm, inputs)
    start, dialogue = inputs["input_ids"].shape[1], torch.cat([first.sequences, question], 1)
    again = {"input_ids": dialogue, "attention_mask": torch.ones_like(dialogue)}
    second = generate(vlm, {**again, cache_keyword(vlm.model): cache_of(first)}, 3)
    whole = longer(given, inputs, second.sequences, start)
    with torch.no_grad():
        expected = vlm.model(**whole, use_cache=False).logits[:, dialogue.shape[1] - 1 : -1]
    assert (expected - second.logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5", "qwen2_vl", "ernie4_5_vl_moe", "gemma3"])
def test_renumbering_is_refused_whether_the_configuration_names_sections_or_not(kind):
    with torch.device("meta"):
        assert not renumbers(find(tiny_model(kind)).decoder)
