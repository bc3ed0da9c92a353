"""Encode a record as model inputs: conversation, prompt by the processor's own template, labels on the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_prune.data.parts import IMAGE_MARKER, Part, images_in
from lit_prune.data.prompt import Span, render, text_options
from lit_prune.data.records import Turn, image_paths, number_images, own_images, read_turns, similar_keys
from lit_prune.errors import BadSample
from lit_prune.files.images import short

__all__ = ["Conversation", "Encoded", "encode", "encode_conversation", "image_paths", "read_conversation"]

IGNORED = -100
TooLong = Literal["skip", "cut_turns"]
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # the last one chooses Ernie's experts
TOKEN_KEYS = ("input_ids", "attention_mask", "labels", *TYPES)  # one entry a token


@dataclass(frozen=True)
class Conversation:
    """Chat messages whose contents are lists of parts, up to and including the last answer, or the last question.

    `answer` is the text of the last answer, even if the messages end before it; "" if there is none. `shown` are
    indices into `image_paths(record)`, in the order in which the messages show the images; `trained` is True for every
    answer that has labels in training.
    """

    messages: list[dict[str, Any]]
    answer: str
    shown: tuple[int, ...] = ()
    trained: tuple[bool, ...] = ()

    @property
    def question(self) -> str:
        """Text of the last question, without its images."""
        parts = next(m for m in reversed(self.messages) if m["role"] == "user")["content"]
        return " ".join(part["text"].strip() for part in parts if part["type"] == "text")

    @property
    def images(self) -> int:
        """Number of images in the messages."""
        return sum(part["type"] == "image" for message in self.messages for part in message["content"])

    @property
    def answers(self) -> int:
        """Number of answers in the messages."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def first(self, answers: int) -> "Conversation":
        """Conversation up to and including its `answers`-th answer."""
        ends = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        messages = self.messages[: ends[answers - 1] + 1]
        return Conversation(messages, _text(messages[-1]["content"]), self.shown, self.trained[:answers])


