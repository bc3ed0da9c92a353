"""Training one method on an untrained micro-LLaVA: what moves, what is saved, and runs that are cut off."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from faults import Cut, PowerCut
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import ROOT, batch, forward, same, same_ends, samples, trainer

from lit_prune.callbacks import RunSummary, WriteAnswers
from lit_prune.callbacks.answers import join
from lit_prune.data import InstructData
from lit_prune.data.mixture import WeightedSource
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.measuring import TEACHER, measure
from lit_prune.evaluation.timing import peak_bytes
from lit_prune.host import Record, Session
from lit_prune.ops.selection import straight_through
from lit_prune.pruners.random import Random
from lit_prune.pruners.rcp import RCP
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.module import PruneModule
from lit_prune.training.step import StepKey
from lit_prune.vlm import plugin_from_yaml

KEEP = 16


def teacher_logits(module, inputs):
    with torch.no_grad(), module.vlm.using(Session(prune=False, repair=False)):
        return module.model(**inputs).logits


def copies(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def questions(world):
    """Model inputs of the validation questions."""
    data = world()
    data.prepare_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()))["inputs"]


# -- three steps ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("select", ["topk", "threshold"])
@pytest.mark.parametrize("mode", [{"train_mode": "soft"}, {"train_mode": "drop"}, {"contenders": 2.0}], ids=str)
def test_three_steps_move_what_trains_and_nothing_else(student, world, questions, tmp_path, select, mode):
    """By gradients, since weight decay is off; the teacher's logits stay bit for bit."""
    module = student(select, **mode)
    before, logits = copies(module), teacher_logits(module, questions)
    trainer(tmp_path, max_steps=3).fit(module, world())
    after = copies(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    idle = {name for name in trained if name.endswith(".attention.unused")}  # the source's count, without effect
    assert trained > idle
    assert moved == trained - idle
    assert all(name.startswith("plugin.") for name in trained)
    assert torch.equal(teacher_logits(module, questions), logits)
    assert not any(p.grad is not None for name, p in module.model.named_parameters())


def test_every_loss_is_logged(student, world, tmp_path):
    module = student("threshold", loss=LossWeights(distill=1.0))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=2)
    run.fit(module, world())
    names = set(run.callback_metrics)
    assert names >= {f"loss/{name}" for name in ("total", "task", "repair", "budget", "distill")}
    assert names >= {"tau", "budget/target", "budget/actual", "flops/sample", "shift/layer_11", "shift/layer_14"}
    assert names >= {f"kept/layer_{layer}" for layer in (1, 5, 10)}
    assert names >= {f"val/{name}/layer_{i}" for i in range(16) for name in ("w2", "w2_relative")} | {
        f"val/w2_without_repair/layer_{i}" for i in range(16)
    }
    assert names >= {"val/accuracy/all", "val/agreement", "val/visual_tokens", "val/flops", "val/kv_bytes", "val/kappa"}
    assert all(math.isfinite(value) for value in run.callback_metrics.values())


def test_stagewise_holds_each_stage_to_its_count(student, world):
    """The loss is what each stage misses, weighed by the layers it rules; the average may miss less."""
    module = student("threshold", loss=LossWeights(stagewise=True), anneal=Anneal(target_share=0.0)).train()
    made = world()
    made.prepare_data()
    made.setup("fit")
    step = module.step(next(iter(made.train_dataloader())), StepKey(seed=0, done=1.0))
    stages, depth = list(module.vlm.host.stages), module.vlm.plugin.dims.depth
    plan = module.vlm.plugin.pruner.plan(module.keep, 144, depth)
    missed = 0.0
    for stage, end in zip(step.student.stages, [*stages[1:], depth], strict=True):
        missed += (end - stage.layer) / depth * (stage.gate.sum(1) - plan[stage.layer]).abs().mean().item() / 144
    assert step.losses["budget"].item() == pytest.approx(missed, rel=1e-5)
    assert step.losses["budget"] > 0
    step.losses["budget"].backward()
    assert all(scorer.bias.grad.abs().sum() > 0 for scorer in module.vlm.plugin.pruner.scorers), "every stage learns"


def test_shares_of_a_mixture_are_logged(student, world, micro_folder, tmp_path):
    made = world()
    made.prepare_data()
    sources = [WeightedSource(made.paths["train"], weight=1), WeightedSource(made.paths["val"], weight=2, name="more")]
    data = InstructData(str(micro_folder), sources, batch_size=9, group_by_length=True, too_long="cut_turns")
    run = trainer(tmp_path, max_steps=2, log_every_n_steps=1)
    run.fit(student(), data)
    logged = {name: value.item() for name, value in run.logged_metrics.items() if name.startswith("data/")}
    assert logged == {
        "data/share/instructions": pytest.approx(1 / 3),
        "data/share/more": pytest.approx(2 / 3),
        "data/bad": 0.0,
        "data/cut_turns": 0.0,
    }


