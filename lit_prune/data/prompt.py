"""The prompt of a conversation by the processor's own chat template, and where its answers stand in the text."""

import re
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lit_prune.errors import BadSample

Span = tuple[int, int]


def render(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    """The prompt text and the characters of every answer in it (none if the messages end with a question).

    Spans come from the template's `{% generation %}` blocks where it has them, else from rendering turn by turn.

    Raises:
        BadSample: the template refuses the conversation, or renders fewer turns to what is no prefix of the whole.
    """
    try:
        if messages[-1]["role"] == "user":
            return processor.apply_chat_template(messages, add_generation_prompt=True), []
        return _close(processor.tokenizer, *_find_answers(processor, messages))
    except TemplateError as error:  # templates refuse roles and orders they do not know
        raise _bad(f"the chat template refuses the conversation: {error}") from error


def text_options(tokenizer: Any, text: str) -> dict[str, bool]:
    """As `apply_chat_template` does: a template that writes the first special token itself gets no second one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begins else {}


def _find_answers(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    text = processor.apply_chat_template(messages)
    template = _template(processor)
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", template)
    if marked:
        return text, _marked_spans(processor, template, messages, text)
    return text, _rendered_spans(processor, messages, text)


def _template(processor: Any) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def _marked_spans(processor: Any, template: str, messages: list[dict], text: str) -> list[Span]:
    _, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    spans = [(len(text[:start].rstrip(" ")), end) for start, end in spans[0]]  # the space belongs to the answer's token
    if not spans or text[: spans[-1][0]] != prompt.rstrip(" "):
        raise _bad("the chat template's generation prompt is not what stands before the last answer")
    return spans


def _rendered_spans(processor: Any, messages: list[dict], text: str) -> list[Span]:
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = processor.apply_chat_template(messages[:number], add_generation_prompt=True)
            until = processor.apply_chat_template(messages[: number + 1])
            if not (text.startswith(until) and until.startswith(before)):
                raise _bad("the chat template renders the first turns differently when others follow")
            spans.append((len(before), len(until)))
    return spans


def _close(tokenizer: Any, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """Let every span end with its closing token or its last letter; the text ends with the last span."""
    eos, closed = tokenizer.eos_token, []
    for start, end in spans:
        at = text.rfind(eos, start, end + len(eos)) if eos else -1
        closed.append((start, at + len(eos)) if at >= 0 else (start, start + len(text[start:end].rstrip())))
    start, end = closed[-1]
    text = text[:end]
    if eos and not text.endswith(_special_tokens(tokenizer)):
        text += eos
    return text, [*closed[:-1], (start, len(text))]


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return (*tokenizer.all_special_tokens, *(token.content for token in added if token.special))


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
