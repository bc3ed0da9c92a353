"""From a record to model inputs: conversation, prompt by the processor's own template, labels on the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_prune.data.prompt import Span, render, text_options
from lit_prune.errors import BadSample

IMAGE_MARKER = "<image>"
IGNORED = -100
MOST_TURNS = 1000  # the template is rendered once for each answer
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TooLong = Literal["skip", "cut_turns"]
TOKEN_KEYS = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")  # one entry a token


@dataclass(frozen=True)
class Conversation:
    """Chat messages whose contents are lists of parts, up to and including the last answer, or the last question.

    `answer` is the text of the last answer, also where the messages end before it; "" if there is none.
    """

    messages: list[dict[str, Any]]
    answer: str

    @property
    def question(self) -> str:
        """The text of the last question, without its images."""
        parts = next(m for m in reversed(self.messages) if m["role"] == "user")["content"]
        return " ".join(part["text"].strip() for part in parts if part["type"] == "text")

    @property
    def images(self) -> int:
        """How many images the messages show."""
        return sum(part["type"] == "image" for message in self.messages for part in message["content"])

    @property
    def answers(self) -> int:
        """How many answers the messages hold."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def first(self, answers: int) -> "Conversation":
        """The conversation up to and including its `answers`-th answer."""
        ends = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        messages = self.messages[: ends[answers - 1] + 1]
        return Conversation(messages, _text(messages[-1]))


def image_paths(record: dict) -> list[str]:
    """The image paths of a record: `image` or `images`, one or a list. Raises BadSample if they are no strings."""
    value = record["image"] if record.get("image") is not None else record.get("images")
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise _bad("its images are neither a path nor a list of paths")
    return paths


