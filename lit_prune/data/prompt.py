"""The prompt of a conversation by the processor's own chat template, and where its answers stand in the text."""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from lit_prune.errors import BadSample, LitPruneError

Span = tuple[int, int]
# What a text holds in place of an image where a template takes no parts, by the processor's token for one: images come
# first, as the templates of these families have them. Others are refused.
PLACEHOLDERS = {
    "<image>": "<image>\n",  # LLaVA
    "<IMG_CONTEXT>": "<IMG_CONTEXT>\n",  # InternVL
    "<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>",  # Qwen-VL
}


def render(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    """The text of a conversation and the characters of every answer in it (no span for a prompt without answers).

    The text is the template's, but every answer stands as it would have been written: right behind the generation
    prompt, and closed by a special token. Where the template closes an answer with none (LLaVA-1.5's does not) the
    end-of-sequence token is put there, with no white space around it, as LLaVA's own training has it. Where the
    template begins an answer with other white space than it ends the generation prompt with (LLaVA-OneVision's does),
    the generation prompt's holds. Text that ends with an answer ends with its closing token, text that ends with a
    question ends with the generation prompt.

    A template that takes texts in place of parts gets texts, with the family's placeholder for each image.

    Raises:
        BadSample: the template refuses the conversation, leaves out a part of it, renders fewer turns to what is no
            prefix of the whole, or changes an answer.
        LitPruneError: there is no template.
    """
    apply, whole = _fitting(processor, messages)
    try:
        text, spans = _render(processor, messages, apply, whole)
    except BadSample:
        raise
    except Exception as error:
        raise _refused(processor, error) from error
    _check_texts(processor, messages, whole)
    return text, spans


def chat_template(processor: Any) -> str | dict[str, str]:
    """The processor's chat template, else its tokenizer's. Raises LitPruneError where there is none."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise LitPruneError(
            f"{_name(processor)} has no chat template: put the model's chat_template.jinja into its folder, "
            "or take a model that was trained to chat"
        )
    return template


def text_options(tokenizer: Any, text: str) -> dict[str, bool]:
    """As `apply_chat_template` does: a template that writes the first special token itself gets no second one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begins else {}


Apply = Callable[[list[dict], bool], str]  # messages, and whether the generation prompt ends the text


def _fitting(processor: Any, messages: list[dict]) -> tuple[Apply, str]:
    """The form of messages that the template accepts (parts, system prompt as text, or all text), and its output.

    Some templates raise on parts, others write Python's or JSON's form of the list into the prompt.
    """
    template = chat_template(processor)
    chosen = {} if getattr(processor, "chat_template", None) else {"chat_template": template}
    ends = messages[-1]["role"] == "user"
    first: Exception | None = None
    for dress in (_as_parts, _system_as_text, _as_texts):

        def apply(turns: list[dict], generation: bool, dress: Callable = dress) -> str:
            dressed = [dress(processor, turn) for turn in turns]
            return processor.apply_chat_template(dressed, add_generation_prompt=generation, **chosen)

        try:
            whole = apply(messages, ends)
        except Exception as error:  # jinja passes on what its filters raise
            first = first or error
            continue
        lists = [dress(processor, turn)["content"] for turn in messages]
        if not any(form in whole for form in _forms(lists)):
            return apply, whole
    raise _refused(processor, first)


def _forms(contents: list[Any]) -> list[str]:
    """The contents that are lists, as Python and JSON write them."""
    lists = [content for content in contents if isinstance(content, list) and content]
    return [str(content) for content in lists] + [json.dumps(content, ensure_ascii=False) for content in lists]


def _as_parts(processor: Any, message: dict) -> dict:
    return message


def _system_as_text(processor: Any, message: dict) -> dict:
    return _as_texts(processor, message) if message["role"] == "system" else message


def _as_texts(processor: Any, message: dict) -> dict:
    images = sum(part["type"] == "image" for part in message["content"])
    place = PLACEHOLDERS.get(getattr(processor, "image_token", None))
    if images and place is None:
        raise _bad(f"the chat template of {_name(processor)} takes texts alone, and how they show images is not known")
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return {**message, "content": (place or "") * images + "".join(texts)}


def _check_texts(processor: Any, messages: list[dict], whole: str) -> None:
    """Raise BadSample if a text of the conversation is missing from the prompt: templates drop what they don't know."""
    at = 0
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text" and (text := part["text"].strip()):
                at = whole.find(text, at)
                if at < 0:
                    what = "system prompt" if message["role"] == "system" else f"{message['role']}'s text"
                    raise _bad(f"the chat template of {_name(processor)} leaves out or changes the {what}")
                at += len(text)


def _name(processor: Any) -> str:
    """The processor for messages: its class, and what it was loaded from."""
    origin = getattr(processor.tokenizer, "name_or_path", "")
    return f"{type(processor).__name__} ({origin})" if origin else type(processor).__name__


def _refused(processor: Any, error: Exception | None) -> BadSample:
    if error is None or isinstance(error, BadSample):
        return error or _bad(f"the chat template of {_name(processor)} takes neither parts nor texts")
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    reason = f"{kind}{error}".partition("\n")[0]
    return _bad(f"the chat template of {_name(processor)} refuses the conversation: {reason}")


def _render(processor: Any, messages: list[dict], apply: Apply, whole: str) -> tuple[str, list[Span]]:
    text, spans, done, mark = "", [], 0, None  # `done` characters of `whole` are in `text`
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = apply(messages[:number], True)
            before, space, begin = _meet(processor, whole, prompt)
            end = begin + len(message["content"][0]["text"])
            if whole[begin:end] != message["content"][0]["text"]:
                raise _bad(f"the chat template of {_name(processor)} changes an answer")
            if not spans:
                mark = _closing_token(processor, apply(messages[: number + 1], False)[end:])
            closing, after = _close(whole, end, mark, processor.tokenizer.eos_token)
            text += whole[done:before] + prompt[before:]
            start = len(text)
            text += space + whole[begin:end] + closing
            spans.append((start, len(text)))
            done = after
    return (text, spans) if messages[-1]["role"] == "assistant" else (text + whole[done:], [])


def _meet(processor: Any, whole: str, prompt: str) -> tuple[int, str, int]:
    """Where a generation prompt and the whole text part, white space apart.

    Returns:
        how far they are one; the white space of the text that goes beyond the prompt's; where the answer begins.
    """
    before = len(prompt.rstrip())
    if whole[:before] != prompt[:before]:
        raise _bad(f"the chat template of {_name(processor)} renders the first turns differently when others follow")
    begin = len(whole) - len(whole[before:].lstrip())
    space = whole[before:begin]
    return before, space[len(prompt) - before :] if space.startswith(prompt[before:]) else "", begin


def _closing_token(processor: Any, rest: str) -> str | None:
    """The special token that the template writes behind an answer, if any; `rest` is all that follows the answer."""
    added = processor.tokenizer.added_tokens_decoder.values()
    special = (*processor.tokenizer.all_special_tokens, *(token.content for token in added if token.special))
    return next((token for token in special if rest.lstrip().startswith(token)), None)


def _close(whole: str, end: int, mark: str | None, eos: str | None) -> tuple[str, int]:
    """What closes the answer that ends at `end`, and where the text goes on behind it."""
    rest = whole[end:]
    behind = end + len(rest) - len(rest.lstrip())
    if mark is not None and whole.startswith(mark, behind):
        return whole[end : behind + len(mark)], behind + len(mark)
    return (mark or eos, behind) if mark or eos else ("", end)


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
