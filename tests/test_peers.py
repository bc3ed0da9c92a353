"""Published methods against slow, literal re-statements of their formulas: plain loops in float64."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import VISUAL, WIDTH, batch, forward, samples
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.ops.merging import density_peaks
from lit_prune.ops.selection import Images, share
from lit_prune.pruners.base import Context, Kept
from lit_prune.pruners.by_image import BY_TOKEN
from lit_prune.pruners.cdpruner import CDPruner
from lit_prune.pruners.dart import DART
from lit_prune.pruners.divprune import DivPrune
from lit_prune.pruners.pyramiddrop import PyramidDrop
from lit_prune.pruners.sparsevlm import SparseVLM
from lit_prune.pruners.tops import TOPS

COUNTS = (9, 14, 5, 60)  # of 24, 19, 24 and 12 alive ones
TOKENS, WORDS = 24, 6


def context(**changes) -> Context:
    """Four samples with their own counts; some tokens are gone or filler, some words are filler."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator, dtype=torch.float64)

    alive = torch.ones(4, TOKENS, dtype=torch.bool)
    alive[1, ::5] = False
    alive[3, 12:] = False
    made = {
        "stage": 0,
        "visual": draw(TOKENS, WIDTH),
        "alive": alive,
        "ordinal": torch.arange(TOKENS).expand(4, -1),
        "text": draw(WORDS, WIDTH),
        "text_mask": torch.arange(WORDS) < torch.tensor([6, 4, 2, 1])[:, None],
        "visual_embeds": draw(TOKENS, WIDTH),
        "text_embeds": draw(WORDS, WIDTH),
        "attention": draw(TOKENS).softmax(-1),
        "count": torch.tensor(COUNTS),
        "total": torch.full((4,), TOKENS),
        "seed": torch.arange(4),
        "states": draw(TOKENS, WIDTH),
        "visual_keys": draw(TOKENS, 32),
        "text_keys": draw(WORDS, 32),
        "row_attention": draw(WORDS, TOKENS).softmax(-1),
    }
    return Context(**made | changes)


def alive_of(seen: Context, row: int) -> list[int]:
    return seen.alive[row].nonzero()[:, 0].tolist()


def words_of(seen: Context, row: int) -> list[int]:
    return seen.text_mask[row].nonzero()[:, 0].tolist()


def kept_by(pruner, seen: Context) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in pruner.prune(seen).mask]


def cosine(a: Tensor, b: Tensor) -> float:
    dot, aa, bb = (sum(x * y for x, y in zip(p.tolist(), q.tolist(), strict=True)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


# -- PyramidDrop ----------------------------------------------------------------------------------------------------
def test_pyramiddrop_reads_the_last_row_of_the_layer_that_it_cuts(tiny_eager, pruned):
    """Against the attention matrix of the plain model: first stage, by loops over heads and tokens."""
    inputs = batch(samples())
    _, record = forward(pruned(PyramidDrop([2, 4], [2.0, 1.0]), keep=20), inputs, repair=False)
    with torch.no_grad():
        heads = tiny_eager(**inputs, output_attentions=True).attentions[2].double()
    for row, ids in enumerate(inputs["input_ids"]):
        image = (ids == tiny.IMAGE).nonzero()[:, 0].tolist()
        score = [sum(heads[row, head, -1, column].item() for head in range(4)) / 4 for column in image]
        count = int(record.stages[0].kept[row].sum())
        best = sorted(range(VISUAL), key=lambda token: -score[token])[:count]
        assert set(record.stages[0].kept[row].nonzero()[:, 0].tolist()) == set(best)


def test_pyramiddrop_halves():
    """The paper's own counts where the budget is theirs: 576, 288, 144 and 72 tokens over eight layers each."""
    assert PyramidDrop().schedule(270, 576, 32) == {8: 288, 16: 144, 24: 72}


def test_pyramiddrop_below_its_first_segment():
    with pytest.raises(LitPruneError, match=r"at least 144\.8"):
        PyramidDrop().schedule(144, 576, 32)


# -- DivPrune -------------------------------------------------------------------------------------------------------
def divprune_by_hand(seen: Context, row: int, count: int) -> list[int]:
    """Picks in order."""
    tokens, states = alive_of(seen, row), seen.visual_embeds[row]
    distance = {(i, j): 1 - cosine(states[i], states[j]) for i in tokens for j in tokens}
    picks = [max(tokens, key=lambda i: min(distance[i, j] for j in tokens if j != i))]
    while len(picks) < min(count, len(tokens)):
        rest = [i for i in tokens if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i, j] for j in picks)))
    return picks


