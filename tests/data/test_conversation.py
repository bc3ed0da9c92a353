import pickle

import pytest
import torch
from instruct_samples import CHATML, LLAVA, TOKENS, UNMARKED, conversation, make_processor
from PIL import Image

from lit_prune.data.conversation import IGNORED, answer_ends, encode, image_paths, prompt_length, read_conversation
from lit_prune.data.prompt import render
from lit_prune.errors import BadSample
from lit_prune.micro.model import build_processor

RED = Image.new("RGB", (8, 8), "red")
SINGLE = {"image": "a.png", "conversations": conversation("<image>\nWhat is it?", "A cat.")}
MULTI = {
    "image": "a.png",
    "conversations": conversation("What is it?\n<image>", "A cat.", " Old? ", " no ", "Sure?", "yes it is"),
}
TEXT = {"conversations": conversation("Hi", "Ho")}


def messages(turns: list[dict]) -> list[dict]:
    """The same conversation in the other layout."""
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]


def answers_of(processor, inputs) -> list[str]:
    """The labelled runs of tokens as text."""
    labels, runs = inputs["labels"].tolist(), []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            runs = [*runs, []] if before == IGNORED else runs
            runs[-1].append(label)
    return ["".join(processor.tokenizer.convert_ids_to_tokens(run)) for run in runs]


# What the model reads, frozen: prompt, and what carries labels
@pytest.mark.parametrize("template", [LLAVA, UNMARKED])
@pytest.mark.parametrize(
    ("record", "text", "answers"),
    [
        (SINGLE, "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>", ["▁A▁cat.</s>"]),
        (
            MULTI,
            "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Old? ASSISTANT: no</s>"
            "USER: Sure? ASSISTANT: yes it is</s>",
            ["▁A▁cat.</s>", "▁no</s>", "▁yes▁it▁is</s>"],
        ),
        (TEXT, "USER: Hi ASSISTANT: Ho</s>", ["▁Ho</s>"]),
    ],
)
def test_llava_prompt_and_labels(template, record, text, answers):
    processor = make_processor(template)
    images = [RED] if "image" in record else []
    inputs = encode(processor, record, images)
    assert render(processor, read_conversation(record).messages)[0] == text
    assert processor.tokenizer.decode(inputs["input_ids"]).replace(" ", "") == (
        "<s>" + text.replace("<image>", "<image>" * TOKENS).replace(" ", "")
    )
    assert answers_of(processor, inputs) == answers
    labelled = inputs["labels"] != IGNORED
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])
    assert ("pixel_values" in inputs) == bool(images)


def test_chatml_closes_every_turn_itself():
    processor = make_processor(CHATML, eos="<|im_end|>")
    inputs = encode(processor, MULTI, [RED])
    text = render(processor, read_conversation(MULTI).messages)[0]
    assert text == (
        "<|im_start|>user\nWhat is it?<image><|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nOld?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes it is<|im_end|>"
    )
    assert answers_of(processor, inputs) == ["A▁cat.<|im_end|>", "no<|im_end|>", "yes▁it▁is<|im_end|>"]


def test_micro_llava():
    processor = build_processor()
    record = {
        "image": "a.png",
        "conversations": conversation("<image>\nIs there a red disc?", "yes", "Where?", "top left"),
    }
    inputs = encode(processor, record, [Image.new("RGB", (96, 96))])
    text, _ = render(processor, read_conversation(record).messages)
    assert text == "USER: <image>\nIs there a red disc? ASSISTANT: yes</s>USER: Where? ASSISTANT: top left</s>"
    assert answers_of(processor, inputs) == ["yes</s>", "topleft</s>"]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 144
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


@pytest.mark.parametrize("template", [LLAVA, UNMARKED, CHATML])
@pytest.mark.parametrize("record", [SINGLE, MULTI, TEXT])
def test_the_prompt_of_the_last_answer_is_what_generate_gets(template, record):
    processor = make_processor(template, eos="<|im_end|>" if template == CHATML else "</s>")
    images = [RED] if "image" in record else None
    inputs = encode(processor, record, images or [])
    text = processor.apply_chat_template(read_conversation(record).messages[:-1], add_generation_prompt=True)
    if template != CHATML:  # which closes no answer, as the model did when it gave them
        text = text.replace("A cat. ", "A cat.</s>").replace("no ", "no</s>")
    prompt = processor(text=text, images=images, return_tensors="pt")
    length = prompt_length(inputs["labels"])
    assert inputs["input_ids"][:length].tolist() == prompt["input_ids"][0].tolist()
    asked = encode(processor, record, images or [], answered=False)
    assert asked["input_ids"].tolist() == prompt["input_ids"][0].tolist()
    assert prompt_length(asked["labels"]) == length == len(asked["labels"])