def test_logged_budget_is_what_ran(student, world, tmp_path):
    module = student(anneal=Anneal(target_share=0.0))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1, val_check_interval=1)
    run.fit(module, world())
    assert run.callback_metrics["budget/actual"] == KEEP
    assert run.callback_metrics["val/visual_tokens"] == KEEP
    schedule = module.plugin.settings()["schedule"]
    assert {layer: run.callback_metrics[f"kept/layer_{layer}"].item() for layer in schedule} == schedule


def test_training_depends_on_its_seed_alone(student, world, tmp_path):
    ends = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        module = student(seed=seed)
        trainer(tmp_path, max_steps=2).fit(module, world())
        ends.append(copies(module.plugin))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_modes_of_training(student):
    """The frozen model stays in evaluation mode."""
    module = student().train()
    assert module.plugin.pruner.scorers[0].training
    assert not any(part.training for part in module.model.modules())
    assert not any(part.training for part in module.eval().modules())


def test_layers_that_run_again_in_backward_train_the_same(student, world, tmp_path):
    """Bit for bit, in less memory, with validation in between, which generates."""
    ends, peaks = [], []
    for again in (False, True):
        module = student(checkpoint_activations=again)
        step = module.optimizer_step
        module.optimizer_step = lambda *args, step=step: peaks.append(
            peak_bytes(lambda: step(*args), torch.device("cpu"))
        )
        trainer(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=1).fit(module, world())
        ends.append(copies(module.plugin))
    assert max(peaks[2:]) < 0.7 * min(peaks[:2])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not any(part.training for part in module.model.modules())


def test_validation_test_and_prediction_answer(student, world, tmp_path):
    module, data, run = student(), world(), trainer(tmp_path, limit_val_batches=1)
    for verb in (run.validate, run.test):
        found = verb(module, data, verbose=False)[0]
        stage = next(iter(found)).partition("/")[0]
        assert 0 <= found[f"{stage}/accuracy/all"] <= 1
        assert found[f"{stage}/visual_tokens"] == KEEP
    answers = run.predict(module, data)
    assert [sorted(answer) for answer in answers[0]] == [["answer", "id", "question", "reference"]] * 6
    data.setup("predict")
    held = {str(record["id"]): record for record in data.datasets["predict"].source}
    for answer in answers[0]:
        asked, told = (turn["value"] for turn in held[answer["id"]]["conversations"])
        assert (answer["question"], answer["reference"]) == (asked.removeprefix("<image>").strip(), told)


def test_predict_writes_its_answers(student, world, tmp_path, caplog):
    """Every batch's, in place of those of a run before, which may have had more ranks."""
    for name in ("answers.jsonl", "answers.rank3.jsonl"):
        (tmp_path / name).write_text("old")
    run = trainer(tmp_path, [WriteAnswers(), RunSummary()], limit_predict_batches=2)
    with caplog.at_level("INFO", "lightning.pytorch"):
        answers = run.predict(student(), world(eval_batch_size=4))
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == [answer for batch in answers for answer in batch]
    assert len(lines) > len(answers[0])
    assert f"answers  {tmp_path}/answers.jsonl" in caplog.text


def test_answers_of_several_ranks_become_one_file(tmp_path):
    """In the order of the data; a rank may have had no sample."""
    files = [tmp_path / f"answers{part}.jsonl" for part in ("", ".rank1", ".rank2")]
    for file, text in zip(files, ("0\n2\n5\n", "1\n4\n", ""), strict=True):
        file.write_text(text)
    join([(files[0], [0, 2, 5]), (files[1], [1, 4]), (files[2], [])])
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert files[0].read_text() == "0\n1\n2\n4\n5\n"


@pytest.mark.parametrize(("pruner", "passes"), [("rcp", 1), ("visionzip", 2)])
def test_validation_encodes_the_images_once_where_the_tower_is_left_alone(micro_folder, world, pruner, passes):
    """And measures what is measured without that; a method of the tower has a pass of its own."""
    made = plugin_from_yaml(ROOT / "configs" / "pruners" / f"{pruner}.yaml")
    module = PruneModule(str(micro_folder), made.pruner, made.repair, keep=KEEP, max_new_tokens=2).eval()
    data = world()
    data.prepare_data()
    data.setup("validate")
    questions, calls = next(iter(data.val_dataloader())), []
    handle = module.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = module.validation_step(questions, 0)
        handle.remove()
        for name, session in (("teacher", TEACHER), ("student", Session())):
            apart = measure(module.vlm, questions, session, 2)
            assert same(vars(replace(found[name], seconds=apart.seconds)), vars(apart)), name
    assert len(calls) == passes


