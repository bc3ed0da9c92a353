"""The prompt of a conversation by the processor's own chat template, and where its answers stand in the text."""

from typing import Any

from jinja2 import TemplateError

from lit_prune.errors import BadSample

Span = tuple[int, int]


def render(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    """The text of a conversation and the characters of every answer in it (no span for a prompt without answers).

    The text is the template's, but every answer stands as it would have been written: right behind the generation
    prompt, and closed by a special token. Where the template closes an answer with none (LLaVA-1.5's does not) the
    end-of-sequence token is put there, with no white space around it, as LLaVA's own training has it. Where the
    template begins an answer with other white space than it ends the generation prompt with (LLaVA-OneVision's does),
    the generation prompt's holds. Text that ends with an answer ends with its closing token, text that ends with a
    question ends with the generation prompt.

    Raises:
        BadSample: the template refuses the conversation, renders fewer turns to what is no prefix of the whole, or
            changes an answer.
    """
    try:
        return _render(processor, messages)
    except TemplateError as error:  # templates refuse roles and orders they do not know
        raise _bad(f"the chat template refuses the conversation: {error}") from error


def text_options(tokenizer: Any, text: str) -> dict[str, bool]:
    """As `apply_chat_template` does: a template that writes the first special token itself gets no second one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begins else {}


def _render(processor: Any, messages: list[dict]) -> tuple[str, list[Span]]:
    whole = processor.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user")
    text, spans, done, mark = "", [], 0, None  # `done` characters of `whole` are in `text`
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = processor.apply_chat_template(messages[:number], add_generation_prompt=True)
            before, space, begin = _meet(whole, prompt)
            end = begin + len(message["content"][0]["text"])
            if whole[begin:end] != message["content"][0]["text"]:
                raise _bad("the chat template changes an answer")
            if not spans:
                mark = _closing_token(processor, messages[: number + 1], end)
            closing, after = _close(whole, end, mark, processor.tokenizer.eos_token)
            text += whole[done:before] + prompt[before:]
            start = len(text)
            text += space + whole[begin:end] + closing
            spans.append((start, len(text)))
            done = after
    return (text, spans) if messages[-1]["role"] == "assistant" else (text + whole[done:], [])


def _meet(whole: str, prompt: str) -> tuple[int, str, int]:
    """Where a generation prompt and the whole text part, white space apart.

    Returns:
        how far they are one; the white space of the text that goes beyond the prompt's; where the answer begins.
    """
    before = len(prompt.rstrip())
    if whole[:before] != prompt[:before]:
        raise _bad("the chat template renders the first turns differently when others follow")
    begin = len(whole) - len(whole[before:].lstrip())
    space = whole[before:begin]
    return before, space[len(prompt) - before :] if space.startswith(prompt[before:]) else "", begin


def _closing_token(processor: Any, messages: list[dict], end: int) -> str | None:
    """The special token that the template writes behind an answer, the last thing the messages say, if any."""
    rest = processor.apply_chat_template(messages)[end:].lstrip()
    added = processor.tokenizer.added_tokens_decoder.values()
    special = (*processor.tokenizer.all_special_tokens, *(token.content for token in added if token.special))
    return next((token for token in special if rest.startswith(token)), None)


def _close(whole: str, end: int, mark: str | None, eos: str | None) -> tuple[str, int]:
    """What closes the answer that ends at `end`, and where the text goes on behind it."""
    rest = whole[end:]
    behind = end + len(rest) - len(rest.lstrip())
    if mark is not None and whole.startswith(mark, behind):
        return whole[end : behind + len(mark)], behind + len(mark)
    return (mark or eos, behind) if mark or eos else ("", end)


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