def test_divprune_picks_what_its_formula_picks():
    seen = context()
    picks = [divprune_by_hand(seen, row, count) for row, count in enumerate(COUNTS)]
    assert kept_by(DivPrune(), seen) == [set(tokens) for tokens in picks]
    scores = DivPrune().score(seen)
    for row, tokens in enumerate(picks):
        assert scores[row].masked_fill(~seen.alive[row], -9).argsort(descending=True)[: len(tokens)].tolist() == tokens


def test_divprune_starts_the_same_whatever_the_blocks(monkeypatch):
    seen = context()
    kept = kept_by(DivPrune(), seen)
    monkeypatch.setattr("lit_prune.pruners.divprune.BLOCK", 5)
    assert kept_by(DivPrune(), seen) == kept


# -- CDPruner -------------------------------------------------------------------------------------------------------
def cdpruner_by_hand(seen: Context, row: int, count: int, sign: int = 1) -> set[int]:
    """The determinants themselves: each pick makes that of the kernel over the picks as large as it can be."""
    tokens, states = alive_of(seen, row), seen.visual_embeds[row]
    words = [seen.text_embeds[row, word] for word in words_of(seen, row)]
    raw = {i: sign * sum(cosine(states[i], word) for word in words) / len(words) for i in tokens}
    low, high = min(raw.values()), max(raw.values())
    relevance = {i: (raw[i] - low) / (high - low) if sign else 1.0 for i in tokens}

    def volume(chosen: list[int]) -> float:
        kernel = [[relevance[i] * cosine(states[i], states[j]) * relevance[j] for j in chosen] for i in chosen]
        return torch.tensor(kernel, dtype=torch.float64).det().item()

    picks: list[int] = []
    while len(picks) < min(count, len(tokens)):
        picks.append(max((i for i in tokens if i not in picks), key=lambda i: volume([*picks, i])))
    return set(picks)


def test_cdpruner_picks_what_its_formula_picks():
    seen = context()
    chosen = {}
    for name, sign in (("similar", 1), ("dissimilar", -1), ("none", 0)):
        chosen[name] = kept_by(CDPruner(relevance=name), seen)
        assert chosen[name] == [cdpruner_by_hand(seen, row, count, sign) for row, count in enumerate(COUNTS)]
    assert kept_by(CDPruner(), seen) == chosen["similar"]
    for row in (0, 1, 2):  # the last sample keeps all
        assert len({frozenset(rows[row]) for rows in chosen.values()}) == 3


def test_cdpruner_after_all_directions_are_taken_goes_by_relevance():
    """Tokens in a plane: two picks span it, the rest of the count is by relevance."""
    seen = context()
    plane = seen.visual_embeds.clone()
    plane[..., 2:] = 0
    seen = replace(seen, visual_embeds=plane, count=torch.full((4,), 6))
    pruner = CDPruner()
    scores = pruner.score(seen)
    unit = torch.nn.functional.normalize(plane.float(), dim=-1)
    relevance = pruner._relevance(unit, seen).masked_fill(~seen.alive, -1)
    for row, kept in enumerate(kept_by(pruner, seen)):
        first = set(scores[row].argsort(descending=True)[:2].tolist())
        rest = [i for i in relevance[row].argsort(descending=True).tolist() if i not in first][:4]
        assert kept == first | set(rest)


# -- DART -----------------------------------------------------------------------------------------------------------
def dart_by_hand(seen: Context, row: int, count: int) -> set[int]:
    def by_norm(tokens: list[int], keys: Tensor) -> list[int]:
        return sorted(tokens, key=lambda i: -sum(abs(x) for x in keys[i].tolist()))

    tokens, count = alive_of(seen, row), min(count, len(alive_of(seen, row)))
    visual = by_norm(tokens, seen.visual_keys[row])[: min(4, count)]
    words = by_norm(words_of(seen, row), seen.text_keys[row])[:4]
    pivots = [seen.visual[row, i] for i in visual] + [seen.text[row, i] for i in words]
    kept = set(visual)
    parts, left_over = divmod(count - len(visual), len(pivots))
    for index, pivot in enumerate(pivots):
        rest = sorted((i for i in tokens if i not in kept), key=lambda i: cosine(seen.visual[row, i], pivot))
        kept |= set(rest[: parts + (index < left_over)])
    return kept