def test_nothing_to_train_is_an_error(micro_folder, world, tmp_path):
    with pytest.raises(LitPruneError, match="nothing to train"):
        trainer(tmp_path, max_steps=1).fit(PruneModule(str(micro_folder), Random([0]), keep=KEEP), world())


def test_a_method_or_a_folder(micro_folder):
    with pytest.raises(LitPruneError, match="either"):
        PruneModule(str(micro_folder))
    with pytest.raises(LitPruneError, match=r"either .* --model\.pruner=null"):
        PruneModule(str(micro_folder), Random([0]), plugin="plugin")


def test_training_goes_on_from_a_plugin_folder(student, micro_folder, tmp_path):
    module = student()
    tiny.shake(module.plugin)
    module.vlm.save_pretrained(tmp_path)
    again = PruneModule(str(micro_folder), plugin=str(tmp_path), keep=KEEP)
    for name, value in module.plugin.state_dict().items():
        assert torch.equal(again.plugin.state_dict()[name], value)
    assert all(p.requires_grad for p in again.plugin.parameters())
    assert all(part.training for part in again.plugin.modules())  # with dropout and noise, as any other run


# -- contenders: soft masks among the best of the dropped ------------------------------------------------------------
def test_contenders_only_change_the_gradients_reach(pruned):
    """The same logits as dropping and as full soft masks; a shorter sequence; gradients for the best 2 k tokens."""
    inputs = batch(samples((48, 45)))
    vlm = pruned(tiny.small_rcp(dropout=0.0))
    dropped, _ = forward(vlm, inputs)
    text = tiny.real_text(inputs)
    for contenders in (1.0, 2.0, 100.0, None):
        masked, record = forward(vlm, inputs, soft=True, contenders=contenders)
        assert tiny.gap(masked[text], dropped[text]) <= tiny.TOLERANCE
        assert [stage.kept.sum(1).tolist() for stage in record.stages] == [[16, 16], [8, 8], [4, 4]]
        assert record.trace.average_visual().tolist() == [tiny.KEEP] * 2


def test_contenders_have_gradients_and_the_others_none():
    keep = torch.stack([torch.arange(tiny.VISUAL) < 6])
    soft = torch.full(keep.shape, 0.4, requires_grad=True)
    chosen = tiny.Chosen([2], keep, straight_through(keep, soft))
    ranked = chosen.prune

    def prune(context):
        kept = ranked(context)
        return type(kept)(kept.mask, kept.gate, -context.ordinal.float())

    chosen.prune = prune
    vlm = tiny.attach(tiny.build_model(), chosen, shaken=False)
    with vlm.using(Session(soft=True, contenders=2.0, record=Record())):
        logits = vlm.model(**batch(samples((48,))), use_cache=False).logits
    gradient = torch.autograd.grad(logits[0, -1].square().sum(), soft)[0][0]
    assert (gradient[:12] != 0).all()
    assert (gradient[12:] == 0).all()


# -- checkpoints ----------------------------------------------------------------------------------------------------
def test_checkpoint_holds_what_trains(micro_folder, world, tmp_path):
    """At the sizes of configs/pruners/rcp.yaml, with the optimizer's state."""
    made = plugin_from_yaml(ROOT / "configs" / "pruners" / "rcp.yaml")
    module = PruneModule(str(micro_folder), made.pruner, made.repair, keep=KEEP)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, world())
    path = tmp_path / "one.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"plugin"}
    assert set(saved["state_dict"]) == {f"plugin.{name}" for name in module.plugin.state_dict()}
    assert path.stat().st_size < 3e6


def test_checkpoint_of_another_configuration_is_refused(student, world, tmp_path, micro_folder):
    run = trainer(tmp_path, max_steps=1)
    run.fit(student(), world())
    path = tmp_path / "one.ckpt"
    run.save_checkpoint(path)
    other_shape = student(queries=8)
    with pytest.raises(LitPruneError, match=r"plugin\.pruner\.scorers\.0\.queries has another shape"):
        trainer(tmp_path, max_steps=2).fit(other_shape, world(), ckpt_path=path)
    bare = PruneModule(str(micro_folder), RCP(layers=[1, 5, 10], stage_ratios=[15.0, 8.0, 2.0], inner=16, queries=4))
    with pytest.raises(LitPruneError, match=r"plugin\.repair\..* is not in this model"):
        trainer(tmp_path, max_steps=2).fit(bare, world(), ckpt_path=path)
    plain = {"state_dict": {k: v for k, v in student().state_dict().items() if ".repair." not in k}}
    with pytest.raises(LitPruneError, match=r"plugin\.repair\..* is missing from the checkpoint"):
        student().on_load_checkpoint(plain)


