"""A model and what is attached to it in a few lines, as text and as HTML for notebooks."""

from html import escape
from typing import Any

from torch import nn

from lit_prune.ops.budget import Schedule
from lit_prune.plugin.plugin import Plugin


def describe(
    name: str, model: nn.Module, processor: Any, plugin: Plugin | None, schedule: Schedule | None
) -> list[str]:
    """Lines: the model; then `key: value` for the method, its budget, schedule, repair and trainable parameters.

    `plugin` is None for the plain model; `schedule` is that of its method, if known before a forward.
    """
    weights = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    shape = f"{type(model).__name__}, {weights:,} frozen parameters, {dtype} on {model.device}"
    lines = [f"VLM({name and name + ', '}{shape})"]
    if processor is None:
        lines.append("processor: none, so give token ids and pixels to `model`")
    return lines + (["pruner: none, the plain model"] if plugin is None else plugin.summary(schedule))


def as_html(lines: list[str]) -> str:
    """The lines of `describe` as a table: a caption, and a row for each `key: value`."""
    rows = (line.partition(": ")[::2] for line in lines[1:])
    body = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<table><caption style="text-align: left">{escape(lines[0])}</caption><tbody>{body}</tbody></table>'
