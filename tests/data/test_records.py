"""Layouts of records, one by one: what is read, and the words for what is not."""

import json

import pytest
from dressed import encoded, write_images
from instruct_samples import conversation
from PIL import Image
from prompt_families import PROCESSORS

from lit_prune.data.conversation import IGNORED, answer_ends, encode, image_paths, read_conversation
from lit_prune.data.dataset import InstructDataset
from lit_prune.data.records import similar_keys
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample
from lit_prune.micro.model import build_processor

QA = conversation("<image>\nWhat is it?", "A cat.")
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def turns(record: dict, answered: bool = True) -> list[tuple[str, str]]:
    """Role and text of every message, an image as <image>."""
    return [
        (message["role"], "".join(part.get("text", "<image>") for part in message["content"]))
        for message in read_conversation(record, answered).messages
    ]


def reason(record: dict, answered: bool = True) -> str:
    with pytest.raises(BadSample) as caught:
        read_conversation(record, answered)
    return caught.value.reason


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": CHAT},
        {"messages": conversation("Q", "A")},
        {"conversation": CHAT},
        {"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]},
        {"conversations": [{"from": "USER", "value": "Q"}, {"from": "model", "value": "A"}]},
        {"messages": [{"role": "User", "content": "Q"}, {"role": "Bot", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q", "from": None}, {"role": "assistant", "value": "A"}]},
        {"messages": [{"role": "user", "content": ["Q"]}, {"role": "assistant", "content": [{"text": "A"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Q"}]}, CHAT[1]]},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]}]},
        {"conversations": conversation("Q", "A"), "messages": CHAT},
        {"conversations": [], "messages": CHAT},
        {"conversations": conversation("Q", "A"), "system": "", "tools": [], "video": None, "videos": [None]},
        {"texts": [{"user": "Q", "assistant": "A", "source": "x"}]},
        {"messages": CHAT, "texts": ["a text in the image"], "conversation": "7"},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"query": "Q", "response": "A", "history": None},
        {"question": "Q", "answer": "A"},
        {"prompt": "Q", "completion": "A"},
    ],
    ids=lambda record: json.dumps(record)[:60],
)
def test_one_question_in_every_layout(record):
    assert turns(record) == [("user", "Q"), ("assistant", "A")]


def test_alpaca_with_input_history_system_and_image():
    record = {"image": "a.png", "instruction": "Q", "input": "more", "output": "A", "history": [["Q0", "A0"]]}
    expected = [("user", "<image>Q0"), ("assistant", "A0"), ("user", "Q\nmore"), ("assistant", "A")]
    assert turns(record) == expected
    assert turns({**record, "system": "S"}) == [("system", "S"), *expected]
    assert turns({**record, "output": None}, answered=False) == expected[:-1]
    marked = {**record, "history": None, "instruction": "What is <image> ?"}
    assert turns(marked)[0] == ("user", "What is <image> ?\nmore")
    assert "its history is no list" in reason({**record, "history": ["Q0"]})
    assert "content is no text" in reason({**record, "input": 3})


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (-1.5, "-1.5"), (0, "0"), (10**30, "1" + "0" * 30)])
def test_answers_that_are_numbers(value, text):
    assert turns({"conversations": [QA[0] | {"value": "Q"}, {"from": "gpt", "value": value}]})[1] == ("assistant", text)
    assert turns({"question": "Q", "answer": value})[1] == ("assistant", text)
    parts = [{"type": "text", "text": value}]
    assert turns({"messages": [CHAT[0], {"role": "assistant", "content": parts}]})[1] == ("assistant", text)


@pytest.mark.parametrize("value", [True, False, float("nan"), float("inf"), {}, ["A", 3.5, None], {"text": "A"}])
def test_answers_that_are_no_text(value):
    assert reason({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": value}]})


@pytest.mark.parametrize("key", ["context", "choices", "options", "hint"])
def test_what_a_question_cannot_do_without(key):
    """Taken from the question it would ask something else; beside turns it is a key like any other."""
    value = ["a", "b"] if key in ("choices", "options") else "Once upon a time"
    assert f"it has {key}: write it into the question" in reason({"question": "Q", "answer": "A", key: value})
    assert turns({"question": "Q", "answer": "A", key: None}) == turns({"messages": CHAT, key: value})


# Systems, weights, what is not read
def test_a_system_beside_the_turns():
    plain = {"conversations": conversation("Q", "A")}
    with_turn = {"conversations": [{"from": "system", "value": "S"}, *conversation("Q", "A")]}
    assert turns({**plain, "system": " S "}) == turns({**plain, "system_prompt": "S"}) == turns(with_turn)
    assert turns({**with_turn, "system": "S"}) == turns(with_turn)
    empty = {"conversations": [{"from": "system", "value": ""}, *conversation("Q", "A")]}
    assert turns({**empty, "system": "S"}) == turns(with_turn)
    assert "system and system_prompt that differ" in reason({**plain, "system": "S", "system_prompt": "T"})
    assert "another one beside them" in reason({**with_turn, "system": "T"})
    assert "content is no text" in reason({**plain, "system": {"a": 1}})
    assert "in a system prompt" in reason({**plain, "image": "a", "system": "<image>"})


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_answers_of_weight_0_carry_no_labels(processor, key, off):
    chat = conversation("<image>Q", "one", "R", "two", "S", "three")
    chat[3][key] = off
    chat[5][key] = True
    chat[4][key] = 1  # of a question: says nothing
    record, image = {"image": "a", "conversations": chat}, [Image.new("RGB", (8, 8))]
    whole = encode(
        processor, {"image": "a", "conversations": conversation("<image>Q", "one", "R", "two", "S", "three")}, image
    )
    found = encode(processor, record, image)
    assert found["input_ids"].tolist() == whole["input_ids"].tolist()
    ends = answer_ends(whole["labels"])
    expected = whole["labels"].clone()
    expected[ends[0] : ends[1]] = IGNORED
    assert found["labels"].tolist() == expected.tolist()
    assert len(answer_ends(found["labels"])) == 2


def test_the_last_answer_may_be_of_weight_0(processor, tmp_path):
    chat = [*conversation("Q", "one", "R"), {"from": "gpt", "value": "two", "weight": 0}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": chat}))
    source = open_source(tmp_path / "data.jsonl")
    trained, measured = (InstructDataset(source, processor, mode=mode)[0] for mode in ("train", "eval"))
    assert trained.answer == measured.answer == "two"
    assert trained.prompt == measured.prompt
    assert answer_ends(trained.inputs["labels"]) == answer_ends(measured.inputs["labels"])[:1]


def test_turns_are_cut_and_weighed(processor):
    chat = [
        *conversation("Q"),
        {"from": "gpt", "value": "A" * 30, "weight": 0},
        *conversation("R", "B" * 30, "S", "C" * 30),
    ]
    whole = encode(processor, {"conversations": chat})
    first, second = answer_ends(whole["labels"])
    cut = encode(processor, {"conversations": chat}, (), first, too_long="cut_turns")
    assert len(cut["labels"]) == first < second
    with pytest.raises(BadSample, match="no answer to learn from: all have weight 0"):
        encode(processor, {"conversations": chat}, (), first - 1, too_long="cut_turns")


@pytest.mark.parametrize("weight", [0.5, -1, 2, "0", [0], {}])
def test_other_weights_are_refused(weight):
    assert "it is trained on (1) or not (0)" in reason({"messages": [CHAT[0], {**CHAT[1], "weight": weight}]})


def test_no_answer_to_learn_from(processor):
    record = {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}
    with pytest.raises(BadSample, match="no answer to learn from"):
        encode(processor, record)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"video": "v.mp4"}, "it has video: videos are not read"),
        ({"videos": ["v.mp4"]}, "it has videos: videos are not read"),
        ({"audio": "a.wav"}, "it has audio: audio is not read"),
        ({"audios": [{"path": "a.wav"}]}, "it has audios: audio is not read"),
        ({"tools": [{"name": "f"}]}, "it has tools: tools are not read"),
        ({"tools": '[{"name": "f"}]'}, "it has tools: tools are not read"),
        ({"functions": [{}]}, "it has functions: tools are not read"),
    ],
)
def test_what_is_not_read_is_said(more, words):
    assert words in reason({"messages": CHAT, **more})
    assert words in reason({"messages": [{**CHAT[0], **more}, CHAT[1]]})


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("<video>\nWhat happens?", "a <video> marker: videos are not read"),
        ("Listen: <audio>", "a <audio> marker: audio is not read"),
        ("Picture 1: <img>a.png</img>", "an image between <img> and </img>"),
        ([{"type": "video", "video": "v.mp4"}], "neither text nor image: 'video'"),
        ([{"type": "input_audio"}], "neither text nor image: 'input_audio'"),
        ([{"type": "text", "text": "Q", "image": "a.png"}], "both text and image"),
        ([{"type": "image", "image": "a.png", "text": "a caption"}], "both text and image"),
        ([{"type": "image", "path": "a.png", "url": "b.png"}], "an image of several references: path, url"),
        ([3], "neither text nor image"),
        ([{}], "neither text nor image"),
    ],
)
def test_what_a_question_may_not_hold(question, words):
    assert words in reason({"messages": [{"role": "user", "content": question}, CHAT[1]]})
    assert words in reason({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A"}]})


def test_answers_may_speak_of_tags():
    assert (
        turns({"conversations": conversation("Q", "Use <video> and <img>x</img>.")})[1][1]
        == "Use <video> and <img>x</img>."
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool': tools are not read"),
        (
            {"messages": [{"form": "human", "value": "Q"}]},
            "a turn without a role (from or role); its keys are form, value",
        ),
        ({"messages": [{"role": "user", "from": "gpt", "content": "Q"}]}, "a turn that is given twice and differs"),
        ({"messages": [{"role": "user", "content": "Q", "value": "R"}]}, "a turn that is given twice and differs"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{}]}]}, "it has tool_calls: tools are not read"),
        ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]}, "reasoning is not read"),
        (
            {"messages": CHAT, "conversations": conversation("Q", "B")},
            "turns under conversations and messages that differ",
        ),
        ({"conversatons": QA, "image": "a"}, "its keys are conversatons, image"),
        ({"messages": CHAT, "image": "a", "images": ["b"]}, "images under image and images that differ"),
        ({"messages": CHAT, "images": [3]}, "image 0 is neither a path nor bytes, but a number"),
        ({"conversations": QA, "image_path": "a.png"}, "1 <image> markers but 0 images; nothing reads its image_path"),
    ],
)
def test_words_for_what_cannot_be_read(record, words):
    assert words in reason(record)


