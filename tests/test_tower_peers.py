"""Methods of the tower against slow re-statements of their formulas: one tile, one token at a time, float64."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host import host_of
from lit_prune.ops import graphs
from lit_prune.pruners.base import Context, Kept, VisionContext
from lit_prune.pruners.dcp import DCPPrune, TextAwareClusters
from lit_prune.pruners.downsample import Downsample
from lit_prune.pruners.id_selection import IDSelection
from lit_prune.pruners.prumerge import PruMergePlus
from lit_prune.pruners.scope import Scope
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.vlm import VLM

SIDE, WIDTH, COUNT = 6, 8, 7
TILES = range(3)


def context(count: int = COUNT, stage: int = 0, seed: int = 0) -> VisionContext:
    """Three tiles of 36 patches, of which the second and third miss some; places are those of the present ones."""
    draw = torch.Generator().manual_seed(seed)
    alive = torch.ones(3, SIDE**2, dtype=torch.bool)
    alive[1, 30:] = False
    alive[2, 20:] = False
    ordinal = torch.stack([torch.randperm(SIDE**2, generator=draw) for _ in TILES])
    ordinal = torch.where(alive, ordinal, SIDE**2).sort(1).values.clamp(max=SIDE**2 - 1)
    states, keys, values = (torch.randn(3, SIDE**2, WIDTH, generator=draw) for _ in range(3))
    # Groups of like patches with one offset for all, as a tower has them.
    states = states * 0.4 + states[:, :5][:, torch.arange(SIDE**2) % 5] + 1.0
    attention = (torch.randn(3, SIDE**2, generator=draw) * 1.5).masked_fill(~alive, -1e9).softmax(1)
    return VisionContext(stage, states, keys, values, attention, alive, ordinal, torch.full((3,), count), SIDE)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def present(found: VisionContext, tile: int) -> list[int]:
    return found.alive[tile].nonzero()[:, 0].tolist()


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda i: (-scores[i], i))[:count])


def check(kept: Kept, tile: int, expected: dict[int, Tensor] | list[int]) -> None:
    """The chosen tokens of a tile and, where they merge, their states."""
    assert kept.mask[tile].nonzero()[:, 0].tolist() == sorted(expected)
    if isinstance(expected, dict):
        for token, state in expected.items():
            torch.testing.assert_close(kept.states[tile, token].double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", TILES)
def test_visionzip(tile):
    """Dominant tokens; every eighth of the rest begins a group that the nearest join; means."""
    found, contextual = context(), round(COUNT * 0.4)
    tokens = present(found, tile)
    dominant = best({i: found.attention[tile, i].item() for i in tokens}, COUNT - contextual)
    rest = [i for i in tokens if i not in dominant]
    parts = [place * contextual // len(rest) for place in range(len(rest))]
    centres = [rest[parts.index(part)] for part in range(contextual)]
    groups = {centre: [found.states[tile, centre].double()] for centre in centres}
    for i in rest:
        if i not in centres:
            near = {c: cosine(found.keys[tile, i], found.keys[tile, c]) for c in centres}
            groups[max(near, key=near.get)].append(found.states[tile, i].double())
    expected = {i: found.states[tile, i].double() for i in dominant}
    expected |= {centre: sum(group) / len(group) for centre, group in groups.items()}
    check(VisionZip(contextual=0.4).prune_vision(found), tile, expected)


@pytest.mark.parametrize("tile", TILES)
def test_visionzip_as_the_authors(tile):
    """Keys averaged over two heads, a sample every floor(rest / contextual) tokens, and the mean of others on top."""
    found, contextual = replace(context(), heads=2), round(COUNT * 0.4)
    tokens, half = present(found, tile), WIDTH // 2
    keys = {i: (found.keys[tile, i, :half] + found.keys[tile, i, half:]) / 2 for i in tokens}
    dominant = best({i: found.attention[tile, i].item() for i in tokens}, COUNT - contextual)
    rest = [i for i in tokens if i not in dominant]
    assert len(rest) % contextual or tile == 2, "the data shall have a remainder"
    centres = rest[:: len(rest) // contextual][:contextual]
    groups: dict[int, list[Tensor]] = {centre: [] for centre in centres}
    for i in (i for i in rest if i not in centres):
        near = {c: cosine(keys[i], keys[c]) for c in centres}
        groups[max(near, key=near.get)].append(found.states[tile, i].double())
    expected = {i: found.states[tile, i].double() for i in dominant}
    for centre, group in groups.items():
        expected[centre] = found.states[tile, centre].double() + (sum(group) / len(group) if group else 0.0)
    check(VisionZip(contextual=0.4, merging="added").prune_vision(found), tile, expected)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gamma", [0.0, 3.0, 20.0])
def test_id_selection(tile, gamma):
    """Importance that decays with each pick, by the products of the formula."""
    found = context()
    tokens, state, picked = present(found, tile), found.states[tile], []
    score = {i: found.attention[tile, i].item() for i in tokens}
    for _ in range(COUNT):
        pick = max((i for i in tokens if i not in picked), key=score.get)
        picked.append(pick)
        score = {i: s * math.exp(-gamma * max(0.0, cosine(state[i], state[pick]))) for i, s in score.items()}
    check(IDSelection(gamma=gamma).prune_vision(found), tile, picked)
    assert (sorted(picked) == best({i: found.attention[tile, i].item() for i in tokens}, COUNT)) == (gamma == 0)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_scope(tile, power):
    """The largest gain in coverage times attention, pick after pick."""
    found = context()
    tokens, picked = present(found, tile), []
    state = found.states[tile]
    for _ in range(COUNT):
        gains = {}
        for j in (j for j in tokens if j not in picked):
            gain = 0.0
            for i in tokens:
                covered = max([0.0, *(cosine(state[i], state[p]) for p in picked)])
                gain += max(0.0, cosine(state[i], state[j]) - covered)
            gains[j] = gain * found.attention[tile, j].item() ** power
        picked.append(max(gains, key=gains.get))
    check(Scope(power=power).prune_vision(found), tile, picked)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("count", "extra"), [(3, 0), (12, 0), (3, 1), (12, 1)])
def test_prumerge_plus(tile, count, extra):
    """Outliers above the fence, others evenly, and the attention-weighted sum of the nearest by key."""
    found = context(count)
    tokens = present(found, tile)
    attention = {i: found.attention[tile, i].item() for i in tokens}
    ranked = sorted(attention.values())

    def quartile(share: float) -> float:
        place = share * (len(ranked) - 1)
        low = int(place)
        return ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])

    fence = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    outliers = best({i: a for i, a in attention.items() if a > fence}, count - extra)
    assert outliers, "the data shall have some"
    rest, wanted = [i for i in tokens if i not in outliers], count - extra - len(outliers)
    parts = [place * wanted // len(rest) for place in range(len(rest))]
    chosen = outliers + [rest[parts.index(part)] for part in range(wanted)]
    expected = {}
    for a in chosen:
        alike = {i: cosine(found.keys[tile, a], found.keys[tile, i]) for i in tokens if i != a}
        expected[a] = found.states[tile, a].double()
        for i in best(alike, 5):
            expected[a] = expected[a] + attention[i] * found.states[tile, i].double()
    if extra:
        dropped = [i for i in tokens if i not in chosen]
        expected[dropped[-1]] = sum(attention[i] * found.states[tile, i].double() for i in dropped)
    assert len(expected) == count
    check(PruMergePlus(neighbours=5, extra_token=bool(extra)).prune_vision(found), tile, expected)


def test_an_extra_token_needs_a_budget_of_two_and_something_dropped():
    one = PruMergePlus(extra_token=True).prune_vision(context(1))
    assert torch.equal(one.states[one.mask], PruMergePlus().prune_vision(context(1)).states[one.mask])
    whole = replace(context(), count=torch.tensor([36, 30, 7]))
    kept = PruMergePlus(extra_token=True).prune_vision(whole)
    assert kept.mask.sum(1).tolist() == [36, 30, 7]
    assert torch.equal(kept.states[:2], PruMergePlus().prune_vision(whole).states[:2])


class Shown(PruMergePlus):
    """Notes what it is shown."""

    def prune_vision(self, context: VisionContext) -> Kept:
        self.context = context
        return super().prune_vision(context)


@pytest.mark.parametrize("features", [-1, -2])
def test_attention_of_one_head_in_the_towers_last_layer(features):
    """Against that layer's projections, by loops; features of the last layer have none after it."""
    model, inputs = tiny.build_model(), tiny.batch(tiny.samples((45, 50)))
    model.config.vision_feature_layer = features
    shown = Shown(one_head=True, last_layer=True)
    VLM(model, None).attach(shown, keep=12)
    with torch.no_grad():
        model(**inputs)
        tower = model.model.vision_tower
        layer = getattr(tower, "vision_model", tower).encoder.layers[-1]
        host_of(model).detach()
        entered = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        query, keys = (part(layer.layer_norm1(entered)) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    for image in range(2):
        weights = [math.exp(dot(query[image, 0], key) / math.sqrt(32)) for key in keys[image]]
        expected = torch.tensor([weight / sum(weights) for weight in weights[1:]])
        assert tiny.gap(shown.context.attention[image], expected) < 1e-6
        assert tiny.gap(shown.context.keys[image], keys[image, 1:]) < 1e-5


@pytest.mark.parametrize(("keep", "side"), [(1, 1), (4, 2), (8, 3), (9, 3), (10, 4), (36, 6), (40, 6)])
def test_downsample(keep, side):
    assert Downsample().image_side(keep, SIDE) == side
    kept = Downsample().prune_vision(context(min(keep, 36)))
    assert kept.mask.sum(1).tolist() == [min(keep, n) for n in (36, 30, 20)]


# -- DCP-Prune ------------------------------------------------------------------------------------------------------
def shares(values: dict[int, float]) -> dict[int, float]:
    return {i: value / sum(values.values()) for i, value in values.items()}


def scores(found: VisionContext, tile: int, contrast: float) -> dict[int, float]:
    tokens, state = present(found, tile), found.states[tile]
    mean = sum(state[i].double() for i in tokens) / len(tokens)
    away = {i: 1 - cosine(state[i], mean) for i in tokens}
    away = shares({i: value - min(away.values()) for i, value in away.items()})
    length = {i: math.sqrt(dot(found.values[tile, i], found.values[tile, i])) for i in tokens}
    noticed = shares({i: found.attention[tile, i].item() * length[i] for i in tokens})
    return {i: (1 - contrast) * noticed[i] + contrast * away[i] for i in tokens}


def anchors(
    found: VisionContext, tile: int, score: dict[int, float], pruner: DCPPrune, count: int
) -> dict[int, Tensor]:
    """Anchors picked by score among what is left, then means of what is alike and near."""
    tokens, state = present(found, tile), found.states[tile].double()
    mean = sum(state[i] for i in tokens) / len(tokens)
    place = {i: divmod(found.ordinal[tile, i].item(), SIDE) for i in tokens}

    def alike(i: int, j: int) -> float:
        return cosine(state[i] - mean, state[j] - mean)

    def far(i: int, j: int) -> float:
        return sum((a - b) ** 2 for a, b in zip(place[i], place[j], strict=True)) / (2 * pruner.width**2)

    picked: list[int] = []
    for _ in range(count):
        worth = {}
        for i in (i for i in tokens if i not in picked):
            near = max([0.0, *(max(0.0, alike(i, a)) * math.exp(-far(i, a)) for a in picked)])
            worth[i] = score[i] * (1 - near)
        picked.append(max(worth, key=worth.get))
    moved = {}
    for a in picked:
        total, weight = state[a], 1.0
        for i in (i for i in tokens if i not in picked):
            w = pruner.strength * math.exp((alike(a, i) - 1) / pruner.temperature - far(a, i))
            total, weight = total + w * state[i], weight + w
        moved[a] = total / weight
    return moved


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("contrast", [0.0, 0.5, 1.0])
def test_acgr(tile, contrast):
    found, pruner = context(), DCPPrune(tatcs=False, contrast=contrast, width=1.5, strength=0.7, temperature=0.4)
    check(pruner.prune_vision(found), tile, anchors(found, tile, scores(found, tile, contrast), pruner, COUNT))


def test_scores_add_up_over_stages():
    """The second stage sees fewer tokens at other columns, and finds what the first one left by their places."""
    pruner, first = DCPPrune(tatcs=False, acgr=False, contrast=0.5), context(20)
    pruner.prune_vision(first)
    later = context(5, stage=1, seed=1)
    order = torch.arange(SIDE**2).flip(0).expand(3, -1)  # every place is there, so each was in the first stage or not
    later = VisionContext(
        1, later.states, later.keys, later.values, later.attention, torch.ones_like(later.alive), order, later.count,
        SIDE, first.memory,
    )  # fmt: skip
    kept = pruner.prune_vision(later)
    for tile in TILES:
        before = {first.ordinal[tile, i].item(): s for i, s in scores(first, tile, 0.5).items()}
        now = scores(later, tile, 0.5)
        total = {i: now[i] + before.get(later.ordinal[tile, i].item(), 0.0) for i in now}
        check(kept, tile, best(total, 5))


def test_the_trigger_is_kappa_of_plain_top_k():
    """Only tiles above the threshold let more through."""
    found = context()
    divergence = []
    for tile in TILES:
        tokens, state = present(found, tile), found.states[tile].double()
        chosen = best(scores(found, tile, 1.0), COUNT)
        total = 0.0
        for channel in range(WIDTH):
            every, some = ([state[i, channel].item() for i in group] for group in (tokens, chosen))
            (mu_f, var_f), (mu_k, var_k) = (
                (sum(v) / len(v), sum((x - sum(v) / len(v)) ** 2 for x in v) / len(v)) for v in (every, some)
            )
            total += math.log(var_f / var_k) + (var_k + (mu_k - mu_f) ** 2) / var_f - 1
        divergence.append(0.5 * total / WIDTH)
    middle = sorted(divergence)[1] + 1e-4
    pruner = DCPPrune(vision_layers=(-1,), vision_stage_ratios=(1.0,), threshold=middle, candidates=2.0)
    counts = [2 * COUNT if value > middle else COUNT for value in divergence]
    assert sorted(counts) == [COUNT, COUNT, 2 * COUNT]
    assert pruner.prune_vision(found).mask.sum(1).tolist() == counts


def decoder_context(count: int) -> Context:
    """Three samples of 20 visual places: 12, 12 and 5 arrived; questions of 4, 2 and 4 words."""
    draw = torch.Generator().manual_seed(3)
    visual, text = torch.randn(3, 20, WIDTH, generator=draw), torch.randn(3, 4, WIDTH, generator=draw)
    alive = torch.zeros(3, 20, dtype=torch.bool)
    for row, arrived in enumerate((12, 12, 5)):
        alive[row, torch.randperm(20, generator=draw)[:arrived]] = True
    text_mask = torch.ones(3, 4, dtype=torch.bool)
    text_mask[1, 2:] = False
    place, total, seed = torch.arange(20).expand(3, -1), torch.full((3,), 20), torch.zeros(3, dtype=torch.long)
    counts = torch.full((3,), count)
    return Context(0, visual, alive, place, text, text_mask, visual, text, None, counts, total, seed)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_tatcs(weight):
    """Facility location gives centres, text-aware likeness clusters, and each cluster one token."""
    found, count = decoder_context(5), 5
    kept = DCPPrune(text=weight).arrival.prune(found)
    assert kept.mask[2].tolist() == found.alive[2].tolist(), "what arrived within the budget stays"
    for row in (0, 1):
        tokens = found.alive[row].nonzero()[:, 0].tolist()
        states, words = found.visual_embeds[row], found.text_embeds[row][found.text_mask[row]]
        centres: list[int] = []
        for _ in range(count):
            gains = {}
            for j in (j for j in tokens if j not in centres):
                covered = {i: max([0.0, *(cosine(states[i], states[c]) for c in centres)]) for i in tokens}
                gains[j] = sum(max(0.0, cosine(states[i], states[j]) - covered[i]) for i in tokens)
            centres.append(max(gains, key=gains.get))
        asked = {i: torch.tensor([cosine(states[i], word) for word in words]) for i in tokens}

        def alike(i: int, j: int, states=states, asked=asked) -> float:
            return (1 - weight) * cosine(states[i], states[j]) + weight * cosine(asked[i], asked[j])

        clusters: dict[int, list[int]] = {c: [c] for c in centres}
        for i in (i for i in tokens if i not in centres):
            clusters[max(centres, key=lambda c: alike(i, c))].append(i)
        chosen = []
        for centre, members in clusters.items():
            worth = {i: (1 - weight) * alike(i, centre) + weight * asked[i].max().item() for i in members}
            chosen.append(max(worth, key=worth.get))
        assert kept.mask[row].nonzero()[:, 0].tolist() == sorted(chosen)


def test_of_two_tokens_that_cover_each_other_the_earlier_is_the_centre():
    """Their gains are equal: rounding, which differs from batch to batch, must not decide."""
    draw = torch.Generator().manual_seed(5)
    pairs = torch.nn.functional.normalize(torch.randn(200, 2, WIDTH, generator=draw).abs(), dim=-1)
    unit = torch.cat([pairs, -pairs.mean(1, keepdim=True)], 1)
    unit = torch.nn.functional.normalize(unit, dim=-1)
    alike = graphs.cosines(unit)
    assert torch.equal(alike, alike.transpose(1, 2))
    assert torch.allclose(alike, unit @ unit.transpose(1, 2), atol=1e-6)
    every = torch.ones(200, 3, dtype=torch.bool)
    centres = graphs.facility_location(alike, every.float(), every, torch.full((200,), 2), every.float())
    assert (centres == torch.tensor([True, False, True])).all()


def test_clusters_without_a_question():
    """No word at all, and a question of some samples only: those without one choose by the tokens alone."""
    found = decoder_context(5)
    nothing = replace(found, text=found.text[:, :0], text_embeds=found.text[:, :0], text_mask=found.text_mask[:, :0])
    plain = DCPPrune(text=0.0).arrival.prune(found).mask
    kept = DCPPrune(text=0.5).arrival.prune(nothing).mask
    assert kept.sum(1).tolist() == plain.sum(1).tolist() == [5, 5, 5]
    blank = replace(found, text_mask=torch.zeros_like(found.text_mask))
    assert torch.equal(DCPPrune(text=0.5).arrival.prune(blank).mask, kept)
    assert torch.equal(kept, plain)


def test_halves_can_be_switched_off():
    found, options = context(), {"vision_layers": (-1,), "vision_stage_ratios": (1.0,), "threshold": 0.0}
    neither = DCPPrune(acgr=False, tatcs=False, **options).prune_vision(found)
    assert neither.states is None
    for tile in TILES:
        check(neither, tile, best(scores(found, tile, 1.0), COUNT))
    assert DCPPrune(acgr=False, tatcs=True, **options).prune_vision(found).mask.sum(1).tolist() == [14, 14, 14]
    assert DCPPrune(acgr=True, tatcs=False, **options).prune_vision(found).mask.sum(1).tolist() == [7, 7, 7]


def test_an_anchor_with_nothing_alike_nearby_stays_as_it_is():
    found = context()
    states = found.states.clone()
    states[:, 3] = -20.0
    found = VisionContext(0, states, *(getattr(found, name) for name in (
        "keys", "values", "attention", "alive", "ordinal", "count", "side")))  # fmt: skip
    kept = DCPPrune(tatcs=False, temperature=0.05).prune_vision(found)
    assert kept.mask[:, 3].all()
    torch.testing.assert_close(kept.states[:, 3], states[:, 3])


def test_without_width_spread_is_top_k():
    found = context()
    values = torch.rand(3, SIDE**2, generator=torch.Generator().manual_seed(6))
    unit = graphs.centred(found.states, found.alive)
    kept = graphs.spread(values, unit, found.ordinal, SIDE, 1e-3, found.alive, found.count)
    for tile in TILES:
        check(Kept(kept), tile, best({i: values[tile, i].item() for i in present(found, tile)}, COUNT))


@pytest.mark.parametrize("wrong", [{"vision_layers": (0, -1)}, {"temperature": 0.0}, {"candidates": 0.5}])
def test_arguments_that_mean_nothing_are_refused(wrong):
    with pytest.raises(LitPruneError):
        DCPPrune(**wrong)


def test_triggered_and_other_samples_share_a_batch(tiny_model, pruned):
    """Some samples bring more than the budget to layer 0: filler there, the budget behind, each as if alone."""
    found: list[Tensor] = []

    class Watched(TextAwareClusters):
        def prune(self, context: Context) -> Kept:
            found.append(context.alive.sum(1))
            return super().prune(context)

    options = {"vision_layers": (1, -1), "vision_stage_ratios": (2.0, 1.0), "vision_depth": 2, "candidates": 2.0}
    thresholds = [0.02 * 1.15**step for step in range(40)]
    for threshold in thresholds:
        found.clear()
        method = DCPPrune(threshold=threshold, **options)
        method.arrival = Watched()
        vlm = pruned(method, keep=6)
        together, record = tiny.forward(vlm, tiny.batch(tiny.samples()))
        if len(set(found[0].tolist())) == 2:
            break
        vlm.detach()
    assert sorted(set(found[0].tolist())) == [6, 12]
    assert record.trace.average_visual().tolist() == [6] * 3
    for row, sample in enumerate(tiny.samples()):
        alone, _ = tiny.forward(vlm, tiny.batch([sample]))
        length = alone.shape[1]
        assert tiny.gap(alone[0], together[row, -length:]) < tiny.TOLERANCE


def test_clusters_are_priced(tiny_model, pruned):
    """Two stages of recovery and clusters that are always triggered; the price is the counter's."""
    from test_cost import agree, counted

    from lit_prune.cost.flops import price

    vlm = pruned(
        DCPPrune(threshold=-1.0, vision_layers=(1, -1), vision_stage_ratios=(3.0, 1.0), vision_depth=2), keep=6
    )
    counts, record = counted(vlm, {**tiny.batch(tiny.samples((50,))), "logits_to_keep": 1})
    assert record.trace.stages[0].visual.tolist() == [12]
    del counts["vision"]  # the counter has the stages' own arithmetic there
    agree(counts, price(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair))
