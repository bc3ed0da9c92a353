"""The teacher's saliency, and the loss that reads it: a signal for every token that asks nothing of the layers."""

from dataclasses import replace

import pytest
import tiny
import torch
from tiny import batch, samples, trainer
from torch.nn.functional import kl_div

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session, StageRecord
from lit_prune.host.lora import LoRA
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.divprune import DivPrune
from lit_prune.pruners.full import Full
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.training.losses import LossWeights, saliency, saliency_loss
from lit_prune.training.module import PruneModule
from lit_prune.training.step import StepKey

READS = LossWeights(saliency=2.0)


def test_saliency_is_the_gradient_of_the_margin_by_a_tokens_state(tiny_model):
    """Beside a plain forward of transformers, with a hook that takes a layer's input as a leaf; padded."""
    inputs, layers = batch(samples(), "left", answers=3), (1, 4)
    vlm = tiny.attach(tiny_model, tiny.small_rcp(), keep=20, shaken=False)
    record = Record()
    with vlm.using(Session(prune=False, repair=False, record=record, derive=layers, answers_only=True)):
        logits = tiny_model(**inputs, use_cache=False).logits[0]
    found = saliency(logits, record)
    vlm.detach()
    visual = inputs["input_ids"] == tiny_model.config.image_token_id
    predicts = (inputs["labels"] != -100).roll(-1, 1)
    for layer in layers:
        leaves = []

        def hook(module, args, kwargs, leaves=leaves):
            leaves.append(args[0].detach().requires_grad_())
            return (leaves[0], *args[1:]), kwargs

        handle = tiny_model.model.language_model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
        best = tiny_model(**inputs, use_cache=False).logits[predicts].topk(2).values
        handle.remove()
        (gradient,) = torch.autograd.grad((best[:, 0] - best[:, 1]).sum(), leaves)
        for b in range(len(visual)):
            strength = gradient[b][visual[b]].norm(dim=1)
            expected = strength / strength.sum().clamp(min=1e-20)
            torch.testing.assert_close(found[layer][b, : len(expected)], expected, atol=1e-6, rtol=1e-3)
            assert (found[layer][b, len(expected) :] == 0).all()


def test_the_loss_is_the_closed_form_and_ignores_pruned_tokens():
    teacher = Record(saliency={2: torch.tensor([[0.4, 0.2, 0.1, 0.3]]), 0: torch.ones(1, 4)})
    scores = torch.tensor([[1.0, 0.0, float("-inf"), -1.0]], requires_grad=True)
    stage = StageRecord(2, scores.isfinite(), scores.isfinite().float(), scores)
    fixed = StageRecord(0, scores.isfinite(), scores.isfinite().float(), scores.detach())
    target = torch.tensor([0.4, 0.2, 0.3]) / 0.9
    expected = kl_div(torch.tensor([1.0, 0.0, -1.0]).log_softmax(0), target, reduction="sum")
    assert saliency_loss(Record(stages=[fixed, stage]), teacher).item() == pytest.approx(expected.item(), abs=1e-6)
    assert saliency_loss(Record(stages=[fixed]), teacher) == 0, "nothing to train"


@pytest.fixture(scope="module")
def batches(world):
    data = world()
    data.prepare_data()
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("mode", ["soft", "drop"])
def test_the_other_losses_are_as_without_it(student, batches, mode):
    """Bit for bit; every stage's scorer gets a gradient from it alone; no record keeps a graph."""
    plain, reads = (student(train_mode=mode, loss=loss).train() for loss in (LossWeights(), READS))
    one, two = (module.step(batches[0], StepKey(3, 0.5)) for module in (plain, reads))
    assert {name: two.losses[name].item() for name in one.losses} == {n: v.item() for n, v in one.losses.items()}
    assert two.total.item() == pytest.approx(one.total.item() + 2.0 * two.losses["saliency"].item())
    assert two.teacher.entering == {}
    kept = [*two.teacher.hidden.values(), *two.teacher.saliency.values()]
    assert kept
    assert not any(values.requires_grad for values in kept)
    two.losses["saliency"].backward()
    scorers = reads.plugin.pruner.scorers
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in scorer.parameters()) for scorer in scorers)


def test_checkpointing_changes_nothing(student, batches):
    one, two = (
        student(loss=READS, checkpoint_activations=saved).train().step(batches[0], StepKey(3, 0.5))
        for saved in (False, True)
    )
    for layer, values in one.teacher.saliency.items():
        assert torch.equal(values, two.teacher.saliency[layer])
    assert one.total.item() == two.total.item()