# Where images stand
def chat(*parts, text="Q", **turn) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}], **turn}, CHAT[1]]}


IMAGE_A, IMAGE_B = ({"type": "image", "image": name} for name in "ab")
BARE = {"type": "image"}


@pytest.mark.parametrize(
    ("record", "paths", "shown"),
    [
        (chat(IMAGE_A), ["a"], [0]),
        (chat({"type": "image_url", "image_url": {"url": "a"}}), [{"url": "a"}], [0]),
        (chat({"type": "image_url", "image_url": "a"}), ["a"], [0]),
        (chat({"image": "a"}), ["a"], [0]),
        (chat({"type": "image", "bytes": None, "path": "a"}), [{"path": "a"}], [0]),
        (chat(IMAGE_B, IMAGE_A), ["b", "a"], [0, 1]),
        (chat(IMAGE_A, IMAGE_A), ["a", "a"], [0, 1]),
        ({**chat(BARE), "image": "a"}, ["a"], [0]),
        ({**chat(IMAGE_A), "image": "a"}, ["a"], [0]),
        ({**chat(IMAGE_B, BARE), "images": ["a"]}, ["a", "b"], [1, 0]),
        ({**chat(IMAGE_B, BARE), "images": ["a", "b"]}, ["a", "b"], [1, 0]),
        ({**chat(IMAGE_A, IMAGE_A), "images": ["a", "a"]}, ["a", "a"], [0, 1]),
        (
            {**chat({"type": "image", "index": 1}, {"type": "image", "index": 0.0}), "images": ["a", "b"]},
            ["a", "b"],
            [1, 0],
        ),
        ({**chat({"type": "image", "index": 0}, {"type": "image", "index": 0}), "images": ["a"]}, ["a"], [0, 0]),
        (chat(text="<image> or <image>", images=["a", "b"]), ["a", "b"], [0, 1]),
        (chat(images=["a", "b"]), ["a", "b"], [0, 1]),
        (chat(image="a"), ["a"], [0]),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_images_are_numbered(record, paths, shown):
    assert image_paths(record) == paths
    assert list(read_conversation(record).shown) == shown
    messages = read_conversation(record).messages
    assert [part for part in messages[0]["content"] if part["type"] == "image"] == [{"type": "image"}] * len(shown)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**chat({"type": "image", "index": 1}), "images": ["a"]}, "a turn shows image 1, but there are 1"),
        ({**chat({"type": "image", "image": "b"}), "images": ["a"]}, "0 <image> markers but 1 images"),
        ({**chat({"type": "image", "index": 0}), "images": ["a", "b"]}, "0 <image> markers but 1 images"),
        (chat({"type": "image", "image": "a"}, text="<image> Q"), "1 <image> markers but 0 images"),
        (chat(text="<image> Q", images=["a", "b"]), "1 <image> markers but 2 images in a turn"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "image", "image": "a"}, "A"]}]},
            "marker in an answer",
        ),
        ({"messages": [CHAT[0], {**CHAT[1], "images": ["a"]}]}, "marker in an answer"),
    ],
)
def test_images_that_do_not_match_their_places(record, words):
    assert words in reason(record)


