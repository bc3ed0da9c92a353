"""Render a conversation with the processor's own chat template, and locate its answers in the text."""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from lit_prune.errors import BadSample, LitPruneError

Span = tuple[int, int]
# Image placeholders for templates that take no content parts, by the processor's image token. Images come first, as in
# the templates of these families; others are rejected.
PLACEHOLDERS = {
    "<image>": "<image>\n",  # LLaVA
    "<IMG_CONTEXT>": "<IMG_CONTEXT>\n",  # InternVL
    "<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>",  # Qwen-VL
}


def render(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    """Render a conversation; return its text and the character span of every answer (none for a prompt).

    The text is the template's, but every answer appears as the model would generate it: right after the generation
    prompt, and closed by a special token. If the template doesn't close answers with one (LLaVA-1.5), the
    end-of-sequence token is added without white space around it, as in LLaVA's own training. If the template starts an
    answer with other white space than it ends the generation prompt with (LLaVA-OneVision), the generation prompt's is
    used. Text that ends with an answer ends with its closing token, text that ends with a question ends with the
    generation prompt.

    A template that takes plain text in place of content parts gets text, with the family's placeholder for each image.

    Raises:
        BadSample: the template rejects the conversation, leaves out a part of it, renders its first turns differently
            when others follow, or changes an answer.
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
    """Chat template of the processor or its tokenizer. Raises LitPruneError if there is none."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise LitPruneError(
            f"{_name(processor)} has no chat template: put the model's chat_template.jinja into its folder, "
            "or take a model that was trained to chat"
        )
    return template


def text_options(tokenizer: Any, text: str) -> dict[str, bool]:
    """Tokenizer options as in `apply_chat_template`: no second BOS token if the template writes one itself."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begins else {}


Apply = Callable[[list[dict], bool], str]  # messages, add the generation prompt


def _fitting(processor: Any, messages: list[dict]) -> tuple[Apply, str]:
    """Find the message format that the template accepts (parts, system prompt as text, or all text), and its output.

    Some templates raise on parts, others write the list's Python or JSON form into the prompt.
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
        except Exception as error:  # jinja re-raises what its filters raise
            first = first or error
            continue
        lists = [dress(processor, turn)["content"] for turn in messages]
        if not any(form in whole for form in _forms(lists)):
            return apply, whole
    raise _refused(processor, first)


def _forms(contents: list[Any]) -> list[str]:
    """Contents that are lists, in their Python and JSON forms."""
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
    """Raise BadSample if a text of the conversation is missing from the prompt: templates drop unknown content."""
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
    """Describe the processor in messages: its class, and its source."""
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
    """Compare a generation prompt with the whole text, ignoring trailing white space.

    Returns:
        Length of the common prefix; the text's white space beyond the prompt's; the start of the answer.
    """
    before = len(prompt.rstrip())
    if whole[:before] != prompt[:before]:
        raise _bad(f"the chat template of {_name(processor)} renders the first turns differently when others follow")
    begin = len(whole) - len(whole[before:].lstrip())
    space = whole[before:begin]
    return before, space[len(prompt) - before :] if space.startswith(prompt[before:]) else "", begin


def _closing_token(processor: Any, rest: str) -> str | None:
    """Special token that the template writes after an answer, if any; `rest` is the text after the answer."""
    added = processor.tokenizer.added_tokens_decoder.values()
    special = (*processor.tokenizer.all_special_tokens, *(token.content for token in added if token.special))
    return next((token for token in special if rest.lstrip().startswith(token)), None)


def _close(whole: str, end: int, mark: str | None, eos: str | None) -> tuple[str, int]:
    """Closing text of the answer that ends at `end`, and the position in `whole` after it."""
    rest = whole[end:]
    after = end + len(rest) - len(rest.lstrip())
    if mark is not None and whole.startswith(mark, after):
        return whole[end : after + len(mark)], after + len(mark)
    return (mark or eos, after) if mark or eos else ("", end)


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
