"""ToMe, and sizes that a merging method returns: they enter attention in the tower and in the decoder."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from test_pruners import vision_context
from torch.nn.functional import normalize

from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.host.towers.masks import tower_mask
from lit_prune.host.vision import TowerPass
from lit_prune.pruners.base import Context, Kept, Pruner, VisionContext, VisionPruner
from lit_prune.pruners.tome import ToMe


def context(count: int, heads: int = 4, sizes: torch.Tensor | None = None) -> VisionContext:
    full = torch.ones(3, tiny.VISUAL, dtype=torch.bool)
    return replace(vision_context(), alive=full, count=torch.full((3,), count), heads=heads, sizes=sizes)


def by_hand(states: dict, keys: dict, sizes: dict, leave: int) -> tuple[dict, dict]:
    """One round of matching on one tile, token by token: {place: state} and {place: size} of what stays."""
    places = sorted(states)
    first, second = places[1::2], places[0::2]
    pairs = []
    for a in first:
        likeness = [(torch.dot(normalize(keys[a], dim=0), normalize(keys[b], dim=0)).item(), -b) for b in second]
        best, partner = max(likeness)
        pairs.append((best, -a, a, -partner))
    groups = {b: [b] for b in second}
    leaving = [(a, b) for _, _, a, b in sorted(pairs, reverse=True)[:leave]]
    for a, b in leaving:
        groups[b].append(a)
    gone = {a for a, _ in leaving}
    merged = {b: sum(sizes[i] * states[i] for i in group) / sum(sizes[i] for i in group) for b, group in groups.items()}
    total = {b: sum(sizes[i] for i in group) for b, group in groups.items()}
    return {p: merged.get(p, states[p]) for p in places if p not in gone}, {
        p: total.get(p, sizes[p]) for p in places if p not in gone
    }


@pytest.mark.parametrize("sized", [False, True])
def test_one_round_is_the_published_rule(sized):
    sizes = torch.rand(3, tiny.VISUAL, generator=torch.Generator().manual_seed(4)) + 1 if sized else None
    seen = context(24, sizes=sizes)
    kept = ToMe().prune_vision(seen)
    for tile in range(3):
        keys = {p: seen.keys[tile, p].view(4, -1).mean(0) for p in range(tiny.VISUAL)}
        states = dict(enumerate(seen.states[tile]))
        weights = dict(enumerate((torch.ones(3, tiny.VISUAL) if sizes is None else sizes)[tile].tolist()))
        expected, total = by_hand(states, keys, weights, tiny.VISUAL - 24)
        assert kept.mask[tile].nonzero()[:, 0].tolist() == sorted(expected)
        for place, state in expected.items():
            torch.testing.assert_close(kept.states[tile, place], state, rtol=1e-5, atol=1e-5)
            assert kept.sizes[tile, place].item() == pytest.approx(total[place], rel=1e-5)


@pytest.mark.parametrize("count", [1, 5, 17, 18, 35])
def test_the_count_is_reached_and_no_patch_is_lost(count):
    kept = ToMe().prune_vision(context(count))
    assert kept.mask.sum(1).tolist() == [count] * 3
    assert (kept.sizes * kept.mask).sum(1).tolist() == pytest.approx([tiny.VISUAL] * 3)
    mean = (kept.states * (kept.sizes * kept.mask)[..., None]).sum(1) / tiny.VISUAL
    torch.testing.assert_close(mean, context(count).states.mean(1), rtol=1e-4, atol=1e-5)


def test_as_many_pairs_merge_in_each_layer():
    assert ToMe().vision_schedule(64, 576, 23) == {i: 576 - round(512 * i / 23) for i in range(1, 24)}
    assert list(ToMe().vision_schedule(144, 144, 4).values()) == [144] * 4


# -- sizes enter attention --------------------------------------------------------------------------------------------
class Doubled(VisionPruner):
    """Keeps every second patch at the entrance and says that each stands for two."""

    def __init__(self, sized: bool) -> None:
        super().__init__((0,))
        self.sized = sized

    def prune_vision(self, context: VisionContext) -> Kept:
        mask = context.alive & (context.ordinal % 2 == 0)
        return Kept(mask, sizes=torch.full(mask.shape, 2.0) if self.sized else None)


def test_in_the_tower_a_patch_of_size_two_counts_twice(tiny_model, pruned):
    """An image of which every odd patch equals its even neighbour, without position codes: as if both were there."""
    inside = tiny_model.model.vision_tower
    places = inside.embeddings.position_embedding.weight
    before = places.detach().clone()
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    images = images.unflatten(3, (3, 2, 4))[:, :, :, :, :1].expand(-1, -1, -1, -1, 2, -1).flatten(3)
    try:
        with torch.no_grad():
            places[1:] = places[1:2]
            full = tiny_model.get_image_features(pixel_values=images, return_dict=True).pooler_output
            found = {}
            for sized in (True, False):
                vlm = pruned(Doubled(sized), keep=18)
                with vlm.using(Session()):
                    found[sized] = tiny_model.get_image_features(pixel_values=images, return_dict=True).pooler_output
                vlm.detach()
    finally:
        with torch.no_grad():
            places.copy_(before)
    for whole, merged, plain in zip(full, found[True], found[False], strict=True):
        assert tiny.gap(merged[::2], whole[::2]) < 1e-5
        assert tiny.gap(plain[::2], whole[::2]) > 1e-4


class Stands(Pruner):
    """Keeps every third visual token of the decoder, which stands for `size`."""

    def __init__(self, layers=(0,), size: float = 3.0) -> None:
        super().__init__(layers)
        self.size = size

    def prune(self, context: Context) -> Kept:
        mask = context.alive & (context.ordinal % 3 == 0)
        return Kept(mask, sizes=torch.full(mask.shape, self.size))


def test_in_the_decoder_sizes_reach_every_later_layer_and_decoding_step(tiny_model, pruned):
    """Cached decoding equals recomputation, size 1 changes nothing, size 3 does."""
    inputs, answers = tiny.batch(tiny.samples()), {}
    for size in (1.0, 3.0):
        vlm = pruned(Stands(size=size), keep=12)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
        options |= {"return_dict_in_generate": True}
        cached = torch.stack(tiny_model.generate(**inputs, **options).logits)
        again = torch.stack(tiny_model.generate(**inputs, **options, use_cache=False).logits)
        assert tiny.gap(cached, again) < 1e-4
        answers[size] = cached
        vlm.detach()
    vlm = pruned(type("Plain", (Stands,), {"prune": lambda self, c: Kept(Stands.prune(self, c).mask)})(), keep=12)
    plain = torch.stack(tiny_model.generate(**inputs, **options).logits)
    assert tiny.gap(answers[1.0], plain) < 1e-5
    assert tiny.gap(answers[3.0], plain) > 1e-4


def test_attention_that_takes_no_bias_is_refused(tiny_model, pruned, monkeypatch):
    tower = pruned(ToMe(), keep=8).host.tower
    monkeypatch.setattr(tiny_model.model.vision_tower.config, "_attn_implementation_internal", "flash_attention_2")
    merged = TowerPass(real=torch.ones(1, 8, dtype=torch.bool), sizes=torch.ones(1, 8))
    with pytest.raises(LitPruneError, match=r"log\(size\).*attn_implementation='sdpa'"):
        tower_mask(tower.tower.module.config, "ToMe", torch.zeros(1, 9, 32), merged, None)


def test_flops_are_those_of_the_rounds():
    flops = ToMe().vision_flops(torch.tensor([36, 36, 36]), torch.tensor([36, 24, 5]), 32, 4)
    rounds = [0, 18 * 18, 18 * 18 + 9 * 9 + 4 * 5]
    assert flops.tolist() == [2 * pairs * 8 for pairs in rounds]
    assert math.isfinite(flops.sum())