def read_conversation(record: dict, answered: bool = True) -> Conversation:
    """Read a record in one of the layouts of `lit_prune.data.records`.

    Images without any marker go to the start of the first question. Turns after the last answer are left out.

    Args:
        record: `conversations` (`from`: human/gpt/system, `value`) or `messages` (`role`, `content`: text or parts),
            and its images, one for every `<image>` marker; or a question and its answer.
        answered: end with the last answer; otherwise with the last question (its answer, if there is one, is cut off).

    Raises:
        BadSample: no question, no answer or an empty one, turns that do not alternate, or numbers of markers and images
            that differ.
    """
    turns = read_turns(record, answered)
    number_images(record, turns)
    system = turns[:1] if turns and turns[0].role == "system" else []
    turns = turns[len(system) :]
    if turns and turns[0].role == "assistant":  # as in LLaVA, turns before the first question are left out
        turns = turns[1:]
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise _bad("its turns do not alternate between question and answer")
    _match_images(system + turns, record)
    answer = ""
    if answered or len(turns) % 2 == 0:
        if len(turns) < 2:
            raise _bad("a conversation without an answer" if turns else "an empty conversation")
        turns = turns[: len(turns) // 2 * 2]
        answer = _text(turns[-1].parts)
    if not all(_text(turn.parts) for turn in (turns if answered else turns[:-1]) if turn.role == "assistant"):
        raise _bad("a conversation with an empty answer")
    if not answered and turns[-1].role == "assistant":
        turns = turns[:-1]
    shown = tuple(part.pop("number") for turn in system + turns for part in images_in(turn.parts))
    messages = [{"role": turn.role, "content": turn.parts} for turn in system + turns]
    return Conversation(messages, answer, shown, tuple(turn.trained for turn in turns if turn.role == "assistant"))


def encode(
    processor: Any,
    record: dict,
    images: Sequence[Any] = (),
    max_length: int | None = None,
    answered: bool = True,
    too_long: TooLong = "skip",
) -> dict[str, Tensor]:
    """Encode one record as model inputs without a batch dimension.

    Args:
        processor: see `encode_conversation`.
        record: see `read_conversation`.
        images: its images in the order of `image_paths`.
        max_length: most tokens of a sample.
        answered: end with the last answer; otherwise with the generation prompt after the last question.
        too_long: see `encode_conversation`.

    Raises:
        BadSample: see `read_conversation` and `encode_conversation`.
    """
    return encode_conversation(processor, read_conversation(record, answered), images, max_length, too_long).inputs


@dataclass
class Encoded:
    """Model inputs of a conversation.

    `ends` are the numbers of tokens up to and including each remaining answer, `prompt` that before the last answer.
    """

    inputs: dict[str, Tensor]
    ends: list[int]
    prompt: int


def encode_conversation(
    processor: Any,
    conversation: Conversation,
    images: Sequence[Any] = (),
    max_length: int | None = None,
    too_long: TooLong = "skip",
    weighted: bool = True,
) -> Encoded:
    """Encode a conversation as model inputs without a batch dimension; see `render` for its text.

    `inputs` are `input_ids`, `attention_mask`, `labels` (tokens,): labels are the tokens of every answer with the
    special token that closes it, otherwise -100 (all -100 without answers). With images also `pixel_values`
    (images, ...) and other keys that the processor returns.

    Args:
        processor: a processor with a chat template that expands every image to a run of image tokens.
        conversation: the result of `read_conversation`.
        images: the images of its record, in the order of `image_paths`.
        max_length: most tokens of a sample.
        too_long: handling of longer samples. "skip": bad sample. "cut_turns": as many of the last turns (question and
            answer) as necessary are removed; turns with an image are never removed, so the sample is bad if it still
            doesn't fit, or if its first turn is too long. (LLaVA's own training truncates at the token, even in the
            middle of an answer.)
        weighted: leave answers with weight 0 out of the labels.

    Raises:
        BadSample: the sample is too long, the template or the processor rejects it, its prompts are no prefixes of it,
            or all answers have weight 0.
    """
    text, spans = render(processor, conversation.messages)
    if conversation.shown and max(conversation.shown) >= len(images):
        raise _bad(f"image {max(conversation.shown)} is shown, but there are {len(images)}")
    inputs = _process(processor, text, [images[number] for number in conversation.shown])
    length = len(inputs["input_ids"])
    limit = length if max_length is None else max_length
    if length > limit and too_long == "skip":
        raise _bad(f"{length} tokens, more than the context of {max_length}")
    inputs["labels"] = _labels(processor, text, spans, inputs["input_ids"], limit)
    inputs |= _causal_answers(inputs, inputs["input_ids"] == processor.image_token_id)
    ends, prompt = answer_ends(inputs["labels"]), prompt_length(inputs["labels"])
    if length > limit:
        if not ends or conversation.first(len(ends)).images < conversation.images:
            raise _bad(f"{length} tokens, more than the context of {max_length}")
        inputs = {key: value[: ends[-1]] if key in TOKEN_KEYS else value for key, value in inputs.items()}
    if weighted and not all(conversation.trained[: len(ends)]):
        inputs["labels"] = _trained_labels(inputs["labels"], ends, conversation.trained)
    return Encoded(inputs, ends, prompt)


def answer_ends(labels: Tensor) -> list[int]:
    """Ends of the labelled answers of a sample: number of tokens up to and including each answer."""
    labelled = torch.nn.functional.pad(labels != IGNORED, (0, 1))
    return ((labelled[:-1] & ~labelled[1:]).nonzero().flatten() + 1).tolist()


def prompt_length(labels: Tensor) -> int:
    """Number of tokens before the last answer; all of them if no answer is labelled."""
    answer = (labels != IGNORED).nonzero().flatten()
    if not len(answer):
        return len(labels)
    gaps = (answer.diff() > 1).nonzero().flatten()
    return int(answer[gaps[-1] + 1] if len(gaps) else answer[0])


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _match_images(turns: list[Turn], record: dict) -> None:
    """Number image parts without a number, in order, by the record's own images that no other part shows."""
    for turn in turns:
        if turn.role != "user" and images_in(turn.parts):
            place = "an answer" if turn.role == "assistant" else "a system prompt"
            raise _bad(f"an {IMAGE_MARKER} marker in {place}")
    parts = [part for turn in turns for part in images_in(turn.parts)]
    taken = {part["number"] for part in parts if "number" in part}
    left = [number for number in range(len(own_images(record))) if number not in taken]
    first = next((turn for turn in turns if turn.role == "user"), None)
    if left and first and not parts:
        parts = [{"type": "image"} for _ in left]
        first.parts[:0] = parts
    markers = [part for part in parts if "number" not in part]
    if len(markers) != len(left):
        unread = similar_keys(record)
        hint = f"; nothing reads its {short(', '.join(unread))}" if unread else ""
        raise _bad(f"{len(markers)} {IMAGE_MARKER} markers but {len(left)} images{hint}")
    for part, number in zip(markers, left, strict=True):
        part["number"] = number


# Tokens


def _process(processor: Any, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
    for token in (getattr(processor, name, None) for name in ("video_token", "audio_token")):
        if token and token in text:
            raise _bad(f"a text with {token}, which the processor takes for a video or a sound")
    token = getattr(processor, "image_token", None) or IMAGE_MARKER
    written = text.count(token)
    if written and written != len(images):  # some templates use another image token, and none of these
        passed = f"{len(images)} were passed" if images else "no images were passed"
        raise _bad(f"the prompt has {written} times {token}, the processor's own token for an image, but {passed}")
    extra = text_options(processor.tokenizer, text)
    try:
        # Nested, so that the processor sees them as images of one sample: LLaVA-OneVision tiles single images only.
        inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt", **extra)
    except ValueError as error:  # a marker of this processor inside the text, an image of impossible shape
        raise _bad(str(error)) from error
    inputs = {key: value[0] if key in TOKEN_KEYS else value for key, value in inputs.items()}
    if images and not (inputs["input_ids"] == processor.image_token_id).any():
        raise _bad(f"the chat template shows none of {len(images)} images")
    return inputs


def _causal_answers(inputs: dict[str, Tensor], visual: Tensor) -> dict[str, Tensor]:
    """Token types of 1 from the first answer on, where those of images are 0: PaliGemma masks these tokens causally."""
    types, labelled = inputs.get("token_type_ids"), inputs["labels"] != IGNORED
    if types is None or not visual.any() or types[visual].any():  # Gemma 3 marks images by them
        return {}
    return {"token_type_ids": labelled.cumsum(0).clamp(max=1).to(types.dtype)}


def _trained_labels(labels: Tensor, ends: list[int], trained: Sequence[bool]) -> Tensor:
    """Remove the labels of answers with weight 0."""
    labels = labels.clone()
    for before, end, learnt in zip([0, *ends], ends, trained, strict=False):
        if not learnt:
            labels[before:end] = IGNORED
    if not (labels != IGNORED).any():
        raise _bad("no answer to learn from: all have weight 0")
    return labels


def _labels(processor: Any, text: str, spans: list[Span], input_ids: Tensor, limit: int) -> Tensor:
    """Label the answers that end within `limit` tokens, by tokenizing the text up to both ends of each.

    `input_ids` has the text's own tokens in the same order, with more image tokens between them.
    """
    added = set(getattr(processor, "image_token_ids", None) or [processor.image_token_id])  # InternVL: brackets too

    def tokens(end: int) -> list[int]:
        found = processor.tokenizer(text[:end], **text_options(processor.tokenizer, text))["input_ids"]
        return [token for token in found if token not in added]

    labels = torch.full_like(input_ids, IGNORED)
    if not spans:
        return labels
    whole = tokens(len(text))
    places = (~torch.isin(input_ids, torch.tensor(sorted(added)))).nonzero().flatten()
    if input_ids[places].tolist() != whole:
        raise _bad("the processor changes the text's tokens beside its images")
    for start, end in spans:
        before, until = tokens(start), tokens(end)
        if whole[: len(before)] != before or whole[: len(until)] != until or len(before) == len(until):
            raise _bad("the tokens of an answer cannot be separated from those of its prompt")
        chosen = places[len(before) : len(until)]
        if chosen[-1] >= limit:  # avoids tokenizing a long record once per turn
            break
        if chosen[-1] - chosen[0] + 1 != len(chosen):  # InternVL's <img>: would look like two answers
            raise _bad("an answer with a token of images in its text")
        labels[chosen] = input_ids[chosen]
    return labels


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