def test_a_template_that_writes_the_first_token_gets_no_second_one(processor):
    own = make_processor("{{ '<s>' }}" + LLAVA)
    assert encode(own, SINGLE, [RED])["input_ids"].tolist() == encode(processor, SINGLE, [RED])["input_ids"].tolist()


# Layouts
def test_messages_layout_is_the_same(processor):
    same = [
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, *answer]}
        for answer in (
            [{"role": "assistant", "content": "A cat."}],
            [{"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "cat."}]}],
        )
    ]
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    same.append({**same[0], "messages": [{"role": "user", "content": parts}, same[0]["messages"][1]]})
    expected = encode(processor, SINGLE, [RED])
    for record in same:
        found = encode(processor, record, [RED])
        assert found["labels"].tolist() == expected["labels"].tolist()
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()


@pytest.mark.parametrize(
    "record",
    [
        {"image": None, "images": ["a.png"], "conversations": SINGLE["conversations"]},
        {"image": "a.png", "conversations": None, "messages": messages(SINGLE["conversations"])},
    ],
)
def test_a_key_that_is_null_is_none(processor, record):
    """As tables have it, whose rows all have all columns."""
    assert image_paths(record) == ["a.png"]
    assert encode(processor, record, [RED])["labels"].tolist() == encode(processor, SINGLE, [RED])["labels"].tolist()


def test_several_images_and_markers(processor):
    record = {"image": ["a", "b"], "conversations": conversation("<image><image> Same?", "no")}
    inputs = encode(processor, record, [RED, RED])
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * TOKENS
    later = {"image": ["a", "b"], "conversations": conversation("<image> Q", "A", "and <image>?", "B")}
    assert answers_of(processor, encode(processor, later, [RED, RED])) == ["▁A</s>", "▁B</s>"]


def test_an_image_without_marker_goes_to_the_first_question(processor):
    bare = {"image": "a.png", "conversations": conversation("What is it?", "A cat.", "Old?", "no")}
    marked = {"image": "a.png", "conversations": conversation("<image>\nWhat is it?", "A cat.", "Old?", "no")}
    found, expected = (encode(processor, record, [RED])["input_ids"].tolist() for record in (bare, marked))
    assert found == expected


def test_what_stands_outside_is_left_out():
    turns = [{"from": "system", "value": "S"}, {"from": "gpt", "value": "x"}, *conversation("Q", "A", "open?")]
    read = read_conversation({"conversations": turns})
    assert [m["role"] for m in read.messages] == ["system", "user", "assistant"]
    assert (read.question, read.answer) == ("Q", "A")
    read = read_conversation({"conversations": turns}, answered=False)
    assert (read.question, read.answer, len(read.messages)) == ("open?", "", 4)


# Bad samples
@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": conversation("Q")}, "a conversation without an answer"),
        ({"conversations": []}, "an empty conversation"),
        ({"conversations": conversation("Q", "  ")}, "an empty answer"),
        ({"conversations": conversation("<image> Q", "A")}, "1 <image> markers but 0 images"),
        ({"image": "a", "conversations": conversation("<image><image> Q", "A")}, "2 <image> markers but 1 images"),
        ({"image": ["a", "b"], "conversations": conversation("<image> Q", "A")}, "1 <image> markers but 2 images"),
        ({"image": "a", "conversations": conversation("Q", "A <image>")}, "marker in an answer"),
        ({"conversations": [*conversation("Q"), *conversation("Q", "A")]}, "do not alternate"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": {}, "value": "x"}]}, "unknown role {}"),
        ({"conversations": [{"from": "system", "value": "<image>"}, *SINGLE["conversations"]]}, "in a system prompt"),
        ({"conversations": conversation("a\ud800b", "A")}, "no Unicode"),
        ({"conversations": conversation("Q", "A\udcff")}, "no Unicode"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "no Unicode"),
        ({"conversations": [{"from": "human", "value": 3}]}, "content is no text"),
        ({"conversations": ["Q", "A"]}, "unknown role None"),
        ({"conversations": "Q"}, "neither a list"),
        ({"conversations": conversation("Q", "A") * 501}, "1002 turns, more than 1000"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor image: 'video'"),
        ({"question": "Q"}, "neither a list"),
        ({"image": 3, "conversations": conversation("Q", "A")}, "neither a path nor a list"),
    ],
)
def test_bad_records(processor, record, reason):
    with pytest.raises(BadSample, match=reason):
        encode(processor, record, [RED])


def test_too_long_is_skipped(processor):
    length = len(encode(processor, SINGLE, [RED])["input_ids"])
    assert len(encode(processor, SINGLE, [RED], max_length=length)["input_ids"]) == length
    with pytest.raises(BadSample, match=f"{length} tokens, more than the context of {length - 1}"):
        encode(processor, SINGLE, [RED], max_length=length - 1)


def test_too_long_loses_whole_turns(processor):
    whole = encode(processor, MULTI, [RED])
    one, two, three = answer_ends(whole["labels"])
    assert three == len(whole["input_ids"])
    for longest, end in ((three, three), (three - 1, two), (two, two), (two - 1, one), (one, one)):
        cut = encode(processor, MULTI, [RED], longest, too_long="cut_turns")
        turns = MULTI["conversations"][: 2 * [one, two, three].index(end) + 2]
        expected = encode(processor, {**MULTI, "conversations": turns}, [RED])
        assert {key: value.tolist() for key, value in cut.items()} == {k: v.tolist() for k, v in expected.items()}
        assert len(cut["labels"]) == end
    with pytest.raises(BadSample, match=f"{three} tokens, more than the context of {one - 1}"):
        encode(processor, MULTI, [RED], one - 1, too_long="cut_turns")


@pytest.mark.parametrize("too_long", ["skip", "cut_turns"])
def test_many_turns_are_not_tokenized_once_for_each(monkeypatch, too_long):
    processor, tokenized = make_processor(), []
    call = type(processor.tokenizer).__call__

    def counted(self, text, *args, **options):
        tokenized.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return call(self, text, *args, **options)

    monkeypatch.setattr(type(processor.tokenizer), "__call__", counted)
    record = {"conversations": conversation(*["Is it so?", "It is."] * 100)}
    whole = len(render(processor, read_conversation(record).messages)[0])
    try:
        found = encode(processor, record, max_length=200, too_long=too_long)
    except BadSample:
        assert too_long == "skip"
    else:
        assert 150 < len(found["input_ids"]) <= 200
    assert whole <= sum(tokenized) < 3 * whole


def test_a_turn_with_an_image_is_never_cut(processor):
    record = {"image": ["a", "b"], "conversations": conversation("<image> Q", "A", "<image> R", "B", "S", "C")}
    one, two, three = answer_ends(encode(processor, record, [RED, RED])["labels"])
    cut = encode(processor, record, [RED, RED], three - 1, too_long="cut_turns")
    assert len(cut["input_ids"]) == two
    assert len(cut["pixel_values"]) == 2
    with pytest.raises(BadSample, match="more than the context"):
        encode(processor, record, [RED, RED], two - 1, too_long="cut_turns")
    assert one < two


def test_templates_that_break_the_rules():
    forgetful = make_processor("{% for m in messages %}{{ messages | length }}{{ m['role'] }} {% endfor %}")
    with pytest.raises(BadSample, match="renders the first turns differently"):
        encode(forgetful, TEXT)
    strict = make_processor("{{ raise_exception('no systems') }}")
    with pytest.raises(BadSample, match="refuses the conversation: no systems"):
        encode(strict, TEXT)
    glued = make_processor(
        UNMARKED.replace("'ASSISTANT:'", "'ASSISTANT: '")
    )  # the answer's first token takes the space
    with pytest.raises(BadSample, match="cannot be separated"):
        encode(glued, TEXT)


@pytest.mark.parametrize(("image", "record"), [(0, MULTI), (1, MULTI), (0, TEXT)], ids=["PaliGemma", "Gemma3", "text"])
def test_answers_are_causal_where_types_say_what_is_the_prompt(processor, image, record):
    """PaliGemma sees tokens of type 0 in both directions: answers may not be among them. Gemma 3 marks images."""

    class Typed(type(processor)):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            inputs["token_type_ids"] = image * (inputs["input_ids"] == self.image_token_id).long()
            return inputs

    typed = Typed(**{name: getattr(processor, name) for name in ("image_processor", "tokenizer", "chat_template")})
    typed.patch_size, typed.vision_feature_select_strategy = processor.patch_size, "default"
    typed.num_additional_image_tokens = processor.num_additional_image_tokens
    inputs = encode(typed, record, [RED] if record is MULTI else [])
    types, first = inputs["token_type_ids"], int((inputs["labels"] != IGNORED).nonzero()[0])
    if image or record is TEXT:
        assert types.tolist() == (inputs["input_ids"] == processor.image_token_id).long().mul(image).tolist()
    else:
        assert types.tolist() == [0] * first + [1] * (len(types) - first)
    asked = encode(typed, SINGLE, [RED], answered=False)
    assert asked["token_type_ids"].max() == image, "a prompt has no answer"


def test_error_pickles():
    error = BadSample("f.json", "s1", "broken")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "f.json: sample s1: broken"
