"""Answer prompts about images with fewer visual tokens."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.commands._support.inputs import Choice, Dtype, attach, encode, load_model, own_choice, respond
from lit_prune.commands._support.outputs import check_file, write_json
from lit_prune.cost.flops import ModelSize, decoder_total, price
from lit_prune.cost.trace import Trace
from lit_prune.errors import LitPruneError, check_number
from lit_prune.files.inputs import as_image
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.ops.budget import as_json, parse_budget
from lit_prune.vlm import VLM

REPEATS = 5  # timed runs, of which the median counts


@dataclass(frozen=True)
class Run:
    """Result of one way of answering a batch; lists have one entry per sample."""

    answers: list[str]
    visual: list[float]  # visual tokens averaged over the decoder layers' inputs
    kept: list[dict[int, int]]  # {pruning layer: visual tokens kept}
    flops: list[float | None]  # decoder prefill with all that pruning adds; None: the arithmetic isn't known
    first_token: float  # seconds, of the whole batch


def run(
    image: list[str],
    prompt: list[str],
    model: str = "micro",
    pruner: str | None = None,
    keep: Any = None,
    max_new_tokens: int = 64,
    compare: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Answer prompts about images, pruned or plain, and say what it cost.

    Args:
        image: PNG or JPEG files, e.g. --image a.png b.png; several are one batch.
        prompt: Questions without chat template, e.g. --prompt "What colour is the circle?"; one for all images or one
            each.
        model: "micro", a model folder, or a hub id, e.g. --model llava-hf/llava-1.5-7b-hf; or a plug-in's folder or hub
            id, which brings its base model.
        pruner: Shipped method (`lit-prune configs list pruners`), YAML file, plug-in folder or hub id, e.g. --pruner
            fastv; without it the plain model answers, or the plug-in of --model.
        keep: Budget, visual tokens averaged over the decoder layers, e.g. --keep 16 or --keep 11.1%; by
            default the plug-in's own.
        max_new_tokens: Longest answer, e.g. --max-new-tokens 8.
        compare: Show the full model's answers and time to first token beside the pruned ones: --compare.
        dtype: Of the weights, e.g. --dtype bfloat16; auto is what the checkpoint says.
        device: E.g. --device cuda:1; auto is the GPU if there is one.
        json: File to write the same to, e.g. --json answers.json.

    Examples:
        lit-prune sample --out sample
        lit-prune generate --image sample/0.png --prompt "What colour is the tile?"
        lit-prune generate --image sample/0.png --prompt "Where is the cyan cross?" --pruner fastv --keep 16 --compare
    """
    if pruner is None and (compare or keep is not None):
        raise LitPruneError(f"--{'compare' if compare else 'keep'} needs a method: give --pruner too")
    check_number("--max-new-tokens", max_new_tokens, least=1, whole=True)
    check_file("--json", json)
    chosen = None if pruner is None else Choice.of(pruner, keep)
    images, prompts = pair(image, prompt)
    opened = {path: as_image(path) for path in images}
    vlm = load_model(model, dtype, device)
    chosen = chosen or own_choice(vlm, model)
    name = "full model" if chosen is None else attach(vlm, chosen)
    inputs = encode(vlm, [opened[path] for path in images], prompts)
    total = full_trace(inputs, vlm)
    runs = {} if chosen is None else {name: run_pruned(vlm, inputs, max_new_tokens)}
    if chosen is None or compare:
        vlm.detach()
        runs["full model"] = run_plain(vlm, inputs, max_new_tokens, total)
    budget = None if keep is None else as_json(parse_budget(keep))
    facts = {"model": model, "pruner": pruner, "keep": budget, "batch": len(images)}
    facts |= {"dtype": str(vlm.model.dtype).removeprefix("torch."), "device": str(vlm.model.device)}
    report = as_report(facts, images, prompts, runs, total, vlm.size)
    for sample in report["samples"]:
        console.out.print(as_table(sample, report))
    if json is not None:
        write_json(json, report)


def pair(images: list[str], prompts: list[str]) -> tuple[list[str], list[str]]:
    """As many images as prompts: one of either kind serves all of the other."""
    if not images or not prompts:
        raise LitPruneError("give at least one image and one prompt")
    if len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        raise LitPruneError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for all, or one each")
    count = max(len(images), len(prompts))
    return (images * count if len(images) == 1 else images), (prompts * count if len(prompts) == 1 else prompts)


# Runs


