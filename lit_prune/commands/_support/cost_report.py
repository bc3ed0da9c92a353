"""Output of `lit-prune cost`: table, JSON, plot."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_prune.commands._support.pricing import Bill, Case
from lit_prune.errors import LitPruneError

PARTS = {
    "vision": "vision tower",
    "projector": "projector",
    "decoder": "decoder layers",
    "scoring": "scoring",
    "pruner": "pruner",
    "repair": "repair",
    "lm_head": "LM head",
}


def as_report(case: Case, keep: str, made: Bill, full: Bill) -> dict[str, Any]:
    """One budget beside the full model, as JSON has it: FLOPs and bytes as whole numbers."""
    return {
        "model": case.model,
        "pruner": case.method,
        "dtype": case.dtype,
        "visual_tokens": case.prompt.visual,
        "text_tokens": case.prompt.text,
        "answer_tokens": case.prompt.answer,
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


def _whole(parts: dict[str, float]) -> dict[str, int | None]:
    """FLOPs of each part, null where they aren't known; `total` is the sum of those that are."""
    return {part: int(parts[part]) if part in parts else None for part in (*PARTS, "total")}


def as_table(case: Case, bills: dict[str, Bill]) -> Table:
    """A column for the full model and for each budget."""
    full = bills["full"]
    table = Table(title=escape(case.title), title_justify="left", title_style="bold")
    table.add_column("")
    for name in bills:
        table.add_column(name, justify="right")

    def row(label: str, cell: Any) -> None:
        table.add_row(label, *(cell(one) for one in bills.values()))

    row("layer: kept", lambda b: "\n".join(f"{i}: {kept}" for i, kept in b.schedule.items()) or "all")
    row("layer average", lambda b: f"{b.average:.1f}")
    table.add_section()
    for part, label in PARTS.items():
        row(label, lambda b, part=part: _number(b.prefill[part]) if part in b.prefill else "unknown")
    known = "" if set(PARTS) <= set(full.prefill) else " of what is known"
    row(
        f"prefill{known}, FLOP",
        lambda b: _number(b.prefill["total"]) + _saved(b.prefill["total"], full.prefill["total"]),
    )
    row("decoder in all", lambda b: _number(b.decoder) + _saved(b.decoder, full.decoder))
    table.add_section()
    row("a step, FLOP", lambda b: _number(b.step["total"]) + _saved(b.step["total"], full.step["total"]))
    row(f"all {case.prompt.steps} steps", lambda b: _number(b.answer["total"]))
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


def draw(path: Path, case: Case, bills: dict[str, Bill]) -> None:
    """Visual tokens at each decoder layer's input, and the FLOPs of the layer; raises for a format that isn't known."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 3.4), layout="constrained")
    page.suptitle(case.title, fontsize="medium")
    tokens, flops = page.subplots(1, 2)
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
        page.savefig(path, dpi=150)
    except ValueError as error:
        raise LitPruneError(f"--plot {path}: {error}") from error