@pytest.mark.parametrize("counts", [COUNTS, (3, 4, 21, 1)])
def test_dart_keeps_what_its_formula_keeps(counts):
    seen = context(count=torch.tensor(counts))
    assert kept_by(DART(), seen) == [dart_by_hand(seen, row, count) for row, count in enumerate(counts)]


def test_dart_reads_its_own_layers_keys(tiny_model):
    """Before their rotation, heads side by side, of visual and question tokens: what the layer's projection gives."""
    seen: list[Context] = []

    class Spy(DART):
        def prune(self, context: Context) -> Kept:
            seen.append(context)
            return Kept(context.alive)

    inputs, projected = batch(samples()), []
    projection = tiny_model.model.language_model.layers[3].self_attn.k_proj
    handle = projection.register_forward_hook(lambda module, args, output: projected.append(output))
    vlm = tiny.attach(tiny_model, Spy([3]), keep=20, shaken=False)
    forward(vlm, inputs, repair=False)
    vlm.detach()
    handle.remove()
    keys = projected[-1]  # the layer itself; nothing was dropped before it
    for row, ids in enumerate(inputs["input_ids"]):
        image = ids == tiny.IMAGE
        assert tiny.gap(seen[0].visual_keys[row], keys[row, image]) < 1e-5
        question = keys[row, image.nonzero()[-1, 0] + 1 :]
        assert tiny.gap(seen[0].text_keys[row][seen[0].text_mask[row]], question) < 1e-5


# -- SparseVLM ------------------------------------------------------------------------------------------------------
def sparsevlm_score_by_hand(seen: Context, row: int) -> dict[int, float]:
    tokens, words = alive_of(seen, row), words_of(seen, row)
    similarity = dict.fromkeys(words, 0.0)
    for i in tokens:
        products = {j: (seen.visual_embeds[row, i] * seen.text_embeds[row, j]).sum().item() for j in words}
        total = sum(math.exp(p - max(products.values())) for p in products.values())
        for j in words:
            similarity[j] += math.exp(products[j] - max(products.values())) / total / len(tokens)
    mean = sum(similarity.values()) / len(words)
    raters = [j for j in words if similarity[j] >= mean - 1e-12]
    return {i: sum(seen.row_attention[row, j, i].item() for j in raters) / len(raters) for i in tokens}


