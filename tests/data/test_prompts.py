"""What every family reads and learns, letter by letter: [[ ]] stand around what carries labels."""

import json
import re

import pytest
import torch
from instruct_samples import conversation, make_data
from PIL import Image
from prompt_families import PROCESSORS

from lit_prune.data.conversation import IGNORED, encode, image_paths, read_conversation
from lit_prune.data.prompt import render
from lit_prune.errors import BadSample

SAMPLES = {
    "one turn": {"image": "a.png", "conversations": conversation("<image>\nWhat is it?", "A cat.")},
    "turns": {
        "image": "a.png",
        "conversations": conversation("What is it?\n<image>", "A cat.", " Old? ", " no ", "Sure?", "yes it is"),
    },
    "text": {"conversations": conversation("Hi", "Ho")},
    "images": {
        "image": ["a.png", "b.png"],
        "conversations": conversation("<image>\nWhat is it?", "A cat.", "And <image>?", "A dog."),
    },
}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VICUNA = {
    "one turn": "USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]",
    "turns": "USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]USER: Old? ASSISTANT:[[ no</s>]]"
    "USER: Sure? ASSISTANT:[[ yes it is</s>]]",
    "text": "USER: Hi ASSISTANT:[[ Ho</s>]]",
    "images": "USER: <image>\nWhat is it? ASSISTANT:[[ A cat.</s>]]USER: <image>\nAnd  ? ASSISTANT:[[ A dog.</s>]]",
}


def chatml(image: str, first: str = "") -> dict[str, str]:
    """ChatML with images where the sample has them; `first` is what the template begins with."""
    first += "<|im_start|>user\n"
    cat = "<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n<|im_start|>user\n"
    return {
        "one turn": f"{first}{image}What is it?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]",
        "turns": f"{first}What is it?{image}{cat}Old?<|im_end|>\n<|im_start|>assistant\n[[no<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[yes it is<|im_end|>]]",
        "text": f"{first}Hi<|im_end|>\n<|im_start|>assistant\n[[Ho<|im_end|>]]",
        "images": f"{first}{image}What is it?{cat}And {image}?<|im_end|>\n<|im_start|>assistant\n[[A dog.<|im_end|>]]",
    }


PROMPTS = {
    "llava-1.5": VICUNA,
    "llava-next-vicuna": VICUNA,
    "llava-next-mistral": {
        "one turn": "[INST] <image>\nWhat is it? [/INST][[ A cat.</s>]]",
        "turns": "[INST] <image>\nWhat is it? [/INST][[ A cat.</s>]] [INST] Old? [/INST][[ no</s>]]"
        " [INST] Sure? [/INST][[ yes it is</s>]]",
        "text": "[INST] Hi [/INST][[ Ho</s>]]",
        "images": "[INST] <image>\nWhat is it? [/INST][[ A cat.</s>]] [INST] <image>\nAnd ? [/INST][[ A dog.</s>]]",
    },
    "llava-onevision": {
        "one turn": "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant\n[[A cat.<|im_end|>]]",
        "turns": "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant\n[[A cat.<|im_end|>]]"
        "<|im_start|>user \nOld?<|im_end|><|im_start|>assistant\n[[no<|im_end|>]]"
        "<|im_start|>user \nSure?<|im_end|><|im_start|>assistant\n[[yes it is<|im_end|>]]",
        "text": "<|im_start|>user \nHi<|im_end|><|im_start|>assistant\n[[Ho<|im_end|>]]",
        "images": "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant\n[[A cat.<|im_end|>]]"
        "<|im_start|>user <image>\nAnd \n?<|im_end|><|im_start|>assistant\n[[A dog.<|im_end|>]]",
    },
    "internvl": chatml("<IMG_CONTEXT>\n"),
    "qwen2.5-vl": chatml("<|vision_start|><|image_pad|><|vision_end|>", SYSTEM),
    "qwen3-vl": chatml("<|vision_start|><|image_pad|><|vision_end|>"),
}


@pytest.fixture(scope="module", params=PROMPTS)
def family(request):
    return request.param, PROCESSORS[request.param]()


