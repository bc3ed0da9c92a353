"""RCP and its repair adapter as published: literal restatements, sizes, and the form of files from before."""

import math
from dataclasses import replace
from itertools import pairwise

import jaxtyping
import pytest
import tiny
import torch
from test_equality import keep_all_is_the_plain_model
from test_pruners import context
from tiny import DEPTH, FREE, VISUAL, WIDTH, batch, samples
from torch.nn.functional import gelu, layer_norm

from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.plugin import Plugin
from lit_prune.plugin.forms import take_forms
from lit_prune.pruners.base import Dims
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.rcp_scorers import PublishedScorer
from lit_prune.repair import RepairAdapter
from lit_prune.training.losses import Anneal

LLAVA_7B = Dims(width=4096, depth=32, visual=576)


# -- sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("form", "condition", "pruner", "repair"),
    [("published", 512, 16.56e6, 15.81e6), ("first", 256, 19.30e6, 12.12e6)],
)
def test_number_of_parameters_for_llava_7b(form, condition, pruner, repair):
    with torch.device("meta"):
        parts = RCP(form=form), RepairAdapter(form=form, condition=condition)
        for part in parts:
            part.build(LLAVA_7B)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == pytest.approx([pruner, repair], rel=1e-3)
    if form == "published":
        assert sum(counts) == pytest.approx(32.4e6, rel=0.01)
        assert (RCP().form, RepairAdapter().form, RepairAdapter().condition) == ("published", "published", 512)


@pytest.mark.parametrize(("form", "moved"), [("published", 0.0016), ("first", 0.02)])
def test_how_far_an_untrained_adapter_moves_states(form, moved):
    torch.manual_seed(0)
    repair = RepairAdapter([22], [0], form=form, condition=64)
    repair.build(LLAVA_7B)
    states = torch.randn(1, 32, 4096)
    zeros = torch.zeros(1, 64)
    with torch.no_grad():
        change = repair(states, (zeros, zeros), torch.ones(1, 32, dtype=torch.bool), 0) - states
    assert (change.norm() / states.norm()).item() == pytest.approx(moved, rel=0.1)
    assert repair.codes.std().item() == pytest.approx(0.02 if form == "published" else 0.125, rel=0.02)


# -- the pruner -----------------------------------------------------------------------------------------------------
def test_scorer_equals_its_formula():
    """S_a + S_t + bias, sample by sample and head by head."""
    torch.manual_seed(0)
    scorer = PublishedScorer(WIDTH, 8, 3, 2, 0.5, 2.0, relative=False).eval()
    tiny.shake(scorer)
    seen = context()
    found = scorer(seen.visual, seen.alive, seen.text, seen.text_mask)
    for row in range(3):
        alive = seen.alive[row]
        question = scorer.question(seen.text[row][seen.text_mask[row]].mean(0))
        question = layer_norm(question, (8,), scorer.question_norm.weight, scorer.question_norm.bias)
        visual = scorer.visual(seen.visual[row])
        queries, keys = scorer.attention.query(scorer.queries + question), scorer.attention.key(visual[alive])
        heads = [(queries[:, part] @ keys[:, part].T / 2).softmax(1) for part in (slice(0, 4), slice(4, 8))]  # sqrt(4)
        attended = scorer.fold.weight[0] @ (sum(heads) / 2)
        first, norm, _, last = scorer.token_score
        hidden = gelu(layer_norm(first(visual[alive]), (8,), norm.weight, norm.bias))
        expected = attended + (hidden @ last.weight[0] + last.bias) + scorer.bias
        torch.testing.assert_close(found[row][alive], expected)


def test_scorer_starts_as_the_mean_attention_weight():
    scorer = PublishedScorer(WIDTH, 8, 16, 2, 0.0, 2.0, relative=False).eval()
    seen = context()
    weights = scorer.attention(
        scorer._shifted_queries(seen.text, seen.text_mask), scorer.visual(seen.visual), seen.alive
    )
    found = scorer(seen.visual, seen.alive, seen.text, seen.text_mask)
    torch.testing.assert_close(found, weights.mean(1) + 2.0)
    assert scorer.queries.std().item() == pytest.approx(0.02, rel=0.3)


def test_dropout_takes_whole_queries():
    torch.manual_seed(0)
    scorer = PublishedScorer(WIDTH, 8, 200, 2, 0.2, 2.0, relative=False).train()
    scorer.attention.dropout.p = 0.0
    seen, weights = context(alive=torch.ones(3, VISUAL, dtype=torch.bool)), []
    scorer.fold.register_forward_pre_hook(lambda module, args: weights.append(args[0]))
    scorer(seen.visual, seen.alive, seen.text, seen.text_mask)
    gone = weights[0] == 0
    assert torch.equal(gone.any(1), gone.all(1))
    assert gone.all(1).float().mean().item() == pytest.approx(0.2, abs=0.05)