def run_pruned(vlm: VLM, inputs: dict[str, Any], max_new_tokens: int) -> Run:
    """Answer with what is attached, and price what ran."""
    record = Record()
    with vlm.using(Session(record=record)):
        answers = respond(vlm, inputs, max_new_tokens)
    flops = decoder_flops(record.trace, vlm.size, vlm.plugin.pruner, vlm.plugin.repair)
    counts = {stage.layer: stage.kept.sum(1).tolist() for stage in record.stages}
    kept = [{layer: count[i] for layer, count in counts.items()} for i in range(len(answers))]
    visual = record.trace.average_visual().tolist()
    return Run(answers, visual, kept, flops, time_first_token(vlm, inputs))


def run_plain(vlm: VLM, inputs: dict[str, Any], max_new_tokens: int, trace: Trace) -> Run:
    """Answer with nothing attached."""
    answers = respond(vlm, inputs, max_new_tokens)
    visual, flops = trace.average_visual().tolist(), decoder_flops(trace, vlm.size)
    return Run(answers, visual, [{} for _ in answers], flops, time_first_token(vlm, inputs))


def full_trace(inputs: dict[str, Any], vlm: VLM) -> Trace:
    """Trace of the plain model: the whole prompt in every layer."""
    lengths = inputs["attention_mask"].sum(1)
    parts = find(vlm.model)
    visual, depth = parts.image_columns(inputs["input_ids"]).sum(1), parts.dims.depth
    return Trace([lengths] * depth, [lengths] * depth, [visual] * depth, total_visual=visual)


def decoder_flops(trace: Trace, size: ModelSize | None, *plugin: Any) -> list[float | None]:
    """FLOPs of each sample's prefill in the decoder, with what pruner and repair of a plug-in add."""
    if size is None:
        return [None] * len(trace.total_visual)
    return decoder_total(price(trace, size, *plugin)).tolist()


def time_first_token(vlm: VLM, inputs: dict[str, Any]) -> float:
    """Seconds from prepared inputs to the first token: vision tower, prefill, one choice; the median of a few runs.

    An answer has been generated from the same inputs before, which warmed everything up.
    """
    from lit_prune.evaluation.measuring import now  # with torchmetrics, which --help doesn't wait for

    times = []
    for _ in range(REPEATS):
        start = now(vlm.model.device)
        respond(vlm, inputs, max_new_tokens=1)
        times.append(now(vlm.model.device) - start)
    return median(times)


# Reports


def as_report(
    facts: dict[str, Any],
    images: list[str],
    prompts: list[str],
    runs: dict[str, Run],
    full: Trace,
    size: ModelSize | None,
) -> dict[str, Any]:
    """Everything that is printed, as JSON has it: facts of the run, time to first token per method, samples."""
    total = full.total_visual.tolist()
    full_flops = decoder_flops(full, size)
    samples = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        methods = {name: _sample(run, i, full_flops[i]) for name, run in runs.items()}
        samples.append({"image": image, "prompt": prompt, "visual_tokens": total[i], "methods": methods})
    times = {name: run.first_token for name, run in runs.items()}
    return {**facts, "first_token_seconds": times, "samples": samples}


def _sample(run: Run, i: int, full_flops: float | None) -> dict[str, Any]:
    return {
        "answer": run.answers[i],
        "avg_visual_tokens": run.visual[i],
        "kept": run.kept[i],
        "flops": run.flops[i],
        "flops_reduction": None if full_flops is None else 1 - run.flops[i] / full_flops,
    }


def as_table(sample: dict[str, Any], report: dict[str, Any]) -> Table:
    """One image: a column a method."""
    methods, times = sample["methods"], report["first_token_seconds"]
    table = Table(title=escape(f"{sample['image']}\n{sample['prompt']}"), title_justify="left", title_style="bold")
    table.add_column("")
    for name in methods:
        table.add_column(name, overflow="fold")
    batch = "" if report["batch"] == 1 else f", batch of {report['batch']}"
    rows = {
        "answer": lambda name, m: escape(m["answer"]),
        f"visual tokens a layer (of {sample['visual_tokens']})": lambda name, m: f"{m['avg_visual_tokens']:g}",
        "kept at its stages": lambda name, m: _stages(m["kept"]),
        "decoder FLOPs of prefill": lambda name, m: _flops(m["flops"]) + _reduction(m["flops_reduction"]),
        f"time to first token{batch}": lambda name, m: f"{times[name] * 1e3:.1f} ms",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(name, method) for name, method in methods.items()))
    return table


def _stages(kept: dict[int, int]) -> str:
    return "\n".join(f"{count} from layer {layer}" for layer, count in kept.items()) or "all"


def _flops(value: float | None) -> str:
    if value is None:
        return "unknown"
    unit, scale = next((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1)) if value >= s or s == 1)
    return f"{value / scale:.3g} {unit}"


def _reduction(share: float | None) -> str:
    return "" if not share else f" ({-share:+.1%})"
