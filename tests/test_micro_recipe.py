"""micro-LLaVA: model, processor, packed questions, losses, a few steps of the recipe, and the shipped weights."""

import hashlib
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs.micro_llava import batches, losses, probe, recipe
from jobs.micro_llava.evaluate import (
    EVALUATION_SEED,
    ROWS,
    SCHEDULE,
    asked_patches,
    evaluate,
    right_answers,
    single_batches,
    split,
)
from lit_prune.micro.model import EOS, IMAGE, LAYERS, VISUAL_TOKENS, WEIGHTS, build
from lit_prune.micro.world import RESERVED_SEED, SKILLS, VALIDATION_SEED, make_scene

SEED = VALIDATION_SEED + 700_000


@pytest.fixture(scope="module")
def micro():
    return build(0)


@pytest.fixture(scope="module")
def packed() -> batches.Batch:
    return batches.question_batch([SEED, SEED + 1])


def conversation(question: str, *more: str) -> list[dict]:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    for i, text in enumerate(more):
        role = ("assistant", "user")[i % 2]
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return messages


def test_build_is_seeded(micro):
    same, other = build(0)[0], build(1)[0]
    first = micro[0].lm_head.weight
    assert torch.equal(first, same.lm_head.weight)
    assert not torch.equal(first, other.lm_head.weight)


def test_chat_template(micro):
    _, processor = micro
    prompt = processor.apply_chat_template(conversation("Is there a red circle?"), add_generation_prompt=True)
    assert prompt == "USER: <image>\nIs there a red circle? ASSISTANT:"
    turns = conversation("Is there a red circle?", "yes", "Where is the red circle?")
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "USER: <image>\nIs there a red circle? ASSISTANT: yes</s>USER: Where is the red circle? ASSISTANT:"
    )