def test_threshold_of_inference_is_an_argument():
    seen, kept = context(alive=torch.ones(3, VISUAL, dtype=torch.bool)), {}
    for at in (0.4, 0.45, 0.5, 0.55):
        torch.manual_seed(0)
        pruner = RCP([1], [1.0], inner=16, inference_threshold=at, bias=0.0)
        pruner.build(Dims(WIDTH, DEPTH, VISUAL))
        logits = pruner.eval().score(seen)
        kept[at] = pruner.prune(seen).mask
        assert torch.equal(kept[at], (logits.sigmoid() > at) & seen.alive)
        pruner.train()
        pruner.scorers.eval()  # no dropout
        assert torch.equal(pruner.prune(seen).mask, (logits > 0) & seen.alive), "training decides at 0.5"
    counts = [mask.sum().item() for mask in kept.values()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("surplus", [1.0, 0.4, 0.0])
def test_top_k_follows_the_progressive_target(surplus):
    """In training alone: count + surplus * (tokens - count), of those that are there."""
    pruner, seen = RCP([1], [1.0], inner=16, select="topk"), context(alive=torch.ones(3, VISUAL, dtype=torch.bool))
    pruner.build(Dims(WIDTH, DEPTH, VISUAL))
    pruner.relax(surplus)
    assert pruner.train().prune(seen).mask.sum(1).tolist() == [6 + math.ceil(30 * surplus)] * 3
    assert pruner.exact(0) == (surplus == 0)
    later = replace(seen, alive=torch.arange(VISUAL).expand(3, -1) < 10)
    assert pruner.prune(later).mask.sum(1).tolist() == [min(10, 6 + math.ceil(30 * surplus))] * 3
    assert pruner.eval().prune(seen).mask.sum(1).tolist() == [6] * 3
    assert pruner.exact(0)


def test_top_k_starts_with_all_tokens_and_ends_on_budget(student, world):
    data = world()
    data.prepare_data()
    data.setup("fit")
    questions, module = next(iter(data.train_dataloader())), student("topk").train()
    kept = []
    for done in (0.0, 0.05, 0.1, 0.9):
        key = type(module).step_key.__annotations__["return"](0, done)
        step = module.step(questions, key)
        kept.append(step.student.trace.average_visual().mean().item())
        assert module.plugin.pruner.surplus == Anneal().surplus(done)
    assert kept[0] == 144
    assert kept[1] == pytest.approx(80, abs=1)  # half of the way
    assert kept[2:] == [16, 16]


@pytest.mark.parametrize("on", [False, True])
def test_gradient_through_the_baseline(tiny_model, on):
    """The second stage's attention follows the first one's gates, and its scores pass the gradient on if asked."""
    rcp = RCP([1, 4], [2.0, 1.0], inner=16, select="topk", dropout=0.0, baseline_gradient=on)
    vlm, seen, prune = tiny.attach(tiny_model, rcp, keep=20), [], rcp.prune
    rcp.prune = lambda context: seen.append(context) or prune(context)
    vlm.plugin.train()
    with vlm.using(Session(soft=True)):
        vlm.model(**batch(samples()))
    vlm.detach()
    assert seen[1].attention.requires_grad == rcp._baseline(seen[1]).requires_grad == on
    if on:
        gate = rcp.scorers[0].fold.weight
        (gradient,) = torch.autograd.grad(rcp._baseline(seen[1])[seen[1].alive].square().sum(), gate)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


def test_the_layer_befores_attention_has_no_gradient():
    with pytest.raises(LitPruneError, match="baseline_gradient needs attention_layer: own"):
        RCP(attention_layer="previous", baseline_gradient=True)


# -- the repair adapter's context -------------------------------------------------------------------------------------
@pytest.mark.parametrize("soft", [False, True])
def test_what_was_lost_is_the_mean_over_all_stages(pruned, soft):
    """Each token counts with its normed state at the stage that pruned it, in soft masking as in dropping."""
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    rcp, repair = vlm.plugin.pruner, vlm.plugin.repair
    contexts, means, prune = [], [], rcp.prune
    rcp.prune = lambda seen: contexts.append((seen, prune(seen))) or contexts[-1][1]
    repair.what.register_forward_pre_hook(lambda module, args: means.append(args[0]))
    tiny.forward(vlm, batch(samples()), soft=soft)
    assert len(contexts) == 3
    for row in range(3):
        lost = []
        for stage, (seen, kept) in enumerate(contexts):
            lost += list(seen.visual[row][seen.alive[row] & ~kept.mask[row]])
            if stage in repair.stages:
                found = means[repair.stages.index(stage)][row]
                torch.testing.assert_close(found, torch.stack(lost).mean(0), atol=1e-5, rtol=1e-4)
        assert len(lost) == VISUAL - contexts[-1][1].mask[row].sum()


@pytest.mark.parametrize("form", ["published", "first"])
def test_context_passes_gradients_of_all_stages_or_of_one(tiny_model, form):
    """Of the last stage's context, to the gates of the first one; `detach_context` cuts all of them."""
    for detached in (False, True):
        repair = RepairAdapter([5, 7], [1, 2], bottleneck=16, condition=8, code=4, form=form, detach_context=detached)
        gates = torch.ones(3, VISUAL)
        keep = torch.stack([torch.arange(VISUAL) % n == 0 for n in (2, 4, 8)])
        gates = (gates * keep).requires_grad_(True)
        vlm = tiny.attach(tiny_model, tiny.Chosen([1, 3, 5], keep, gates), repair=repair)
        found = []
        repair.what.register_forward_hook(lambda module, args, output, found=found: found.append(output))
        with vlm.using(Session(soft=True)):
            vlm.model(**batch(samples()))
        where = found[-1].square().sum()
        gradient = torch.zeros(3, VISUAL)
        if where.requires_grad:
            gradient = torch.autograd.grad(where, gates, allow_unused=True)[0]
        vlm.detach()
        assert (gradient is not None and (gradient[2] != 0).any()) != detached


# -- laws of a method whose counts are free -------------------------------------------------------------------------
def test_keep_all_is_the_plain_model(tiny_model, pruned):
    """Bit for bit, though the scores are those of a pruner that would drop most tokens."""
    keep_all_is_the_plain_model(tiny_model, lambda: pruned(FREE, keep=VISUAL), batch(samples()))


def free(pruned, **options):
    """The shipped file, moved from its start to where it drops tokens at each stage."""
    vlm = pruned(FREE, **options)
    for scorer in vlm.plugin.pruner.scorers:
        scorer.bias.data.fill_(-1.0)
    return vlm


def test_soft_masks_equal_dropping(pruned):
    """But for `eps`, the share of its weight that a dropped token keeps: without it the two paths agree."""
    vlm, inputs = free(pruned, model=tiny.build_model().double()), batch(samples(), answers=3)
    vlm.plugin.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    hard, dropped = tiny.forward(vlm, inputs, soft=False)
    counts = [VISUAL, *(stage.kept.float().sum(1).mean().item() for stage in dropped.stages)]
    assert all(after < before for before, after in pairwise(counts))
    real, gaps = tiny.real_text(inputs), {}
    for eps in (1e-30, 1e-8, 1e-6):
        soft, masked = tiny.forward(vlm, inputs, soft=True, eps=eps)
        assert [torch.equal(a.kept, b.kept) for a, b in zip(masked.stages, dropped.stages, strict=True)] == [True] * 3
        gaps[eps] = tiny.gap(soft[real], hard[real])
    assert gaps[1e-30] < 1e-10
    assert gaps[1e-6] / gaps[1e-8] == pytest.approx(100, rel=0.1)
    assert gaps[1e-8] < 5 * tiny.TOLERANCE  # as in training


def test_a_sample_in_a_batch_is_as_alone(pruned):
    vlm, prompts = free(pruned), samples()
    together, record = tiny.forward(vlm, batch(prompts))
    for row, prompt in enumerate(prompts):
        alone, own = tiny.forward(vlm, batch([prompt]))
        assert tiny.gap(together[row, -1], alone[0, -1]) < tiny.TOLERANCE
        for stage, lone in zip(record.stages, own.stages, strict=True):
            assert torch.equal(stage.kept[row], lone.kept[0])


# -- forms of files ---------------------------------------------------------------------------------------------------
def test_a_saved_form_is_loaded_again(tmp_path, tiny_model):
    for form in ("published", "first"):
        vlm = tiny.attach(tiny_model, tiny.small_rcp(form=form), repair=RepairAdapter([7], [1], form=form))
        plugin = vlm.plugin
        plugin.save_pretrained(tmp_path / form)
        loaded = Plugin.from_pretrained(tmp_path / form)
        vlm.detach()
        assert (loaded.pruner.form, loaded.repair.form) == (form, form)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plugin.parameters(), strict=True))


