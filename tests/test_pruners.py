"""A battery for every method in configs/pruners/, and what each one's scores are made of."""

import importlib
import inspect
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from tiny import DEPTH, FREE, KEEP, PRUNERS, VISUAL, WIDTH, batch, forward, samples

from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.ops.selection import Images, share, top_k
from lit_prune.pruners.base import AttentionRows, Context, Dims, Kept, Pruner, PruningMethod, VisionContext, init_args
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.oracle import Oracle
from lit_prune.pruners.random import Random
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.text_similarity import TextSimilarity
from lit_prune.pruners.uniform import Uniform, _closeness
from lit_prune.vlm import plugin_from_yaml

PRUNERS = [*PRUNERS, FREE]
EVERY = pytest.mark.parametrize("path", PRUNERS, ids=lambda path: path.stem)
IN_TOWER = [path for path in PRUNERS if plugin_from_yaml(path).pruner.tower]
TOWER = pytest.mark.parametrize("path", IN_TOWER, ids=lambda path: path.stem)
DECODER = pytest.mark.parametrize("path", [p for p in PRUNERS if p not in IN_TOWER], ids=lambda path: path.stem)
DIMS = Dims(WIDTH, DEPTH, VISUAL)


def context(seed: int = 0, size: int = 3, tokens: int = VISUAL, **changes) -> Context:
    """What a stage may see, at random; some tokens are gone."""
    torch.manual_seed(seed)
    words = torch.arange(5).expand(size, -1) < torch.tensor([5, 3, 4])[:size, None]
    made = Context(
        stage=0,
        visual=torch.randn(size, tokens, WIDTH),
        alive=torch.rand(size, tokens) > 0.2,
        ordinal=torch.arange(tokens).expand(size, -1),
        text=torch.randn(size, 5, WIDTH),
        text_mask=words,
        visual_embeds=torch.randn(size, tokens, WIDTH),
        text_embeds=torch.randn(size, 5, WIDTH),
        attention=torch.rand(size, tokens).softmax(-1),
        count=torch.full((size,), 6),
        total=torch.full((size,), tokens),
        seed=torch.tensor([11, 22, 33])[:size],
        hints=tiny.hints(size),
        states=torch.randn(size, tokens, WIDTH),
        visual_keys=torch.randn(size, tokens, 32),
        text_keys=torch.randn(size, 5, 32),
        row_attention=torch.rand(size, 5, tokens).softmax(-1),
    )
    return replace(made, **changes)


def vision_context(size: int = 3) -> VisionContext:
    """What a stage inside the vision tower may see, at random; some tiles have filler."""
    torch.manual_seed(0)
    return VisionContext(
        stage=0,
        states=torch.randn(size, VISUAL, 32),
        keys=torch.randn(size, VISUAL, 32),
        values=torch.randn(size, VISUAL, 32),
        attention=torch.rand(size, VISUAL).softmax(-1),
        alive=torch.arange(VISUAL) < VISUAL - torch.tensor([0, 4, 2])[:size, None],
        ordinal=torch.arange(VISUAL).expand(size, -1),
        count=torch.full((size,), 6),
        side=6,
    )


def built(path) -> PruningMethod:
    plugin = plugin_from_yaml(path)
    plugin.build(DIMS, [])
    return plugin.pruner


def decider(path) -> Pruner:
    """The pruner of a method's first stage in the decoder: of a method of the tower that which sees what arrived."""
    return built(path).walk(DEPTH)[0].pruner