def test_chat_template_marks_the_answer(micro):
    _, processor = micro
    text = [{"role": "user", "content": "Is there a red circle?"}, {"role": "assistant", "content": "yes"}]
    encoded = processor.tokenizer.apply_chat_template(
        text,
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert processor.tokenizer.decode(encoded["input_ids"][encoded["assistant_masks"].bool()]) == "yes </s>"


def test_save_and_load_without_our_code(micro, tmp_path):
    model, processor = micro
    recipe.export(model, processor, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 16 * 2**20
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.config.text_config.num_hidden_layers == LAYERS == 16
    prompt = processor.apply_chat_template(conversation("How many objects are red?"), add_generation_prompt=True)
    inputs = processor(text=prompt, images=make_scene(SEED).image(), return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == VISUAL_TOKENS == 144
    assert loaded.generate(**inputs, max_new_tokens=2, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 2
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name


def test_pixels_equal_the_processors(micro):
    scene = make_scene(SEED)
    expected = micro[1].image_processor(scene.image(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(torch.from_numpy(batches.pixel_values(scene)), expected)


@torch.no_grad()
def test_shared_prefix_equals_single_questions(micro, packed):
    """A packed question has the ids of the processor's prompt and the logits of the question asked alone."""
    model, processor = micro
    shared = model.lm_head(losses.read(model, packed, losses.see(model, packed.pixels)[0]))
    for b, questions in enumerate(packed.questions):
        for number, question in enumerate(questions[::3], 1):
            own = packed.segments[b] == 3 * number - 2
            turns = conversation(question.text, question.answer)
            text = processor.apply_chat_template(turns).removesuffix("</s>")
            inputs = processor(text=text, images=make_scene(SEED + b).image(), return_tensors="pt")
            tail = slice(batches.PREFIX, None)
            assert torch.equal(inputs["input_ids"][0, tail], packed.input_ids[b][own])
            assert torch.allclose(model(**inputs).logits[0, tail], shared[b][own], atol=1e-5)


@torch.no_grad()
def test_split_equals_packed(micro, packed):
    model, _ = micro
    single = split(packed)
    hidden = losses.read(model, packed, losses.see(model, packed.pixels)[0])[packed.labels >= 0]
    alone = losses.read(model, single, losses.see(model, single.pixels)[0])[single.labels >= 0]
    assert torch.allclose(hidden, alone, atol=1e-4)


def test_labels_are_the_answers(packed, micro):
    tokenizer = micro[1].tokenizer
    for b, questions in enumerate(packed.questions):
        for number, question in enumerate(questions, 1):
            found = packed.labels[b][packed.segments[b] == number]
            found = found[found >= 0]
            assert found[-1] == EOS
            assert tokenizer.decode(found[:-1]) == question.answer


def test_attention_is_supervised_late_only():
    """Pruners act at layers 1, 5 and later: nothing may tell layers 0 to 4 where to look."""
    layers = [layer for table in (losses.GROUNDING, losses.MORE_GROUNDING) for layer, _ in table.values()]
    assert min(layers) >= 5
    assert set(layers) <= set(losses.SUPERVISED_LAYERS)
    assert max(layers) <= 9


def test_attention_targets(packed):
    for name, (_, position, target) in packed.rows.items():
        assert torch.allclose(target.sum(1), torch.ones(len(target))), name
        assert (position >= batches.PREFIX).all()
    count = packed.rows["count"][2]
    assert torch.equal(1 / count[:, 0] - 1, (count[:, batches.FIRST_PATCH :] > 0).sum(1).float())


def test_word_leak_sees_alignment_and_nothing_else():
    torch.manual_seed(0)
    patches = batches.question_batch(list(range(SEED, SEED + 8)), 1).patches
    embeddings = torch.randn(80, 128)
    visual = torch.randn(8, 144, 128)
    unrelated = losses.word_leak(visual, embeddings, patches)
    colour = patches["colour"]
    named = embeddings[torch.tensor(losses.NAMES)[(colour - 1).clamp(min=0)]]
    aligned = losses.word_leak(torch.where(colour[..., None] > 0, visual + named, visual), embeddings, patches)
    assert unrelated < 0.01
    assert aligned > 10 * unrelated


def test_prefetch_raises_what_its_thread_raised():
    def fail(seeds):
        raise RuntimeError("no scene")

    with pytest.raises(RuntimeError, match="no scene"):
        next(batches.prefetch(fail, 0, 2, range(3)))


def test_prefetch_gives_each_step_its_own_seeds():
    assert list(batches.prefetch(lambda seeds: seeds, 10, 3, range(1, 3))) == [[13, 14, 15], [16, 17, 18]]


def test_a_few_steps_and_resume(tmp_path, monkeypatch):
    """Both stages run; an interrupted run continues; every weight that trains has moved."""
    for name in ("IMAGES", "VISION_IMAGES", "VALIDATION_IMAGES"):
        monkeypatch.setattr(recipe, name, 2)
    common = ["--out", str(tmp_path), "--steps-vision", "2", "--save-every", "0"]
    recipe.main([*common, "--steps", "1"])
    recipe.main([*common, "--steps", "2", "--resume"])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["step"]) == ("end-to-end", 2)
    start = build(0)[0].state_dict()
    still = [name for name, value in state["model"].items() if torch.equal(value, start[name])]
    assert not [name for name in still if "position_ids" not in name], still
    assert (tmp_path / "model" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="seed"):
        recipe.main([*common, "--steps", "2", "--resume", "--seed", "1"])


def test_schedule_keeps_sixteen_tokens_on_average():
    kept = [SCHEDULE[max(first for first in SCHEDULE if first <= layer)] for layer in range(1, LAYERS)]
    assert VISUAL_TOKENS + sum(kept) == 16 * LAYERS


def test_asked_patches_cover_the_objects():
    for question in make_scene(SEED).questions(2):
        assert [len(patches) for patches in asked_patches(question)] == [4] * len(question.boxes)


def test_evaluation_rows(micro):
    table = evaluate(micro[0], 7, ["oracle", "word similarity"])
    names = [row["name"] for row in table]
    assert names == ["all tokens", "blank image", "majority answer", "word similarity", "oracle"]
    assert table[-1]["recall"] == 1.0
    assert {*SKILLS, "all"} <= set(table[0])
    assert next(single_batches(14)).input_ids.shape[0] == 14
    assert EVALUATION_SEED + 1_000_000 < RESERVED_SEED
    assert "random 0" in ROWS


def test_shipped_weights_answer_and_match_their_card():
    card = (WEIGHTS / "README.md").read_text()
    digest = hashlib.sha256((WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(r"sha256[^0-9a-f]*([0-9a-f]{64})", card).group(1) == digest
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 16 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS).eval()
    right = torch.cat([right_answers(model, batch)[0] for batch in single_batches(196)]).float()
    assert right.mean() > 0.97
    table = {row["name"]: row for row in evaluate(model, 70, ["random 0", "word similarity", "oracle"])}
    assert min(table["all tokens"][skill] for skill in SKILLS) > 0.88
    assert all(table["blank image"][skill] <= table["majority answer"][skill] + 0.05 for skill in SKILLS)
    assert table["random 0"]["all"] < table["all tokens"]["all"] - 0.3
    assert table["oracle"]["all"] > table["all tokens"]["all"] - 0.03
    assert table["word similarity"]["all"] < table["oracle"]["all"] - 0.1


def test_shipped_weights_generate_their_answers():
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS).eval()
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    scene = make_scene(EVALUATION_SEED)
    questions = scene.questions(1)
    prompts = [processor.apply_chat_template(conversation(q.text), add_generation_prompt=True) for q in questions]
    images = [scene.image()] * len(prompts)
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    assert sum(a == q.answer for a, q in zip(answers, questions, strict=True)) >= len(questions) - 1


def test_probe_reads_the_states_of_layer_one(micro, packed):
    """Visual tokens come from the image of their question, and the last state is that of "ASSISTANT:"."""
    visual, words, asked = probe.states(micro[0], packed)
    present = [question for questions in packed.questions for question in questions if question.boxes]
    assert visual.shape == (len(present), VISUAL_TOKENS, 128)
    assert words.shape == (len(present), 128)
    assert asked.sum(1).tolist() == [4 * len(question.boxes) for question in present]
    assert len(micro[0].model.language_model.layers) == LAYERS
    assert probe.train(micro[0], 1)(visual, words).shape == asked.shape
