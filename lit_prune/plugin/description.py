"""A model and what is attached to it in a few lines, as text and as HTML for notebooks."""

from html import escape
from typing import Any


def describe(vlm: Any) -> list[str]:
    """Lines of a `VLM`: the model; then `key: value` for method, budget, schedule, repair and trainable parameters."""
    weights = sum(p.numel() for p in vlm.model.parameters())
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    shape = f"{type(vlm.model).__name__}, {weights:,} frozen parameters, {dtype} on {vlm.model.device}"
    lines = [f"VLM({vlm.name and vlm.name + ', '}{shape})"]
    if vlm.processor is None:
        lines.append("processor: none, so give token ids and pixels to `model`")
    if vlm.plugin is None or vlm.host is None or not vlm.host.handles:
        return [*lines, "pruner: none, the plain model"]
    return lines + vlm.plugin.summary(vlm.host.schedule)


def as_html(lines: list[str]) -> str:
    """The lines of `describe` as a table: a caption, and a row for each `key: value`."""
    rows = (line.partition(": ")[::2] for line in lines[1:])
    body = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<table><caption style="text-align: left">{escape(lines[0])}</caption><tbody>{body}</tbody></table>'