def density_peaks_by_hand(states: dict[int, Tensor], clusters: int, neighbours: int | None = 5) -> dict[int, list[int]]:
    """{centre: its members}, by the exponentials and products of the formula; None: as in the authors' code."""
    tokens = list(states)
    squared = {(i, j): sum(x * x for x in (states[i] - states[j]).tolist()) for i in tokens for j in tokens}
    unit = math.sqrt(sum(squared.values()) / len(squared)) or 1.0
    if neighbours is None:
        unit = math.sqrt(len(states[tokens[0]]))
    distance = {pair: math.sqrt(value) / unit for pair, value in squared.items()}
    rho, delta = {}, {}
    for i in tokens:
        others = [j for j in tokens if neighbours is None or j != i]
        nearest = sorted(distance[i, j] for j in others)[: neighbours or clusters]
        rho[i] = math.exp(-sum(d * d for d in nearest) / max(1, len(nearest)))
    for i in tokens:
        denser = [distance[i, j] for j in tokens if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta[i] = min(denser) if denser else max(distance[i, j] for j in tokens)
    centres = sorted(tokens, key=lambda i: -rho[i] * delta[i])[:clusters]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in tokens:
        members[i if i in centres else min(centres, key=lambda c: distance[i, c])].append(i)
    return members


def sparsevlm_by_hand(
    seen: Context, row: int, count: int, neighbours: int | None = 5, added: bool = False
) -> dict[int, Tensor]:
    """{kept token: its state}."""
    score = sparsevlm_score_by_hand(seen, row)
    order = sorted(score, key=lambda i: -score[i])
    candidates = int(0.3 * max(0, len(order) - count) + 1e-9)
    clusters = min(candidates // 3 + 1, candidates, candidates if added else count // 2)
    kept_plain = count if added else count - clusters
    best, rest = order[:kept_plain], order[kept_plain:]
    kept = {i: seen.states[row, i] for i in best}
    if clusters:
        members = density_peaks_by_hand(
            {i: seen.states[row, i] for i in sorted(rest[:candidates])}, clusters, neighbours
        )
        kept |= {c: sum(seen.states[row, i] for i in group) / len(group) for c, group in members.items()}
    return kept


AUTHORS = {"neighbours": None, "distance": "width"}


@pytest.mark.parametrize("counts", [COUNTS, (2, 6, 1, 3)])
@pytest.mark.parametrize("form", [{}, AUTHORS, {**AUTHORS, "added": True}], ids=["ours", "authors", "added"])
def test_sparsevlm_keeps_and_recycles_what_its_formula_says(counts, form):
    """Three tokens a cluster, so that there are several."""
    seen = context(count=torch.tensor(counts))
    kept = SparseVLM(per_cluster=3, **form).prune(seen)
    scores = SparseVLM().score(seen)
    recycled = 0
    for row, count in enumerate(counts):
        by_hand = sparsevlm_by_hand(seen, row, count, form.get("neighbours", 5), form.get("added", False))
        assert set(kept.mask[row].nonzero()[:, 0].tolist()) == set(by_hand)
        for token, state in by_hand.items():
            assert tiny.gap(kept.states[row, token], state) < 1e-5
            recycled += tiny.gap(kept.states[row, token], seen.states[row, token]) > 0.1
        for token, score in sparsevlm_score_by_hand(seen, row).items():
            assert scores[row, token].item() == pytest.approx(score, abs=1e-6)
    assert recycled >= 2


def test_recycled_tokens_that_are_added_are_counted(pruned):
    """The budget of the counts is 12; what a forward spends is more, by the tokens that are there."""
    vlm = pruned(SparseVLM([0], [1.0], per_cluster=2, added=True), keep=12, shaken=False)
    _, record = forward(vlm, batch(samples()), repair=False)
    candidates = int(0.3 * (VISUAL - 12))
    assert record.stages[0].kept.sum(1).tolist() == [12 + candidates // 2 + 1] * 3
    assert record.trace.average_visual().tolist() == [12 + candidates // 2 + 1] * 3
    assert (record.trace.excess() == candidates // 2 + 1).all()


def test_density_peaks_of_many_tokens():
    """Four clouds, their middles far apart, and filler; the same where states are as long as micro's."""
    generator = torch.Generator().manual_seed(0)
    clouds = torch.arange(24) % 4
    middles = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    features = middles[clouds] + 0.1 * torch.randn(2, 24, 16, generator=generator, dtype=torch.float64)
    real = torch.arange(24) < torch.tensor([24, 17])[:, None]
    centres, centre = density_peaks(features, real, torch.tensor([4, 3]), 5)
    for row, clusters in enumerate((4, 3)):
        tokens = real[row].nonzero()[:, 0].tolist()
        by_hand = density_peaks_by_hand({i: features[row, i] for i in tokens}, clusters)
        assert set(centres[row].nonzero()[:, 0].tolist()) == set(by_hand)
        assert all(centre[row, i] == c for c, group in by_hand.items() for i in group)
    assert sorted(clouds[centres[0]].tolist()) == [0, 1, 2, 3]
    assert torch.equal(density_peaks(1e3 * features, real, torch.tensor([4, 3]), 5)[0], centres)


def test_sparsevlm_puts_means_into_the_sequence(tiny_model):
    """The layer gets the means at their centres' columns, rotated as those were; the kept ones are untouched."""
    decisions: list[tuple[Context, Kept]] = []

    class Spy(SparseVLM):
        def prune(self, context: Context) -> Kept:
            decisions.append((context, super().prune(context)))
            return decisions[-1][1]

    inputs, entered = batch(samples((50,))), []
    vlm = tiny.attach(tiny_model, Spy([2], [1.0], per_cluster=2), keep=17, shaken=False)
    layer = tiny_model.model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args[0], kwargs["position_embeddings"])), with_kwargs=True
    )
    forward(vlm, inputs, repair=False)
    handle.remove()
    vlm.detach()
    (seen, kept), (hidden, rope) = decisions[0], entered[0]
    tokens = kept.mask[0].nonzero()[:, 0]
    assert torch.equal(hidden[0, 2 : 2 + len(tokens)], kept.states[0, tokens])
    assert (kept.states[0, tokens] != seen.states[0, tokens]).any(1).sum() >= 2
    with torch.no_grad():
        full = tiny_model.model.language_model.rotary_emb(hidden, torch.arange(50)[None])
    assert torch.equal(rope[0][0, 2 : 2 + len(tokens)], full[0][0, tokens + 2])


# -- TOPS -----------------------------------------------------------------------------------------------------------
def tops_by_hand(seen: Context, row: int, count: int, powers: tuple[float, float, float]) -> set[int]:
    """The product of three principles, pick after pick."""
    tokens, states, relevance = alive_of(seen, row), seen.visual[row], sparsevlm_score_by_hand(seen, row)
    alike = {(i, j): cosine(states[i], states[j]) for i in tokens for j in tokens}
    picks: list[int] = []
    while len(picks) < min(count, len(tokens)):
        left = {i: 1 - max([0.0, *(alike[i, p] for p in picks)]) for i in tokens}
        worth = {}
        for j in (j for j in tokens if j not in picks):
            coverage = (1 + sum(left[i] * alike[i, j] for i in tokens) / sum(left.values())) / 2
            worth[j] = relevance[j] ** powers[0] * coverage ** powers[1] * left[j] ** powers[2]
        picks.append(max(worth, key=worth.get))
    return set(picks)


@pytest.mark.parametrize("powers", [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.5, 0.0, 2.0)])
def test_tops_picks_what_its_formula_picks(powers):
    seen = context()
    kept = kept_by(TOPS(**dict(zip(("relevance", "coverage", "diversity"), powers, strict=True))), seen)
    assert kept == [tops_by_hand(seen, row, count, powers) for row, count in enumerate(COUNTS)]


# -- several images -------------------------------------------------------------------------------------------------

CHOOSERS = [DivPrune(), CDPruner(), DART(), SparseVLM(per_cluster=2), TOPS()]


@pytest.mark.parametrize("pruner", CHOOSERS, ids=lambda pruner: type(pruner).__name__)
def test_images_decide_alone(pruner):
    """Two images in one prompt keep what each would keep with its share of the count, states included."""
    seen = context()
    number = (torch.arange(TOKENS) >= 10).long().expand(4, -1)
    together = replace(seen, images=Images(number, torch.tensor([[10, 14]] * 4)))
    kept = pruner.prune(together)
    shares = share(seen.count, together.images.sum(seen.alive.long()))
    for image, part in enumerate((slice(0, 10), slice(10, TOKENS))):
        cut = {name: getattr(seen, name)[:, part] for name in (*BY_TOKEN, "alive")}
        rows = replace(seen, **cut, count=shares[:, image], row_attention=seen.row_attention[..., part])
        alone = pruner.prune(rows)
        assert torch.equal(kept.mask[:, part], alone.mask)
        if alone.states is not None:
            torch.testing.assert_close(kept.states[:, part][alone.mask], alone.states[alone.mask])


# -- nothing asked --------------------------------------------------------------------------------------------------

PEERS = ["cdpruner", "dart", "divprune", "pyramiddrop", "sparsevlm", "tops"]


@pytest.mark.parametrize("name", PEERS)
def test_an_image_without_a_question(pruned, name):
    """Two words, the image, and nothing behind it: alone, and beside a sample with a question."""
    vlm = pruned(tiny.ROOT / "configs" / "pruners" / f"{name}.yaml")
    kept = []
    for prompts in (samples((2 + VISUAL,)), samples((2 + VISUAL, 45))):
        logits, record = forward(vlm, batch(prompts))
        assert logits[0].isfinite().all()
        assert record.trace.average_visual().tolist() == [tiny.KEEP] * len(prompts)
        kept.append([stage.kept[0].tolist() for stage in record.stages])
    assert kept[0] == kept[1]