def read_conversation(record: dict, answered: bool = True) -> Conversation:
    """The conversation of a record in LLaVA's `conversations` or the `messages` layout.

    Images without any marker go to the start of the first question. What follows the last answer is left out.

    Args:
        record: `conversations` (`from`: human/gpt/system, `value`) or `messages` (`role`, `content`: text or parts),
            and its image paths, one for every `<image>` marker.
        answered: end with the last answer; otherwise with the last question (its answer, if there is one, is cut off).

    Raises:
        BadSample: no question, no answer or an empty one, turns that do not alternate, or numbers of markers and images
            that differ.
    """
    turns = _turns(record)
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    turns = turns[len(system) :]
    if turns and turns[0]["role"] == "assistant":  # as LLaVA does: what comes before the first question is left out
        turns = turns[1:]
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise _bad("its turns do not alternate between question and answer")
    _match_images(system + turns, len(image_paths(record)))
    answer = ""
    if answered or len(turns) % 2 == 0:
        if len(turns) < 2:
            raise _bad("a conversation without an answer" if turns else "an empty conversation")
        turns = turns[: len(turns) // 2 * 2]
        answer = _text(turns[-1])
    if not all(_text(turn) for turn in (turns if answered else turns[:-1]) if turn["role"] == "assistant"):
        raise _bad("a conversation with an empty answer")
    if not answered and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return Conversation(system + turns, answer)


def encode(
    processor: Any,
    record: dict,
    images: Sequence[Any] = (),
    max_length: int | None = None,
    answered: bool = True,
    too_long: TooLong = "skip",
) -> dict[str, Tensor]:
    """One record as model inputs without a batch dimension; see `render` for its text.

    Args:
        processor: a processor with a chat template that expands every image to a run of image tokens.
        record: see `read_conversation`.
        images: its images in the order of its paths.
        max_length: most tokens a sample may have.
        answered: whether the text ends with the last answer or with the generation prompt after the last question.
        too_long: what becomes of a longer sample. "skip": it is a bad one. "cut_turns": its last turns are cut, each a
            whole question and answer, as many as it takes; a turn that shows an image is never cut, so that the sample
            is bad if it does not fit by then, or if its first turn is too long already. (LLaVA's own training cuts at
            the token, also in the middle of an answer.)

    Returns:
        `input_ids`, `attention_mask`, `labels` (tokens,): labels are the tokens of every answer with the special token
        that closes it, else -100 (all -100 if not answered). With images `pixel_values` (images, ...) and whatever else
        the processor returns.

    Raises:
        BadSample: see `read_conversation`; or the sample is too long, or the template's prompts are no prefixes of it.
    """
    conversation = read_conversation(record, answered)
    text, spans = render(processor, conversation.messages)
    inputs = _process(processor, text, images[: conversation.images])
    length = len(inputs["input_ids"])
    limit = length if max_length is None else max_length
    if length > limit and too_long == "skip":
        raise _bad(f"{length} tokens, more than the context of {max_length}")
    inputs["labels"] = _labels(processor, text, spans, inputs["input_ids"], limit)
    if length <= limit:
        return inputs
    ends = answer_ends(inputs["labels"])
    if not ends or conversation.first(len(ends)).images < conversation.images:
        raise _bad(f"{length} tokens, more than the context of {max_length}")
    return {key: value[: ends[-1]] if key in TOKEN_KEYS else value for key, value in inputs.items()}


def answer_ends(labels: Tensor) -> list[int]:
    """Where the labelled answers of a sample end: the number of tokens up to and including each one's last."""
    labelled = torch.nn.functional.pad(labels != IGNORED, (0, 1))
    return ((labelled[:-1] & ~labelled[1:]).nonzero().flatten() + 1).tolist()


def prompt_length(labels: Tensor) -> int:
    """Number of tokens before the last answer; all of them if no answer is labelled."""
    answer = (labels != IGNORED).nonzero().flatten()
    if not len(answer):
        return len(labels)
    gaps = (answer.diff() > 1).nonzero().flatten()
    return int(answer[gaps[-1] + 1] if len(gaps) else answer[0])


# Reading the record


def _turns(record: dict) -> list[dict]:
    layouts = {"conversations": ("from", "value"), "messages": ("role", "content")}
    key = next((key for key in layouts if record.get(key) is not None), None)
    if key is None or not isinstance(record[key], list):
        raise _bad("neither a list of conversations nor of messages")
    if len(record[key]) > MOST_TURNS:
        raise _bad(f"{len(record[key])} turns, more than {MOST_TURNS}")
    role_key, text_key = layouts[key]
    turns = []
    for turn in record[key]:
        role = turn.get(role_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise _bad(f"a turn of unknown role {role!r}")
        parts = _parts(turn.get(text_key))
        turns.append({"role": ROLES[role], "content": parts if role in ("human", "user") else _joined(parts)})
    return turns


def _joined(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Text in one part: templates mark an answer part by part. With images as it is, to be refused later."""
    if len(parts) < 2 or any(part["type"] == "image" for part in parts):
        return parts
    return [{"type": "text", "text": " ".join(part["text"].strip() for part in parts)}]


def _parts(content: Any) -> list[dict[str, str]]:
    """Text and image parts in their order, text split at its markers. White space goes at both ends of the text.

    Between text and an image inside it white space stays: templates that move images to the front must glue no words.
    """
    items = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [part for item in items for part in _part(item) if part["type"] == "image" or part["text"].strip()]
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return parts


def _part(item: Any) -> list[dict[str, str]]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "image":
        return [{"type": "image"}]
    if kind != "text":
        raise _bad(f"a part of a message that is neither text nor image: {kind!r}")
    if not isinstance(item.get("text"), str):
        raise _bad("a turn whose content is no text")
    try:
        item["text"].encode()
    except UnicodeEncodeError as error:  # JSON may hold halves of characters; tokenizers take none
        raise _bad(f"a turn whose text is no Unicode: {error.reason}") from error
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(item["text"].split(IMAGE_MARKER)):
        parts += [{"type": "image"}] if number else []
        parts.append({"type": "text", "text": piece})
    return parts


def _text(turn: dict) -> str:
    return " ".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _match_images(turns: list[dict], images: int) -> None:
    markers = 0
    for turn in turns:
        count = sum(part["type"] == "image" for part in turn["content"])
        if count and turn["role"] != "user":
            place = "an answer" if turn["role"] == "assistant" else "a system prompt"
            raise _bad(f"an {IMAGE_MARKER} marker in {place}")
        markers += count
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if images and first and not markers:
        first["content"][:0] = [{"type": "image"} for _ in range(images)]
    elif markers != images:
        raise _bad(f"{markers} {IMAGE_MARKER} markers but {images} images")


# Tokens


def _process(processor: Any, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
    extra = text_options(processor.tokenizer, text)
    try:
        # nested, so that processors know these as the images of one sample: LLaVA-OneVision's cuts no tiles of several
        inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt", **extra)
    except ValueError as error:  # a marker of this processor inside the text, an image of impossible shape
        raise _bad(str(error)) from error
    return {key: value[0] if key in TOKEN_KEYS else value for key, value in inputs.items()}


def _labels(processor: Any, text: str, spans: list[Span], input_ids: Tensor, limit: int) -> Tensor:
    """Labels of the answers that end within `limit` tokens, found by tokenizing the text up to both ends of each.

    The text's own tokens stand in `input_ids` in the same order, with more image tokens between them.
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
            raise _bad("the tokens of an answer cannot be told from those of its prompt")
        chosen = places[len(before) : len(until)]
        if chosen[-1] >= limit:  # or a record of many turns would be tokenized once for each
            break
        if chosen[-1] - chosen[0] + 1 != len(chosen):  # InternVL's <img>: it would seem to be two answers
            raise _bad("an answer with a token of images in its text")
        labels[chosen] = input_ids[chosen]
    return labels


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
