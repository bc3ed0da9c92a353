"""Pretraining of the 576-token model: packed questions, labels, deepening, stages, resuming, oracles and gates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs.micro_576 import batches, figures, gates, losses, recipe
from jobs.micro_576.oracles import AskedShare, far_apart
from jobs.pretraining import prefetch
from lit_prune.errors import LitPruneError
from lit_prune.micro import model_576
from lit_prune.micro.questions_576 import SKILLS, WORDS, Question, questions
from lit_prune.micro.scenes_576 import GATE_SEED, GRID, PRETRAIN_SEED, TRAIN_SEED, make_scene
from lit_prune.pruners.base import Context

SEED = GATE_SEED + 700_000


@pytest.fixture(scope="module")
def small():
    """An untrained model with two decoder layers."""
    return model_576.build(0, layers=2)[0]


@pytest.fixture(scope="module")
def packed() -> batches.Batch:
    return batches.question_batch([SEED, SEED + 1], None, 1)


# Model


def test_geometry_is_that_of_llava_in_less_than_16_mb() -> None:
    config = model_576.build_config()
    assert (config.image_seq_length, config.text_config.num_hidden_layers) == (576, 32)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert 2 * sum(p.numel() for p in model.parameters()) < 15e6  # bytes of bfloat16


def test_saved_model_and_processor_load_by_the_library_alone(small, packed, tmp_path: Path) -> None:
    recipe.export(small, tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    scene = make_scene(SEED)
    question = packed.questions[0][0]
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=prompt, images=scene.image(), return_tensors="pt")
    own = packed.segments[0] == 1
    length = batches.PREFIX + int(own.sum()) - len(question.answer.split())
    assert inputs["input_ids"].shape[1] == length
    assert torch.equal(inputs["pixel_values"][0], packed.pixels[0])
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, length, 5 + len(WORDS))
    assert processor.tokenizer.decode(inputs["input_ids"][0, -3:]).endswith("assistant:")


# Batches


def test_a_packed_question_is_read_as_if_asked_alone(small, packed) -> None:
    """The library's own forward over one prompt with its answer gives the packed logits."""
    with torch.no_grad():
        visual = losses.see(small, packed.pixels)
        hidden = losses.read(small, packed, visual)
        for b, number in ((0, 1), (1, 7)):
            own = packed.segments[b] == number
            ids = torch.cat([packed.input_ids[b, : batches.PREFIX], packed.input_ids[b][own]])[None]
            alone = small(input_ids=ids, pixel_values=packed.pixels[b : b + 1]).logits[0, batches.PREFIX :]
            assert torch.allclose(small.lm_head(hidden[b][own]), alone, atol=2e-4)


def test_labels_are_the_answers(packed) -> None:
    tokenizer = batches.tokenizer()
    for b, asked in enumerate(packed.questions):
        for number, question in enumerate(asked, 1):
            found = packed.labels[b][packed.segments[b] == number]
            assert tokenizer.decode(found[found >= 0]) == f"{question.answer} </s>"