@pytest.mark.parametrize("sample", SAMPLES)
def test_prompt_and_labels(family, sample):
    name, processor = family
    record, pinned = SAMPLES[sample], PROMPTS[name][sample]
    plain = pinned.replace("[[", "").replace("]]", "")
    text, spans = render(processor, read_conversation(record).messages)
    assert text == plain
    assert [text[start:end] for start, end in spans] == re.findall(r"\[\[(.*?)\]\]", pinned, re.S)
    images = [Image.new("RGB", (24, 12), colour) for colour in ("red", "blue")][: plain.count(processor.image_token)]
    inputs = encode(processor, record, images)
    assert labelled(processor, inputs) == [text[start:end] for start, end in spans]
    assert read_back(processor, inputs["input_ids"]).replace(" ", "") == plain.replace(" ", "")
    assert ("pixel_values" in inputs) == bool(images)


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_prompt_is_what_stands_before_the_last_answer(family, sample):
    name, processor = family
    record = SAMPLES[sample]
    asked, spans = render(processor, read_conversation(record, answered=False).messages)
    assert not spans
    assert asked == PROMPTS[name][sample].rpartition("[[")[0].replace("[[", "").replace("]]", "")
    if sample in ("one turn", "text"):
        stock = processor.apply_chat_template(read_conversation(record).messages[:-1], add_generation_prompt=True)
        assert asked == stock


def test_tokens_of_images_in_a_text_are_refused(family):
    """A model would look for images behind them; where the processor lets them pass, the answer would be cut in two."""
    name, processor = family
    if name not in ("llava-1.5", "llava-next-vicuna", "llava-next-mistral", "llava-onevision"):  # else it is a marker
        asked = {"conversations": conversation(f"What is {processor.image_token}?", "A cat.")}
        with pytest.raises(BadSample, match="no images were passed"):
            encode(processor, asked)
    for token in ("<img>", "</img>") if name == "internvl" else ():
        with pytest.raises(BadSample, match="an answer with a token of images"):
            encode(processor, {"conversations": conversation("Q", f"A {token} b")})


def test_a_batch_is_what_the_processor_makes_of_all(family, tmp_path):
    """One sample after the other, then together: the same tensors as the processor's own batch."""
    _, processor = family
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (24, 12), colour).save(tmp_path / name)
    (tmp_path / "data.json").write_text(json.dumps(list(SAMPLES.values())))
    data = make_data(processor, test=str(tmp_path / "data.json"))
    data.setup("test")
    batch = data.on_before_batch_transfer(next(iter(data.test_dataloader())), 0)
    texts = [render(processor, read_conversation(record).messages)[0] for record in SAMPLES.values()]
    paths = [image_paths(record) for record in SAMPLES.values()]
    images = [[Image.open(tmp_path / path) for path in found] for found in paths if found]
    padding = {"padding": True, "padding_side": "right"}
    expected = processor(text=texts, images=images, text_kwargs=padding, return_tensors="pt")
    assert set(expected) == set(batch["inputs"]) - {"labels"}
    for key, value in expected.items():
        assert torch.equal(batch["inputs"][key], value), key


def labelled(processor, inputs) -> list[str]:
    """The labelled runs of tokens as text."""
    labels = inputs["labels"]
    starts = torch.nn.functional.pad(labels != IGNORED, (1, 0))
    runs = torch.tensor_split(labels, ((starts[1:] != starts[:-1]).nonzero().flatten()).tolist())
    return [spelt(processor, run) for run in runs if len(run) and run[0] != IGNORED]


def spelt(processor, ids) -> str:
    if processor.tokenizer.bos_token is None:  # bytes
        return processor.tokenizer.decode(ids)
    return "".join(processor.tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")


def read_back(processor, ids) -> str:
    """The text of all tokens, with one image token an image and no token of the tokenizer's own."""
    token = re.escape(processor.image_token)
    text = re.sub(f"(?:<img>)?(?:{token})+(?:</img>)?", processor.image_token, spelt(processor, ids))
    return text.removeprefix(processor.tokenizer.bos_token or "")