def test_a_trained_scorer_finds_the_salient_tokens(student, batches):
    """Some steps on one batch, by this loss alone: the kept tokens hold more of the saliency than before."""
    module = student(train_mode="drop", loss=LossWeights(task=0.0, repair=0.0, saliency=1.0)).train()
    optimizer = torch.optim.Adam(module.plugin.parameters(), lr=1e-2)
    held = []
    for _ in range(30):
        step = module.step(batches[0], StepKey(3, 1.0))
        first = step.student.stages[0]
        held.append((step.teacher.saliency[first.layer] * first.kept).sum(1).mean().item())
        optimizer.zero_grad()
        step.total.backward()
        optimizer.step()
    assert held[-1] > 1.2 * held[0]


def test_a_batch_without_an_image_teaches_nothing(student, batches):
    module = student(loss=READS).train()
    inputs = {name: value for name, value in batches[0]["inputs"].items() if name != "pixel_values"}
    image = module.model.config.image_token_id
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == image, 5)
    step = module.step({**batches[0], "inputs": inputs}, StepKey(3, 0.5))
    assert step.losses["saliency"] == 0


def test_only_stages_whose_scores_train_are_derived(micro_folder):
    """A tower's stages before them have no parameters: neither its saliency nor room in the cache is spent on them."""
    repair = RepairAdapter([11, 14], [1, 2], bottleneck=8, condition=6, code=4)
    chain = Chain(DCPPrune([2, -1], [8.0, 1.0], 4, tatcs=False), RCP([1, 5], [2.0, 1.0], select="topk", inner=16), 3.0)
    module = PruneModule(str(micro_folder), chain, repair, keep=16, loss=READS)
    assert module.vlm.host.stages == (0, 1, 5)
    assert module.teaching.derive == (1, 5)


def test_losses_that_a_method_would_not_read_are_refused(student, micro_folder, world, tmp_path):
    """Only by a training run: validation computes no loss."""
    repair = RepairAdapter([11, 14], [0, 0], bottleneck=8, condition=6, code=4)

    def frozen(**options):
        return PruneModule(str(micro_folder), DivPrune([0]), repair, keep=16, max_new_tokens=2, **options)

    lora = PruneModule(str(micro_folder), Full(), keep=16, lora=LoRA(r=2), loss=READS)
    refused = [
        (frozen(loss=READS), "model.loss.saliency trains the scores of a pruner, and DivPrune has none"),
        (frozen(loss=LossWeights(attention=1.0), watch=[8]), "model.loss.attention trains the scores of a pruner"),
        (student(loss=LossWeights(stagewise=True)), "the counts of RCP are exact, so that it has none"),
        (student("threshold", loss=LossWeights(stagewise=True, budget=0.0)), "its weight is 0"),
        (lora, "full model has no stage, so no token is pruned"),
    ]
    for module, says in refused:
        with pytest.raises(LitPruneError, match=says):
            trainer(tmp_path, max_steps=1).fit(module, world())
    trainer(tmp_path, limit_val_batches=1).validate(frozen(loss=READS), world())


def test_the_teacher_cache_keeps_it(student, batches, tmp_path):
    """In half of a batch too, and next to watched attention; a cache without it is another one."""
    loss = replace(READS, attention=1.0)
    module = student(loss=loss, watch=[8, 9], teacher_cache=str(tmp_path)).train()
    teaching, cache = module.teaching, module.teaching.cache
    cache.open(module.model, [11, 14], teaching.watch, teaching.derive)
    keyed = {**batches[0], "digests": list("abcd")}
    taught, known = (module.step(keyed, StepKey(3, 0.5)) for _ in range(2))
    assert (int(taught.teacher.trace.ran[0].sum()) > 0, int(known.teacher.trace.ran[0].sum())) == (True, 0)
    cache.flush()
    again = student(loss=loss, watch=[8, 9], teacher_cache=str(tmp_path)).train()
    again.teaching.cache.open(again.model, [11, 14], teaching.watch, teaching.derive)
    read = again.step(keyed, StepKey(3, 0.5))
    for step in (known, read):
        assert step.losses["saliency"].item() == pytest.approx(taught.losses["saliency"].item(), abs=1e-6)
        assert step.losses["attention"].item() == pytest.approx(taught.losses["attention"].item(), abs=1e-6)
    cache.open(module.model, [11, 14], teaching.watch)
    assert cache.find(["a"], torch.device("cpu")) is None or "saliency.1" not in cache.by_token
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
