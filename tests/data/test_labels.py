"""Labels of random conversations against another way to find them: text by hand, tokens by their characters' places."""

import random
from itertools import chain

import pytest
from instruct_samples import conversation
from PIL import Image
from prompt_families import PROCESSORS

from lit_prune.data.conversation import IGNORED, encode, prompt_length
from lit_prune.data.prompt import text_options

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
WORDS = (
    *(
        "cat", "A", "7", "two  spaces", "new\nline", "ASSISTANT:", "USER:", "[/INST]", "assistant\n", "{{ x }}",
        "{% if %}",
    ),
    *("'", '"', "\\", "<", "im_start", "user", "<ima", "image>", "é", "日本", "\t|"),
)  # fmt: skip


def vicuna(turns) -> list[str]:
    for images, texts, answer in turns:
        yield "USER: " + "<image>\n" * images + "".join(text + " " for text in texts) + "ASSISTANT:"
        yield f" {answer}</s>"


def mistral(turns) -> list[str]:
    for number, (images, texts, answer) in enumerate(turns):
        yield (" " if number else "") + "[INST] " + "<image>\n" * images + "".join(texts) + " [/INST]"
        yield f" {answer}</s>"


def onevision(turns) -> list[str]:
    for images, texts, answer in turns:
        asked = "<image>" * images + "".join("\n" + text for text in texts)
        yield f"<|im_start|>user {asked}<|im_end|><|im_start|>assistant\n"
        yield f"{answer}<|im_end|>"


def chatml(image: str, system: str = ""):
    """Images stand before the texts in these tests, so that one order serves all families."""

    def write(turns) -> list[str]:
        for number, (images, texts, answer) in enumerate(turns):
            start = "\n" if number else system
            yield f"{start}<|im_start|>user\n{image * images}{''.join(texts)}<|im_end|>\n<|im_start|>assistant\n"
            yield f"{answer}<|im_end|>"

    return write


WRITE = {
    "llava-1.5": vicuna,
    "llava-next-vicuna": vicuna,
    "llava-next-mistral": mistral,
    "llava-onevision": onevision,
    "internvl": chatml("<IMG_CONTEXT>\n"),
    "qwen2.5-vl": chatml("<|vision_start|><|image_pad|><|vision_end|>", SYSTEM),
    "qwen3-vl": chatml("<|vision_start|><|image_pad|><|vision_end|>"),
}


def drawn(draw: random.Random) -> list[tuple[int, list[str], str]]:
    """Turns, each of a number of images, texts behind them, and an answer. Some turns repeat the one before."""
    turns = []
    for number in range(draw.randint(1, 5)):
        question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(1, 5))).strip() for _ in range(2))
        if number and draw.random() < 0.3:
            _, (question, *_), answer = turns[-1]
        if draw.random() < 0.2:
            answer = question
        turns.append((draw.choice([0, 0, 1, 2]), [question], answer))
    return turns


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_answers_and_nothing_else(name):
    processor, draw = PROCESSORS[name](), random.Random(7)
    tokenizer = processor.tokenizer
    for _ in range(40):
        turns = drawn(draw)
        blank = [draw.choice(["", " ", "\n", " \n\t"]) for _ in range(4)]
        values = [
            ("<image>" * count + blank[0] + texts[0] + blank[1], blank[2] + said + blank[3])
            for count, texts, said in turns
        ]
        images = [Image.new("RGB", (24, 12))] * sum(count for count, _, _ in turns)
        record = {"images": ["x"] * len(images), "conversations": conversation(*chain(*values))}
        found = encode(processor, record, images)

        pieces = list(WRITE[name](turns))
        text = "".join(pieces)
        ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
        spans = list(zip(ends[::2], ends[1::2], strict=True))
        split = tokenizer(text, return_offsets_mapping=True, **text_options(tokenizer, text))
        tokens = list(zip(split["input_ids"], split["offset_mapping"], strict=True))
        labelled = [(token, any(a <= start < end <= b for a, b in spans)) for token, (start, end) in tokens]

        shown = set(getattr(processor, "image_token_ids", None) or [processor.image_token_id])
        ids, labels = found["input_ids"].tolist(), found["labels"].tolist()
        pairs = list(zip(ids, labels, strict=True))
        assert [(token, label == token) for token, label in pairs if token not in shown] == [
            (token, answer) for token, answer in labelled if token not in shown
        ], text
        assert {label for token, label in pairs if token in shown} <= {IGNORED}
        assert all(label in (token, IGNORED) for token, label in pairs)
        last = sum(start >= spans[-1][0] for _, (start, _) in tokens)
        assert prompt_length(found["labels"]) == len(ids) - last