def test_a_resumed_plugin_takes_the_checkpoints_form():
    """At any depth, before an optimizer has its parameters; after it, one sentence names the option."""
    made = {}
    for form in ("published", "first"):
        chain = Chain(DCPPrune((1, -1), (4.0, 1.0), vision_depth=2), RCP([2], [1.0], inner=16, form=form))
        made[form] = Plugin(chain, RepairAdapter([6], [1], bottleneck=4, form=form))
        made[form].build(Dims(WIDTH, DEPTH, VISUAL), [])
    old, new = made["first"], made["published"]
    settings = old.settings()
    for part in (settings["pruner"]["init_args"]["then"], settings["repair"]):
        del part["init_args"]["form"]  # as files from before have it
    with pytest.raises(LitPruneError, match=r"form: first; set model\.pruner\.init_args\.then\.init_args\.form=first"):
        take_forms(new, settings, fixed=True)
    take_forms(new, settings)
    assert new.settings()["pruner"] == old.settings()["pruner"]
    assert new.repair.form == "first"
    new.load_state_dict(old.state_dict())


@pytest.mark.parametrize("kind", [RCP, RepairAdapter])
def test_an_unknown_form_is_refused(kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(LitPruneError, match=r"form: 'last' is not one of published, first"):
        kind(form="last")