def test_learning_rate_schedule(student):
    module = student(lr=1.0, repair_lr=0.5, warmup=0.1, final_lr=0.1)
    module._trainer = SimpleNamespace(estimated_stepping_batches=100)
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(101):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    pruner, repair = zip(*rates, strict=True)
    assert pruner[0] == pytest.approx(0.1)
    assert pruner[9] == pruner[10] == pytest.approx(1.0)
    assert pruner[55] == pytest.approx(0.55)
    assert pruner[100] == pytest.approx(0.1)
    assert list(repair) == pytest.approx([rate / 2 for rate in pruner])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.plugin.parameters()}


# -- runs that are cut off ------------------------------------------------------------------------------------------
def checkpoints(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=0)


TWO_EPOCHS = {"max_epochs": 2, "limit_val_batches": 1}


@pytest.fixture(scope="module", params=["soft", "drop"])
def uninterrupted(request, student, world, tmp_path_factory):
    """A mode of training, and the folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer(folder, [checkpoints(folder)], **TWO_EPOCHS).fit(student(train_mode=request.param), world())
    return request.param, folder


@pytest.mark.parametrize("cut", [3, 5], ids=["first epoch", "second epoch"])
def test_resumed_run_equals_an_uninterrupted_one(student, world, tmp_path, cut, uninterrupted):
    """Weights, optimizer, schedule: with noise and dropout, on checkpoints of step 2 and step 4 of 6."""
    mode, whole = uninterrupted
    with pytest.raises(PowerCut):
        trainer(tmp_path, [checkpoints(tmp_path), Cut(cut)], **TWO_EPOCHS).fit(student(train_mode=mode), world())
    torch.manual_seed(99)
    resumed = trainer(tmp_path, [checkpoints(tmp_path)], **TWO_EPOCHS)
    resumed.fit(student(train_mode=mode), world(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 6
    assert same_ends(whole / "last.ckpt", tmp_path / "last.ckpt")["global_step"] == 6


# -- batches without an image, and bases in half precision ---------------------------------------------------------
def steps(module, batch, folder, count: int = 2) -> Trainer:
    """Train on one batch, again and again."""
    run = trainer(folder, max_steps=count)
    run.fit(module, torch.utils.data.DataLoader([batch] * count, batch_size=None))
    return run


def without_images(batch: dict, image_token: int) -> dict:
    inputs = {name: value for name, value in batch["inputs"].items() if name != "pixel_values"}
    return {
        **batch,
        "inputs": {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == image_token, 5)},
    }


@pytest.fixture(scope="module")
def training_batch(world):
    data = world()
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_a_batch_without_any_image_trains_nothing(student, training_batch, tmp_path):
    module = student("threshold", loss=LossWeights(attention=1.0), watch=[8])
    before = copies(module)
    run = steps(module, without_images(training_batch, module.model.config.image_token_id), tmp_path)
    assert run.callback_metrics["loss/budget"] == 0
    assert run.callback_metrics["loss/attention"] == 0
    assert run.callback_metrics["budget/target"] == run.callback_metrics["budget/actual"] == 0
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_logged_target_counts_each_samples_own_tokens(student, training_batch, tmp_path):
    """Half of the samples without an image: both logged averages are over all samples."""
    module = student(anneal=Anneal(target_share=0.0))
    image = module.model.config.image_token_id
    ids = training_batch["inputs"]["input_ids"].clone()
    half = len(ids) // 2
    ids[half:] = ids[half:].masked_fill(ids[half:] == image, 5)
    inputs = {**training_batch["inputs"], "input_ids": ids}
    inputs["pixel_values"] = inputs["pixel_values"][:half]
    run = steps(module, {**training_batch, "inputs": inputs}, tmp_path, 1)
    assert run.callback_metrics["budget/target"] == pytest.approx(KEEP * half / len(ids))
    assert run.callback_metrics["budget/actual"] == pytest.approx(KEEP * half / len(ids))
    assert math.isfinite(run.callback_metrics["loss/total"])
    assert all(parameter.isfinite().all() for parameter in module.plugin.parameters())


@pytest.mark.parametrize("mode", ["soft", "drop"])
def test_a_base_of_random_weights_in_bfloat16_trains_a_plug_in_in_float32(student, training_batch, tmp_path, mode):
    module = student(train_mode=mode, random_weights=True, dtype="bfloat16")
    assert {p.dtype for p in module.model.parameters()} == {torch.bfloat16}
    before, seen = copies(module), []
    module.on_before_optimizer_step = lambda _: seen.extend(p.grad for p in module.plugin.parameters())
    run = steps(module, training_batch, tmp_path)
    assert math.isfinite(run.callback_metrics["loss/total"])
    assert {grad.dtype for grad in seen} == {torch.float32}
    assert all(grad.isfinite().all() for grad in seen)
    assert {p.dtype for p in module.plugin.parameters()} == {torch.float32}
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters() if name.startswith("plugin."))
