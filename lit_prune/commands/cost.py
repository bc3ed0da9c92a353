"""Price a model's prompt and answer, full and pruned, without weights."""

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from lit_prune.budget import Budget, format_schedule, parse_budget
from lit_prune.commands import console, training_bill
from lit_prune.cost import (
    ModelSize,
    TowerTrace,
    Trace,
    decode,
    decoder_layer,
    decoder_total,
    kv_bytes,
    plan,
    price,
    step,
)
from lit_prune.errors import LitPruneError
from lit_prune.host.places import check_stages
from lit_prune.host.sizes import model_size, tower_size, tower_trace
from lit_prune.loading import load_config
from lit_prune.plugin import Plugin
from lit_prune.shapes import names
from lit_prune.training_cost import Training
from lit_prune.vlm import as_plugin

PARTS = {
    "vision": "vision tower",
    "projector": "projector",
    "decoder": "decoder layers",
    "scoring": "scoring",
    "pruner": "pruner",
    "repair": "repair",
    "lm_head": "LM head",
}


@dataclass(frozen=True)
class Prompt:
    """What is priced: token counts, image size in pixels, bytes of a cached value."""

    visual: int
    text: int
    answer: int
    bytes_per_value: int

    @property
    def steps(self) -> int:
        """Decoding steps of the answer: the prefill gives its first token."""
        return self.answer - 1


@dataclass(frozen=True)
class Bill:
    """The price of one prompt and its answer under one schedule: FLOPs by part, bytes, and what each layer sees."""

    schedule: dict[int, int]
    average: float
    prefill: dict[str, float]
    decoder: float  # of the prefill, with all that pruning adds
    step: dict[str, float]  # of the first decoding step
    answer: dict[str, float]  # of all decoding steps
    kv: int
    kv_after: int
    visual: list[int]  # visual tokens at each decoder layer's input
    layers: list[float]  # FLOPs of each decoder layer


def run(
    model: str = "llava-hf/llava-1.5-7b-hf",
    pruner: str | None = None,
    keep: list[str] | None = None,
    text_tokens: int = 64,
    answer_tokens: int = 32,
    visual_tokens: int | None = None,
    image_size: list[int] | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16",
    json: Path | None = None,
    plot: Path | None = None,
    train: Training | None = None,
) -> None:
    """Price a prompt and its answer in FLOPs and bytes of KV cache: the full model and budgets of one method.

    A multiply-add is two FLOPs. The whole prompt counts, text and visual tokens; attention is the full square, SwiGLU
    has three matrices. Prefill and decoding are apart: the prefill gives the answer's first token, each further token
    is one step. A reduction is that of the decoder's prefill with scoring, pruner and repair counted in. Nothing is
    loaded but a configuration: no weights, no network.

    Args:
        model: Hub id whose shape is shipped (a wrong one lists them), "micro", or a model folder with config.json.
        pruner: YAML file or plug-in folder, e.g. --pruner configs/pruners/rcp.yaml; without it the full model alone.
        keep: Budgets, visual tokens averaged over the decoder layers, e.g. --keep 192 128 64, or counts by layer, e.g.
            --keep 2:64; by default the plug-in's own.
        text_tokens: Text tokens of the prompt, e.g. --text-tokens 64.
        answer_tokens: Tokens of the answer, e.g. --answer-tokens 128.
        visual_tokens: Visual tokens of the prompt, e.g. --visual-tokens 2880; the tower is then priced in proportion.
        image_size: Height and width of the image in pixels, e.g. --image-size 672 1008, for models that cut it into
            crops or take it in its own size; by default 672 672.
        dtype: Of the cached keys and values, and in training of the frozen weights.
        json: File to write the same to: an object, or a list of them for several budgets, e.g. --json cost.json.
        plot: Picture to draw, tokens and FLOPs of every decoder layer, e.g. --plot cost.png.
        train: Estimate a training run too, e.g. --train --train.gpus 8 --train.strategy deepspeed_2; see --train.help.
    """
    try:
        config = load_config(model)
    except LitPruneError as error:
        raise LitPruneError(f"{error}. Shapes known here: micro, {', '.join(names())}") from error
    pixels = _pixels(image_size, visual_tokens)
    size = model_size(config) if pixels is None else model_size(config, pixels)
    visual = size.image.visual if visual_tokens is None else visual_tokens
    for name, count in (("text", text_tokens), ("answer", answer_tokens), ("visual", visual)):
        if count < 1:
            raise LitPruneError(f"--{name}-tokens {count} must be at least 1")
    prompt = Prompt(visual, text_tokens, answer_tokens, getattr(torch, dtype).itemsize)
    plugin = None if pruner is None else as_plugin(pruner)
    if plugin is not None:
        check_stages(config, plugin.pruner.stages(size.depth))
    if train is not None:
        training_bill.check(train, plugin)
    full = bill({}, prompt, size)
    budgets = _budgets(plugin, keep)
    bills = {
        name: bill(
            plugin.pruner.schedule(budget, visual, size.depth),
            prompt,
            size,
            plugin,
            _tower(config, plugin, budget, size),
        )
        for name, budget in budgets.items()
    }
    title = f"{model}: {visual} visual and {text_tokens} text tokens, an answer of {answer_tokens}"
    console.out.print(
        as_table(escape(title), {"full": full} | {f"keep {name}": b for name, b in bills.items()}, prompt)
    )
    runs = {}
    if train is not None:
        trained, tokens = training_bill.built(plugin, size), (visual, text_tokens, answer_tokens)
        weights = training_bill.count_weights(config, trained)
        for name, made in bills.items():
            given = (made.schedule, tokens, size, trained, _tower(config, plugin, budgets[name], size))
            runs[name] = training_bill.bill(train, weights, *given, prompt.bytes_per_value)
        console.out.print(training_bill.as_table(train, {f"keep {name}": run for name, run in runs.items()}))
        console.say(training_bill.assumptions(train, prompt.bytes_per_value))
    facts = {"model": model, "pruner": pruner, "dtype": dtype}
    facts |= {"visual_tokens": visual, "text_tokens": text_tokens, "answer_tokens": answer_tokens}
    if json is not None:
        reports = [as_report(facts, name, made, full) for name, made in (bills or {"": full}).items()]
        for report, name in zip(reports, runs, strict=False):  # no runs, or one of each
            report["training"] = training_bill.as_report(train, runs[name])
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_format.dumps(reports[0] if len(reports) == 1 else reports, indent=2) + "\n", "utf-8")
    if plot is not None:
        draw(plot, title, {"full": full} | {f"keep {name}": made for name, made in bills.items()})