# -- the battery ----------------------------------------------------------------------------------------------------
@EVERY
def test_file_writes_every_argument(path):
    """An overlay that left one out would inherit the value meant for another method."""
    model = yaml.safe_load(path.read_text())["model"]
    assert set(model) >= {"pruner", "repair"}
    for spec in filter(None, (model["pruner"], model["repair"])):
        module, _, name = spec["class_path"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        arguments = [a for a in inspect.signature(kind.__init__).parameters if a != "self"]
        assert set(spec.get("init_args", {})) == set(arguments)


@EVERY
def test_configuration_is_what_the_file_says(path):
    plugin = plugin_from_yaml(path)
    model = yaml.safe_load(path.read_text())["model"]
    assert plugin.pruner.config() == model["pruner"].get("init_args", {})
    if model["repair"]:
        assert plugin.repair.config() == model["repair"]["init_args"]


@DECODER
def test_keeps_the_count_among_the_alive(path):
    pruner = built(path)
    kept = pruner.prune(context())
    assert pruner.free or kept.mask.sum(1).tolist() == [6, 6, 6]
    assert kept.mask.any(1).all()
    assert not (kept.mask & ~context().alive).any()
    assert kept.gate is None


@DECODER
def test_scores_are_finite_where_alive(path):
    scores = built(path).score(context())
    assert scores.shape == (3, VISUAL)
    assert scores[context().alive].isfinite().all()


@TOWER
def test_tower_keeps_at_most_the_count_among_the_alive(path):
    kept = built(path).tower.prune_vision(vision_context())
    assert kept.mask.any(1).all()
    assert not (kept.mask & ~vision_context().alive).any()
    if kept.states is not None:
        assert kept.states[kept.mask].isfinite().all()


@TOWER
def test_towers_decision_is_the_tiles_own(path):
    """The same alone as in a batch, each time anew."""
    pruner, full = built(path).tower, vision_context()
    together = pruner.prune_vision(full)
    for row in range(3):
        one = {k: value[row : row + 1] if isinstance(value, torch.Tensor) else value for k, value in vars(full).items()}
        alone = pruner.prune_vision(VisionContext(**one | {"memory": {}}))
        assert torch.equal(alone.mask[0], together.mask[row])
        if together.states is not None:
            assert tiny.gap(alone.states[0][alone.mask[0]], together.states[row][alone.mask[0]]) < 1e-5


@EVERY
def test_deciding_twice_is_deciding_the_same(path):
    pruner = decider(path)
    assert torch.equal(pruner.prune(context()).mask, pruner.prune(context()).mask)


@EVERY
def test_decision_is_the_samples_own(path):
    """The same alone as in a batch."""
    pruner, full = decider(path), context()
    together = pruner.prune(full).mask
    for row in range(3):
        one = {
            name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
            for name, value in vars(full).items()
        }
        one["hints"] = {"regions": full.hints["regions"][row : row + 1]}
        assert torch.equal(pruner.prune(Context(**one)).mask[0], together[row])


@EVERY
def test_layers_fit_any_depth(path):
    pruner = plugin_from_yaml(path).pruner
    for depth in (8, 16, 32, 40):
        stages = pruner.stages(depth)
        assert len(stages) == len(pruner.walk(8))
        assert stages[-1] < depth


@EVERY
def test_price_is_not_negative(path):
    flops = decider(path).flops(torch.tensor([VISUAL, 0]), torch.tensor([5, 3]), WIDTH, torch.tensor([6, 0]))
    assert flops.dtype == torch.float64
    assert (flops >= 0).all()


@EVERY
@pytest.mark.parametrize("keep", [0, VISUAL + 1])
def test_budget_outside_the_image(pruned, path, keep):
    with pytest.raises(LitPruneError, match=rf"keep={keep} must lie between 1 and the image's {VISUAL} visual tokens"):
        pruned(path, keep=keep)


def test_budget_out_of_reach(pruned):
    with pytest.raises(LitPruneError, match=r"keep=6 can't be reached: the 2 decoder layers .* at least 9.8"):
        pruned(FastV([2]), keep=6)


def test_pruning_layer_outside_the_model(pruned):
    with pytest.raises(LitPruneError, match="pruning layer 8 is outside the model: its decoder has 8 layers, 0 to 7"):
        pruned(Random([8]))


def test_fastv_at_layer_zero(pruned):
    with pytest.raises(LitPruneError, match="layer 0 can't read the attention of the layer before"):
        pruned(FastV([0]))


def test_fastv_with_eager_attention(pruned, tiny_eager):
    with pytest.raises(LitPruneError, match="eager attention can't be read"):
        pruned(FastV([2]), model=tiny_eager)


def test_a_method_without_its_arguments_as_attributes_cannot_be_saved():
    class Forgetful(Pruner):
        def __init__(self, layers: list[int], secret: int = 1) -> None:
            super().__init__(layers)

    with pytest.raises(LitPruneError, match="secret"):
        init_args(Forgetful([1]))


# -- attention rows -------------------------------------------------------------------------------------------------
class Spy(Pruner):
    """Keeps what the host gave it."""

    def __init__(self, layers: list[int], layer: str, rows: str) -> None:
        super().__init__(layers)
        self.attention = AttentionRows(layer, rows)
        self.seen: list[Context] = []

    def prune(self, context: Context) -> Kept:
        self.seen.append(context)
        return Kept(context.alive)


@pytest.mark.parametrize("rows", ["question", "last"])
@pytest.mark.parametrize("layer", ["own", "previous"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_rows_equal_eager_attention(tiny_model, tiny_eager, side, layer, rows):
    """Averaged over heads and rows, at the visual tokens."""
    inputs = batch(samples(), side, answers=3)
    spy = Spy([3], layer, rows)
    vlm = tiny.attach(tiny_model, spy, keep=20, shaken=False)
    forward(vlm, inputs, repair=False)
    vlm.detach()
    with torch.no_grad():
        matrix = tiny_eager(**inputs, output_attentions=True).attentions[3 if layer == "own" else 2].mean(1)
    for row, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        image = (ids == tiny.IMAGE).nonzero()[:, 0]
        real = inputs["attention_mask"][row].bool() & (labels == -100)
        question = [i for i in real.nonzero()[:, 0].tolist() if i > image[-1]]
        chosen = question if rows == "question" else question[-1:]
        torch.testing.assert_close(spy.seen[0].attention[row], matrix[row, chosen][:, image].mean(0), rtol=0, atol=1e-6)


def test_attention_rows_after_a_stage_equal_those_of_masking(tiny_model):
    """The second stage reads rows among the tokens that are left."""
    inputs, seen = batch(samples()), []
    for soft in (False, True):
        spy = Spy([1, 4], "own", "question")
        spy.prune = lambda c, spy=spy: spy.seen.append(c) or Kept(c.alive & (c.ordinal % 3 == 0))
        vlm = tiny.attach(tiny_model, spy, shaken=False)
        forward(vlm, inputs, repair=False, soft=soft)
        vlm.detach()
        seen.append(spy.seen[1])
    dropped, masked = seen
    kept = masked.attention[masked.alive].view(3, -1)
    torch.testing.assert_close(dropped.attention, kept, rtol=0, atol=1e-5)
    assert dropped.attention.shape[1] == VISUAL // 3


def test_context_holds_each_samples_own_tokens(tiny_model):
    inputs = batch(samples())
    spy = Spy([0], "own", "question")
    spy.needs_embeds = True
    vlm = tiny.attach(tiny_model, spy, shaken=False)
    forward(vlm, inputs, repair=False)
    vlm.detach()
    words = tiny_model.get_input_embeddings().weight
    found = spy.seen[0]
    for row, ids in enumerate(inputs["input_ids"]):
        question = ids[(ids == tiny.IMAGE).nonzero()[-1, 0] + 1 :]
        assert torch.equal(found.text_embeds[row][found.text_mask[row]], words[question])
    assert found.visual.shape == (3, VISUAL, WIDTH)
    assert found.alive.all()
    assert found.ordinal[0].tolist() == list(range(VISUAL))


# -- methods --------------------------------------------------------------------------------------------------------
def rcp(**options) -> RCP:
    torch.manual_seed(0)
    pruner = RCP(layers=[1, 3], stage_ratios=[2.0, 1.0], inner=16, **options).eval()
    pruner.build(DIMS)
    return pruner.eval()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize(("attention_score", "least"), [("weight", 0.99), ("relative", 0.5)])
def test_untrained_rcp_ranks_nearly_like_the_attention(attention_score, least):
    """S_t and the bias are constant at the start; S_a is not, since its queries are random.

    It is small on the paper's scale. In units of the uniform weight it is as large as what flat attention tells apart.
    """
    pruner, seen = rcp(attention_score=attention_score), context(alive=torch.ones(3, VISUAL, dtype=torch.bool))
    scores = pruner.score(seen)
    for row in range(3):
        assert rank_correlation(scores[row], seen.attention[row]) > least
    assert not torch.equal(scores.argsort(), seen.attention.argsort())


def test_rcp_with_zero_learned_parts_ranks_like_the_attention():
    pruner, seen = rcp(), context(alive=torch.ones(3, VISUAL, dtype=torch.bool))
    for scorer in pruner.scorers:
        scorer.fold.weight.data.zero_()
    scores = pruner.score(seen)
    assert torch.equal(scores.argsort(), seen.attention.argsort())
    log = seen.attention.log()
    torch.testing.assert_close(scores, log - log.mean(1, keepdim=True) + 2.0)


def test_rcp_baseline_is_centred_over_the_alive_and_clamped():
    pruner, seen = rcp(), context()
    seen = replace(seen, attention=seen.attention.masked_fill(torch.arange(VISUAL) % 5 == 0, 0.0))
    baseline = pruner._baseline(seen)
    for row in range(3):
        assert baseline[row][seen.alive[row]].mean().item() == pytest.approx(0, abs=1e-5)
    assert baseline.isfinite().all()
    assert (pruner.score(seen) - rcp(baseline="none").score(seen)).allclose(baseline, atol=1e-5)


def test_rcp_keeps_its_share_at_each_stage(pruned):
    """One share for all stages, or one for each; the more the larger."""

    def kept(mass: float | list[float]) -> list[float]:
        vlm = pruned(tiny.small_rcp("mass", keep_mass=mass))
        _, record = forward(vlm, batch(samples()))
        return [stage.kept.sum(1).double().mean().item() for stage in record.stages]

    half = kept(0.5)
    assert kept([0.5, 0.5, 0.5]) == half
    first, second, third = kept([0.5, 0.9, 0.5])
    assert (first, second > half[1], third >= half[2]) == (half[0], True, True)
    with pytest.raises(LitPruneError, match="keep_mass has 2 shares for 3 stages"):
        tiny.small_rcp("mass", keep_mass=[0.5, 0.9])


def test_rcp_threshold_keeps_positive_logits():
    pruner, seen = rcp(select="threshold", bias=0.0), context()
    kept, logits = pruner.prune(seen).mask, pruner.score(seen)
    assert torch.equal(kept, (logits > 0) & seen.alive)


@pytest.mark.parametrize("select", ["threshold", "topk"])
def test_rcp_training_gate(select):
    """Hard in value, soft in gradient, noisy only where noise is on."""
    pruner, seen = rcp(select=select, dropout=0.0, bias=0.0), context()
    quiet = pruner.prune(seen).mask
    pruner.train()
    pruner.tau = 0.5
    kept = pruner.prune(seen)
    assert torch.equal(kept.mask, quiet)
    assert torch.equal(kept.gate.detach().round().bool(), quiet)
    assert torch.autograd.grad(kept.gate.sum(), pruner.scorers[0].bias)[0] > 0
    pruner.noise = 5.0
    assert not torch.equal(pruner.prune(seen).mask, quiet)
    if select == "topk":
        assert pruner.prune(seen).mask.sum(1).tolist() == [6, 6, 6]


def test_rcp_gate_has_the_gradient_of_a_sigmoid_around_the_cut():
    pruner, seen = rcp(select="topk", dropout=0.0), context()
    pruner.train()
    pruner.tau = 0.7
    kept = pruner.prune(seen)
    logits = kept.scores
    gradient = torch.autograd.grad(kept.gate.sum(), logits)[0]
    worst = logits.masked_fill(~kept.mask, float("inf")).amin(1, keepdim=True)
    best = logits.masked_fill(kept.mask | ~seen.alive, float("-inf")).amax(1, keepdim=True)
    soft = torch.sigmoid((logits - (worst + best) / 2) / 0.7)
    torch.testing.assert_close(gradient, soft * (1 - soft) / 0.7)
    assert (gradient[~kept.mask] > 0).all(), "dropped tokens learn too"


def test_rcp_drops_out_in_training_only(pruned):
    vlm = pruned(tiny.small_rcp(dropout=0.5))
    assert not any(module.training for module in vlm.plugin.modules())
    inputs = batch(samples())
    assert torch.equal(forward(vlm, inputs)[0], forward(vlm, inputs)[0])


def test_rcp_with_heads_that_do_not_divide_its_width():
    with pytest.raises(LitPruneError, match="inner=10 must be a multiple of heads=4"):
        RCP(inner=10)


def test_random_draws_once_per_prompt_and_seed(pruned):
    """Another question about the same image draws again, another image doesn't."""
    prompts = samples((45, 45))
    ids, pixels = prompts[0]
    other = ids.clone()
    other[-1] = 51 - other[-1]
    _, record = forward(pruned(Random([0])), batch([(ids, pixels), (ids, prompts[1][1]), (other, pixels)]))
    kept = record.stages[0].kept
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    _, reseeded = forward(pruned(Random([0], seed=1)), batch([(ids, pixels)]))
    assert not torch.equal(reseeded.stages[0].kept[0], kept[0])


@pytest.mark.parametrize("side", [6, 12, 24])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 9, 12, 16, 32, 35])
def test_uniform_spreads(side, count):
    """No cell is further from a kept one than the side of its share of the image."""
    total = side * side
    alive = torch.ones(3, total, dtype=torch.bool)
    seen = context(tokens=total, alive=alive, count=torch.full((3,), count))
    grid = Uniform([0]).prune(seen).mask[0].view(side, side)
    assert grid.sum() == count
    kept = grid.nonzero()
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    far = (cells[:, None] - kept).abs().amax(-1).amin(1).max()
    assert far <= side / int(count**0.5)


def test_uniform_is_a_regular_grid_where_it_can_be():
    grid = -_closeness(16, 144).view(12, 12)
    assert (grid == 0).nonzero().tolist() == [[y, x] for y in (1, 4, 7, 10) for x in (1, 4, 7, 10)]


@pytest.mark.parametrize(("count", "total"), [(5, 88), (16, 90), (1, 7), (7, 7), (12, 52)])
def test_uniform_without_a_square_grid_is_evenly_spaced_in_raster_order(count, total):
    alive = torch.ones(1, total, dtype=torch.bool)
    seen = context(size=1, tokens=total, alive=alive, count=torch.tensor([count]))
    kept = Uniform([0]).prune(seen).mask[0].nonzero()[:, 0]
    assert len(kept) == count
    gaps = kept.diff().tolist()
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert kept[0] <= total / count
    assert total - kept[-1] <= total / count + 1


def several(**changes) -> Context:
    """Two images of 16 and 20 tokens in each sample."""
    number = (torch.arange(VISUAL) >= 16).long().expand(3, -1)
    return context(images=Images(number, torch.tensor([[16, 20]] * 3)), **changes)


def test_uniform_spreads_over_each_image_by_itself():
    seen = several(alive=torch.ones(3, VISUAL, dtype=torch.bool), count=torch.full((3,), 9))
    kept = Uniform([0]).prune(seen).mask[0]
    alone = {}
    for count, total in ((4, 16), (5, 20)):
        alone[total] = context(
            size=1, tokens=total, alive=torch.ones(1, total, dtype=torch.bool), count=torch.tensor([count])
        )
    expected = [Uniform([0]).prune(seen).mask[0] for seen in alone.values()]
    assert torch.equal(kept, torch.cat(expected))


@EVERY
def test_images_of_a_sample_share_the_count(path):
    """Whatever the method: 16 and 20 tokens, those alive in proportion."""
    seen = several()
    pruner = decider(path)
    kept = pruner.prune(seen).mask
    assert torch.equal(kept, kept & seen.alive)
    if getattr(pruner, "select", "topk") == "topk" and built(path).tower is None:
        assert torch.equal(seen.images.sum(kept.long()), share(seen.count, seen.images.sum(seen.alive.long())))


def test_rcp_cuts_each_image_by_itself():
    """The gate is at one half between the worst kept and the best dropped token of its image."""
    seen = several(alive=torch.ones(3, VISUAL, dtype=torch.bool))
    logits = seen.attention.log()
    keep = top_k(logits, seen.alive, seen.count, seen.images)
    cut = RCP._cut(logits, keep, seen.alive, seen.images)
    for image in (slice(0, 16), slice(16, 36)):
        alone = RCP._cut(logits[:, image], keep[:, image], seen.alive[:, image], None)
        assert torch.equal(cut[:, image], alone.expand(3, image.stop - image.start))


def test_text_similarity_is_the_largest_cosine():
    seen = context()
    cosine = torch.nn.functional.cosine_similarity(seen.visual_embeds[:, :, None], seen.text_embeds[:, None], dim=-1)
    expected = torch.stack([cosine[row][:, seen.text_mask[row]].amax(-1) for row in range(3)])
    torch.testing.assert_close(TextSimilarity([0]).score(seen), expected)


def test_oracle_takes_the_regions_in_turn():
    regions = torch.zeros(1, 2, VISUAL)
    regions[0, 0, [3, 4, 5]] = torch.tensor([0.5, 1.0, 0.2])
    regions[0, 1, [20, 21]] = torch.tensor([0.3, 0.9])
    seen = context(size=1, alive=torch.ones(1, VISUAL, dtype=torch.bool), hints={"regions": regions})
    for count, tokens in ((2, {4, 21}), (4, {3, 4, 20, 21}), (5, {3, 4, 5, 20, 21})):
        kept = Oracle([1]).prune(replace(seen, count=torch.tensor([count]))).mask
        assert set(kept[0].nonzero()[:, 0].tolist()) == tokens


def test_oracle_without_regions(pruned):
    with pytest.raises(LitPruneError, match="boxes"):
        forward(pruned(Oracle([1])), batch(samples()), hints={})


def test_average_is_the_budget_for_any_method(pruned):
    """Whatever the layers and ratios."""
    for keep in (KEEP, 20, 30):
        vlm = pruned(tiny.small_rcp(), keep=keep)
        _, record = forward(vlm, batch(samples()))
        assert record.trace.average_visual().tolist() == [keep] * 3


def test_session_without_pruning_asks_no_pruner(pruned):
    vlm = pruned(Oracle([1]))
    with vlm.using(Session(prune=False)):
        vlm.model(**batch(samples()))