def test_what_is_cut_off_shows_nothing():
    record = chat({"type": "image", "image": "a"})
    record["messages"] += [{"role": "user", "content": [{"type": "image", "image": "b"}, "open?"]}]
    assert image_paths(record) == ["a", "b"]
    assert read_conversation(record).shown == (0,)
    assert read_conversation(record, answered=False).shown == (0, 1)


@pytest.mark.parametrize("name", ["micro", "qwen3-vl"])
def test_the_model_gets_the_images_in_the_order_of_the_text(tmp_path, name):
    """Whichever way the record refers to them."""
    root = write_images(tmp_path / "x")
    processor = build_processor() if name == "micro" else PROCESSORS[name]()
    data = f"data:image/png;base64,{encoded(root, 'a.png')}"
    shuffled = {
        **chat({"type": "image", "image": "c.png"}, {"type": "image"}, {"type": "image", "image": data}),
        "image": "b.png",
    }
    plain = {"images": ["c.png", "b.png", "a.png"], "conversations": conversation("<image><image><image>Q", "A")}
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, [shuffled, plain])))
    first, second = (InstructDataset(open_source(root / "data.jsonl"), processor)[index].inputs for index in (0, 1))
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
    assert first["pixel_values"].tolist() == second["pixel_values"].tolist()


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"image_path": "a.png"}, ["image_path"]),
        ({"img": "a", "Image": "b", "pictures": ["c"], "photo": {"path": "d"}}, ["img", "Image", "pictures", "photo"]),
        ({"imgae": "a.png"}, ["imgae"]),
        ({"image_id": 5, "image_width": 640, "image_url": "", "images": [], "id": "x", "skill": "y"}, []),
    ],
)
def test_keys_that_look_as_if_they_held_images(record, keys):
    assert similar_keys(record) == keys