# What is priced


def _pixels(image_size: list[int] | None, visual_tokens: int | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    if visual_tokens is not None:
        raise LitPruneError("--image-size tells the visual tokens: leave --visual-tokens out")
    if len(image_size) != 2 or min(image_size) < 1:
        raise LitPruneError("--image-size takes height and width in pixels, e.g. --image-size 672 1008")
    return image_size[0], image_size[1]


def _budgets(plugin: Plugin | None, keep: list[str] | None) -> dict[str, Budget]:
    """The budgets as they are written: an average, or `layer:count` pairs."""
    if plugin is None:
        if keep:
            raise LitPruneError("--keep needs a method: give --pruner too")
        return {}
    if keep:
        return {text: parse_budget(text) for text in keep}
    if plugin.keep is None:
        raise LitPruneError("give budgets: --keep N, visual tokens averaged over the decoder layers' inputs")
    own = plugin.keep
    return {format_schedule(own) if isinstance(own, dict) else str(own): own}


def _tower(config: PreTrainedConfig, plugin: Plugin, keep: Budget, size: ModelSize) -> TowerTrace | None:
    """What the image's tiles ask of a vision tower that the method prunes inside."""
    if not plugin.pruner.acts_in_tower:
        return None
    tiles = max(1, size.image.patches // tower_size(config).side ** 2)
    return tower_trace(config, plugin.pruner, keep, tiles)


def bill(
    schedule: dict[int, int],
    prompt: Prompt,
    size: ModelSize,
    plugin: Plugin | None = None,
    tower: TowerTrace | None = None,
) -> Bill:
    """Price a prompt under a schedule; an empty one is the full model."""
    pruner, repair = (None, None) if plugin is None else (plugin.pruner, plugin.repair)
    trace = plan(schedule, prompt.visual, prompt.text, size.depth, pruner, repair)
    trace.tower = tower
    prices = [
        price(trace, size, pruner, repair),
        price(step(trace, 1), size, repair=repair),
        decode(trace, size, prompt.steps, repair),
    ]
    prefill, first, answer = ({part: flops.item() for part, flops in parts.items()} for parts in prices)
    return Bill(
        schedule=schedule,
        average=trace.average_visual().item(),
        prefill=prefill,
        decoder=decoder_total(prices[0]).item(),
        step=first,
        answer=answer,
        kv=_bytes(trace, size, prompt),
        kv_after=_bytes(step(trace, prompt.steps), size, prompt),
        visual=[int(count) for count in trace.visual],
        layers=[decoder_layer(size, q, k).item() for q, k in zip(trace.queries, trace.keys, strict=True)],
    )


def _bytes(trace: Trace, size: ModelSize, prompt: Prompt) -> int:
    return int(kv_bytes(trace, size, prompt.bytes_per_value).item())


# Reports


def as_report(facts: dict[str, Any], keep: str, made: Bill, full: Bill) -> dict[str, Any]:
    """One budget beside the full model, as JSON has it: FLOPs and bytes as whole numbers."""
    return {
        **facts,
        "keep": keep or None,
        "schedule": made.schedule,
        "avg_visual_tokens": made.average,
        "full_decoder_flops": int(full.decoder),
        "decoder_flops": int(made.decoder),
        "reduction": 1 - made.decoder / full.decoder,
        "parts": _whole(made.prefill),
        "full_parts": _whole(full.prefill),
        "decode_flops_per_token": int(made.step["total"]),
        "full_decode_flops_per_token": int(full.step["total"]),
        "decode_parts": _whole(made.answer),
        "full_decode_parts": _whole(full.answer),
        "kv_bytes": made.kv,
        "full_kv_bytes": full.kv,
        "kv_bytes_after_answer": made.kv_after,
        "full_kv_bytes_after_answer": full.kv_after,
        "visual_tokens_by_layer": made.visual,
    }


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {part: int(flops) for part, flops in parts.items()}


def as_table(title: str, bills: dict[str, Bill], prompt: Prompt) -> Table:
    """A column for the full model and for each budget."""
    full = bills["full"]
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in bills:
        table.add_column(name, justify="right")

    def row(label: str, cell: Any) -> None:
        table.add_row(label, *(cell(one) for one in bills.values()))

    row("layer: kept", lambda b: "\n".join(f"{i}: {kept}" for i, kept in b.schedule.items()) or "all")
    row("layer average", lambda b: f"{b.average:.1f}")
    table.add_section()
    for part, label in PARTS.items():
        row(label, lambda b, part=part: _number(b.prefill[part]))
    row("prefill, FLOP", lambda b: _number(b.prefill["total"]) + _saved(b.prefill["total"], full.prefill["total"]))
    row("decoder in all", lambda b: _number(b.decoder) + _saved(b.decoder, full.decoder))
    table.add_section()
    row("a step, FLOP", lambda b: _number(b.step["total"]) + _saved(b.step["total"], full.step["total"]))
    row(f"all {prompt.steps} steps", lambda b: _number(b.answer["total"]))
    table.add_section()
    row("KV cache, bytes", lambda b: _number(b.kv) + _saved(b.kv, full.kv))
    row("at the end", lambda b: _number(b.kv_after))
    return table


def _number(value: float) -> str:
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
    prefix, scale = next((p, s) for p, s in prefixes if value >= s or s == 1)
    return f"{value / scale:.4g} {prefix}".rstrip()


def _saved(value: float, full: float) -> str:
    return "" if value == full else f" {value / full - 1:+.1%}"


def draw(path: Path, title: str, bills: dict[str, Bill]) -> None:
    """Visual tokens at each decoder layer's input, and the FLOPs of the layer; raises for a format that isn't known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    tokens, flops = figure.subplots(1, 2)
    for name, made in bills.items():
        style = {"label": name, "color": "0.6" if name == "full" else None, "where": "mid"}
        tokens.step(range(len(made.visual)), made.visual, **style)
        flops.step(range(len(made.layers)), [value / 1e9 for value in made.layers], **style)
    tokens.set_ylabel("visual tokens")
    flops.set_ylabel("GFLOP of the prefill")
    for axes in (tokens, flops):
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    tokens.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise LitPruneError(f"--plot {path}: {error}") from error
