"""Chat templates as processors have them: of parts, of texts, and those that fail or lose something."""

import json
import re

import pytest
import torch
from instruct_samples import CHATML, LLAVA, UNMARKED, conversation, make_data, make_processor, write_samples
from PIL import Image
from prompt_families import PROCESSORS

from lit_prune.data.conversation import encode, read_conversation
from lit_prune.data.dataset import InstructDataset
from lit_prune.data.prompt import render
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample, LitPruneError

TURNS = conversation("<image>\nWhat is it?", "A cat.", "Old?", "no")
RECORD = {"image": "a.png", "conversations": TURNS}
WITH_SYSTEM = {**RECORD, "system": "Be brief."}
TEXT = "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Old? ASSISTANT: no</s>"
RED = Image.new("RGB", (8, 8), "red")


def of_texts(content: str) -> str:
    """A template as for language models, which writes `content` for what a message holds."""
    return (
        f"{{% for message in messages %}}{{{{ message['role'].upper() + ': ' }}}}{content}{{{{ ' ' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


TEXTS = {
    "joined": of_texts("{{ '' + message['content'] }}"),  # a TypeError on parts
    "stripped": of_texts("{{ message['content'].strip() }}"),  # an UndefinedError
    "written out": of_texts("{{ message['content'] }}"),  # Python's form of the list
    "trimmed": of_texts("{{ message['content'] | trim }}"),  # the same
    "split": of_texts("{{ message['content'].split('</think>')[-1] }}"),
}


@pytest.mark.parametrize("template", TEXTS.values(), ids=TEXTS)
def test_templates_of_texts_get_texts(processor, template):
    strict = make_processor(template)
    assert render(strict, read_conversation(RECORD).messages)[0] == TEXT
    assert render(strict, read_conversation(WITH_SYSTEM).messages)[0] == f"SYSTEM: Be brief. {TEXT}"
    found, expected = encode(strict, RECORD, [RED]), encode(processor, RECORD, [RED])
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    asked = render(strict, read_conversation(RECORD, answered=False).messages)[0]
    assert asked == TEXT.removesuffix(" no</s>")


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_family_has_its_images_in_a_template_of_texts(name):
    family, strict = (PROCESSORS[name]() for _ in range(2))
    strict.chat_template = of_texts("{{ '' + message['content'] }}")
    images = [Image.new("RGB", (24, 12), "red")]
    record = {"image": "a.png", "conversations": conversation("<image>Q", "A")}
    found, expected = encode(strict, record, images), encode(family, record, images)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    shown = [int((inputs["input_ids"] == family.image_token_id).sum()) for inputs in (found, expected)]
    assert shown[0] == shown[1] > 0


def test_a_system_prompt_as_a_text_beside_parts():
    mixed = make_processor(
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
        + UNMARKED.replace("in messages %}", "in messages if message.role != 'system' %}", 1)
    )
    assert render(mixed, read_conversation(WITH_SYSTEM).messages)[0] == f"Be brief.\n{TEXT}"
    assert render(mixed, read_conversation(RECORD).messages)[0] == TEXT


def test_a_family_without_a_known_placeholder_is_refused():
    odd = make_processor(TEXTS["joined"])
    odd.image_token = "<picture>"
    with pytest.raises(BadSample, match=r"LlavaProcessor refuses|how they show images is not known"):
        encode(odd, RECORD, [RED])
    assert encode(odd, {"conversations": conversation("Q", "A")})


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        ("{{ foo.bar }}" + LLAVA, RECORD, "refuses the conversation: 'foo' is undefined"),
        ("{{ 1 / 0 }}" + LLAVA, RECORD, "refuses the conversation: ZeroDivisionError: division by zero"),
        ("{% for %}", RECORD, "refuses the conversation: "),
        ("{{ raise_exception('no chats today') }}", RECORD, "refuses the conversation: no chats today"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + LLAVA,
            WITH_SYSTEM,
            "refuses the conversation: System role not supported",
        ),
        (
            LLAVA.replace("in messages %}", "in messages if message.role != 'system' %}", 1),
            WITH_SYSTEM,
            "leaves out or changes the system prompt",
        ),
        (CHATML.replace("else content['text']", "else content['text'][:3]"), RECORD, "changes an answer"),
        (
            UNMARKED.replace("{{ content['text'] + ' '}}", "{{ content['text'][:4] + ' '}}", 1),
            RECORD,
            "leaves out or changes the user's text",
        ),
        (UNMARKED.replace("{{ '<image>\n' }}", ""), RECORD, "image"),  # by the library, or by us
        (of_texts("{{ message['content'] | tojson }}"), RECORD, "changes an answer"),
        ("no messages at all", RECORD, "changes an answer"),
    ],
)
def test_templates_that_fail_are_named(template, record, words):
    with pytest.raises(BadSample) as caught:
        encode(make_processor(template), record, [RED])
    assert words in caught.value.reason
    assert "\n" not in caught.value.reason
    assert words == "image" or "the chat template of LlavaProcessor" in caught.value.reason