def test_patch_labels_show_what_lies_there() -> None:
    for seed in range(SEED, SEED + 10):
        scene = make_scene(seed)
        labels = {name: values.reshape(-1) for name, values in batches.patch_labels(scene).items()}
        for thing in scene.things:
            column, row = (int(v // 8) for v in thing.centre)
            middle = row * GRID + column
            if thing.shape != "ring":
                assert labels["colour"][middle] == 1 + batches.INDEX[thing.colour]
                assert labels["pattern"][middle] == 1 + batches.INDEX[thing.pattern]
            mine = (labels["row"] == row) & (labels["column"] == column)
            assert mine.any()
            dots = sum(labels["dot"][mine]) if thing.pattern == "dots" else 0
            assert dots <= len(thing.dots)
            if thing.digits:
                for index, figure in enumerate(thing.digits):
                    assert 1 + figure in labels[("figure", "figure_odd")[index % 2]][mine]
        background = labels["colour"] == 0
        assert (labels["texture"][background] >= 0).mean() > 0.7
        assert (labels["texture"][labels["figure"] > 0] == batches.NONE).all()


def test_pixels_of_patches_are_read_out_in_place() -> None:
    pixels = torch.zeros(1, 3, 192, 192)
    pixels[0, 0, 8 * 5 : 8 * 5 + 4, 8 * 7 + 4 : 8 * 7 + 8] = 1.0  # upper right quarter of the patch in row 5, column 7
    targets = batches.patch_pixels(pixels)
    assert targets.shape == (1, 576, batches.PIXELS)
    assert targets[0].any(-1).nonzero().flatten().tolist() == [5 * GRID + 7]
    assert targets[0, 5 * GRID + 7, 16:20].tolist() == [0, 1, 0, 0]  # red in 2 x 2 blocks


def test_seeds_of_stages_and_ranks_are_disjoint_and_none_is_held_out(monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(batches, "make_scene", lambda seed, *level: asked.append(seed) or make_scene(SEED, 0))
    monkeypatch.setattr(recipe, "world", lambda: 2)
    for number, stage in enumerate(recipe.SMOKE):
        for rank in (0, 1):
            monkeypatch.setattr(recipe, "rank", lambda rank=rank: rank)
            recipe.make_batch(stage, number, 0)
    assert len(asked) == len(set(asked)) == sum(stage.images for stage in recipe.SMOKE)
    longest = max(stage.steps * stage.images for stage in recipe.STAGES)
    assert longest < recipe.STAGE_SEEDS
    assert PRETRAIN_SEED + len(recipe.STAGES) * recipe.STAGE_SEEDS <= GATE_SEED < recipe.HELD_OUT_SEED < TRAIN_SEED


# Losses


def test_auc() -> None:
    scores, wanted = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert losses.auc(scores, wanted) == 0.75
    assert losses.auc(torch.zeros(6), torch.arange(6) < 2) == 0.5


def test_background_likeness_is_the_mean_cosine_of_pairs() -> None:
    visual = torch.randn(2, 9, 16)
    on_object = torch.arange(9).expand(2, 9) < 3
    unit = torch.nn.functional.normalize(visual[:, 3:], dim=-1)
    pairs = [float(unit[b, i] @ unit[b, j]) for b in range(2) for i in range(6) for j in range(6) if i != j]
    assert losses.background_likeness(visual, on_object) == pytest.approx(np.mean(pairs), abs=1e-5)


def test_cloud_loss_is_zero_for_a_wide_cloud_of_short_tokens() -> None:
    visual = torch.randn(2, 576, 128)
    assert all(loss == 0 for loss in losses.cloud_loss(visual).values())
    worse = losses.cloud_loss(4 * visual + 4)
    assert min(worse.values()) > 0.05


def test_no_box_reaches_the_decoder(small, packed) -> None:
    """The answers' loss is the same for a batch whose questions have lost their boxes and patches their labels."""
    blind = replace(packed, patches={}, questions=[[replace(q, boxes=()) for q in asked] for asked in packed.questions])
    with torch.no_grad():
        visual = losses.see(small, packed.pixels)
        one, other = (losses.answer_loss(small, losses.read(small, b, visual), b.labels)[0] for b in (packed, blind))
    assert torch.equal(one, other)


def test_asked_patches_of_a_small_detail() -> None:
    question = Question("", "", "figures", ((10, 10, 13, 13), (80, 80, 96, 96)))
    assert figures.asked_patches(question).nonzero().flatten().tolist() == [25, 250, 251, 274, 275]
    assert not figures.asked_patches(replace(question, boxes=())).any()


def test_word_auc_of_tokens_made_of_their_word(small) -> None:
    """Tokens that point along the word of the colour asked about are found by it."""
    batch = batches.question_batch([SEED], None, {"position": 1})
    (question,) = batch.questions[0]
    wanted = figures.asked_patches(question)
    word = question.text.removeprefix("Where is the ").removeprefix("plain ").split()[0]
    embedding = small.get_input_embeddings().weight[batches.tokenizer().convert_tokens_to_ids(word)]
    visual = 0.3 * torch.randn(1, 576, 128) * embedding.norm() / 128**0.5
    visual[0, wanted] += embedding.detach()
    (found,) = figures.word_auc(small, visual, batch)
    assert found > 0.95


# Recipe


def test_a_deeper_model_computes_the_same_until_it_trains(packed) -> None:
    model = model_576.build(0, layers=2)[0]
    with torch.no_grad():
        visual = losses.see(model, packed.pixels)
        before = losses.read(model, packed, visual)
        recipe.deepen(model, 5)
        assert torch.allclose(losses.read(model, packed, visual), before, atol=1e-5)
    decoder = model.model.language_model
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == list(range(5))
    assert model.config.text_config.num_hidden_layers == 5
    assert len({id(layer.self_attn.config) for layer in decoder.layers}) == 1


def options_for(out: Path, *more: str):
    options = recipe.parse(["--out", str(out), "--smoke", "--processes", "1", "--held-out", "4", "--save-every", "0"])
    stages = [replace(s, images=1, layers=n) for s, n in zip(options.stages, (1, 1, 2, 2, 3), strict=True)]
    options.stages, options.precision, options.validate_every = tuple(stages), "fp32", 2
    return options


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    """Stopped in the third stage and run again: weights and log are those of a run without interruption."""
    torch.use_deterministic_algorithms(True)
    try:
        recipe.work(0, options_for(tmp_path / "whole"))
        steps = iter(range(100))
        step = recipe.take_step

        def stop(*arguments) -> None:
            if next(steps) == 5:
                raise KeyboardInterrupt
            step(*arguments)

        monkeypatch.setattr(recipe, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.work(0, options_for(tmp_path / "cut"))
        monkeypatch.setattr(recipe, "take_step", step)
        recipe.work(0, options_for(tmp_path / "cut"))
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert one["stage"] == len(recipe.STAGES)
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert [row["stage"] for row in one["rows"]] == [row["stage"] for row in other["rows"]]
    assert {*SKILLS, "all", "background cosine", "word AUC"} <= set(one["rows"][-1])
    still = model_576.build(0, 1)[0].state_dict()
    moved = {name: not torch.equal(value, still[name]) for name, value in one["model"].items() if name in still}
    unused = ("position_ids", "post_layernorm")  # LLaVA reads patches, and CLIP's last norm is for its class token
    assert [name for name, it in moved.items() if not it and not any(part in name for part in unused)] == []
    other_seed = options_for(tmp_path / "cut")
    other_seed.seed = 1
    with pytest.raises(ValueError, match="seed 0"):
        recipe.work(0, other_seed)


def test_prefetch_raises_what_its_thread_raised() -> None:
    def fail(step: int):
        raise RuntimeError("no scene")

    with pytest.raises(RuntimeError, match="no scene"):
        next(prefetch(fail, range(3)))


# Oracles and gates


def context(regions: torch.Tensor, count: int) -> Context:
    """A context of which an oracle reads count, places and regions."""
    batch, _, visual = regions.shape
    return Context(
        stage=0,
        visual=torch.zeros(batch, visual, 4),
        alive=torch.ones(batch, visual, dtype=torch.bool),
        ordinal=torch.arange(visual).expand(batch, visual),
        text=torch.zeros(batch, 3, 4),
        text_mask=torch.ones(batch, 3, dtype=torch.bool),
        visual_embeds=None,
        text_embeds=None,
        attention=None,
        count=torch.full((batch,), count),
        total=torch.full((batch,), visual),
        seed=torch.arange(batch),
        hints={"regions": regions},
    )


def test_half_of_the_bound_is_background() -> None:
    regions = torch.zeros(1, 2, 576)
    regions[0, 0, 100:130] = 1.0
    regions[0, 0, 100] = 0.2
    regions[0, 1, 300:303] = 0.5
    half = AskedShare(0.5).score(context(regions, 16))[0].topk(16).indices
    asked = regions[0].amax(0) > 0.3
    assert int(asked[half].sum()) == 8
    assert int((half >= 300).logical_and(half < 303).sum()) == 3  # the parts take turns
    assert 100 not in half.tolist()  # a patch that is hardly covered isn't asked about
    whole = AskedShare(1.0).score(context(regions, 16))[0].topk(16).indices
    assert bool(asked[whole].all())
    nothing = AskedShare(0.5).score(context(torch.zeros(1, 1, 576), 16))[0].topk(16).indices
    assert len(set((nothing // 48).tolist())) > 4  # spread over the image
    with pytest.raises(LitPruneError, match="regions"):
        AskedShare().score(replace(context(regions, 16), hints={}))


def test_the_first_patches_are_spread_over_all_that_are_wanted() -> None:
    wanted = torch.zeros(3, 576, dtype=torch.bool)
    wanted[0].view(24, 24)[5:14, 3:12] = True
    wanted[1, [7, 200]] = True
    order = far_apart(wanted, 6)
    taken = [[divmod(int(patch), 24) for patch in row.argsort()[: int(row.isfinite().sum())]] for row in order]
    assert taken[0][0] == (9, 7)
    assert set(taken[0][1:5]) == {(5, 3), (5, 11), (13, 3), (13, 11)}
    assert [len(each) for each in taken] == [6, 2, 0]


def test_attention_is_that_of_each_question_asked_alone(small) -> None:
    """Against the attention that the plain model hands out for one prompt, in both layers."""
    seed = next(seed for seed in range(5, 50) if len(make_scene(seed).things) > 4)
    batch = batches.question_batch([seed], None, {"colour": 2, "position": 1})
    with torch.no_grad():
        visual = losses.see(small, batch.pixels)
    found = figures.attention_auc(small, visual, batch)
    assert [len(layer) for layer in found] == [len(batch.questions[0])] * 2
    for number, question in enumerate(batch.questions[0], 1):
        own = ((batch.segments[0] == 0) | (batch.segments[0] == number)).nonzero()[:, 0]
        prompt = own[: int((batch.labels[0, own] != batches.NONE).nonzero()[0, 0]) + 1]
        small.set_attn_implementation("eager")
        with torch.no_grad():
            plain = small(input_ids=batch.input_ids[:, prompt], pixel_values=batch.pixels, output_attentions=True)
        small.set_attn_implementation("sdpa")
        patches = figures.asked_patches(question)
        for layer, weights in enumerate(plain.attentions):
            seen = weights[0, :, -1].mean(0)[batches.FIRST_PATCH : batches.PREFIX]
            assert found[layer][number - 1] == pytest.approx(losses.auc(seen, patches), abs=1e-3)


def cell(method: str, keep: int | None, accuracy: float) -> dict:
    return {"method": method, "keep": keep, "accuracy": accuracy, "status": "measured", "per_skill": {}}


def test_gates_are_judged() -> None:
    rows = [cell("full", None, 0.97)]
    for method, high, low in ((gates.BOUND, 0.95, 0.93), ("random", 0.6, 0.4), ("DivPrune", 0.8, 0.6)):
        rows += [cell(method, gates.HIGH, high), cell(method, gates.LOW, low)]
    inner = {"blind": 0.25, "background cosine": 0.2, "word AUC": 0.7}
    judged = gates.judge(rows, inner)
    assert [good for *_, good in judged] == [True] * 5
    assert "DivPrune" in judged[3][0]
    layers = {"blind by skill": {"words": 1.0}, "attention AUC": [0.5] * 12}
    card = gates.as_markdown(gates.tables_of(rows, inner | layers, judged))
    assert "| full accuracy | 0.970 | >= 0.95 | passed |" in card
    assert "| half background | 16 | 93.0 |" in card
    assert "| 8 to 11 | 0.50, 0.50, 0.50, 0.50 |" in card
    rows[-2]["accuracy"] = 0.9
    assert [good for *_, good in gates.judge(rows, inner | {"word AUC": 0.9})] == [True, True, True, False, False]


def test_gate_questions_are_held_out_and_balanced(tmp_path: Path) -> None:
    import json

    samples = json.loads(gates.write_questions(tmp_path, 2).read_text())
    assert len(samples) == 2 * len(SKILLS)
    assert {sample["image"] for sample in samples} == {f"images/{GATE_SEED + i}.png" for i in range(2)}
    assert len(questions(make_scene(GATE_SEED), 1)) >= len({s["skill"] for s in samples[: len(SKILLS)]})