def test_a_failing_template_names_file_and_sample(tmp_path):
    path = write_samples(tmp_path, 3)
    data = InstructDataset(open_source(path), make_processor("{{ foo.bar }}"), mode="eval")
    fetched = data.__getitems__([0, 1, 2])
    assert [(bad.file, bad.sample) for bad in fetched.skipped] == [(str(path), f"s{number}") for number in range(3)]
    assert all(re.search("LlavaProcessor.*'foo' is undefined", bad.reason) for bad in fetched.skipped)


def test_no_template_is_one_error_at_the_start(tmp_path):
    path = str(write_samples(tmp_path, 8))
    bare = make_processor(None)
    for split, stage in (("train", "fit"), ("val", "validate"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(LitPruneError, match="LlavaProcessor has no chat template: put the model's chat_template"):
            make_data(bare, **{split: path}).setup(stage)
    bare.tokenizer.chat_template = TEXTS["joined"]
    data = make_data(bare, train=path)
    data.setup("fit")
    (batch, _) = data.train_dataloader()
    assert not batch["skipped"]
    assert len(batch["ids"]) == 4


def test_texts_that_a_processor_takes_for_videos():
    """`<video>` is a token of LLaVA-OneVision: the model would look for a video."""
    record = {"conversations": conversation("Which tag?", "Use <video> here.")}
    assert encode(make_processor(), record)
    with pytest.raises(BadSample, match="a text with <video>, which the processor takes for a video"):
        encode(PROCESSORS["llava-onevision"](), record)
    for name in ("qwen2.5-vl", "qwen3-vl"):
        with pytest.raises(BadSample, match=r"a text with <\|video_pad\|>"):
            encode(PROCESSORS[name](), {"conversations": conversation("Q <|video_pad|>", "A")})


@pytest.mark.parametrize("name", ["internvl", "qwen2.5-vl", "qwen3-vl"])
def test_a_token_of_images_beside_an_image_is_refused(name):
    processor = PROCESSORS[name]()
    for chat in (
        conversation(f"<image> {processor.image_token}", "A"),
        conversation("<image> Q", processor.image_token),
    ):
        with pytest.raises(BadSample):
            encode(processor, {"image": "a", "conversations": chat}, [Image.new("RGB", (24, 12))])


def test_a_processor_that_raises_makes_bad_samples(tmp_path, monkeypatch):
    """Whatever it raises, on one sample or on all: named, and never a traceback."""
    path = write_samples(tmp_path, 8)
    broken = make_processor()
    call = type(broken.image_processor).__call__

    def sometimes(self, images, *args, **options):
        raise {0: IndexError, 1: KeyError, 2: RuntimeError, 3: OSError, 4: RecursionError}[count.pop()](
            "of no use\nat all"
        )

    monkeypatch.setattr(type(broken.image_processor), "__call__", sometimes)
    count = list(range(5))
    fetched = InstructDataset(open_source(path), broken, mode="eval").__getitems__([0, 1, 2, 3, 4])
    assert not fetched.samples
    names = ["RecursionError", "OSError", "RuntimeError", "KeyError", "IndexError"]
    assert [bad.reason.partition(":")[0] for bad in fetched.skipped] == names
    assert all("of no use" in bad.reason and "\n" not in bad.reason for bad in fetched.skipped)
    assert json.dumps([bad._asdict() for bad in fetched.skipped])
    monkeypatch.setattr(type(broken.image_processor), "__call__", call)
