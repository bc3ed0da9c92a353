"""Estimate of a training run and its assumptions (`lit-prune cost --train`)."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.commands._support.pricing import Bill, Case
from lit_prune.cost.flops import ModelSize
from lit_prune.cost.plan import Training
from lit_prune.cost.shapes import Config
from lit_prune.cost.training import Estimate, TokenCounts, Weights, estimate, plan_step
from lit_prune.errors import LitPruneError
from lit_prune.host import parts
from lit_prune.loading import load_config, random_model
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Dims


def check(training: Training, method: str | None) -> None:
    """Raise `LitPruneError` for invalid settings of a run."""
    if method is None:
        raise LitPruneError("--train estimates the training of a method: give --pruner too")
    for name, value in asdict(training).items():
        if not isinstance(value, str | bool) and value <= 0 and name != "reserve":
            raise LitPruneError(f"--train.{name} {value} must be above 0")


def built(plugin: Plugin, size: ModelSize) -> Plugin:
    """Build the plug-in for a model's sizes on the meta device, without allocating memory."""
    made = copy.deepcopy(plugin)
    with torch.device("meta"):
        made.build(Dims(size.width, size.depth, size.image.visual if size.image else 1), [])
    if not made.trained:
        raise LitPruneError("--train: this method has nothing to train")
    return made


def count_weights(config: Config, plugin: Plugin, bytes_per_value: int = 2) -> Weights:
    """Count the parameters of a model, on the meta device, and of a plug-in built for it."""
    model = random_model(config, torch.bfloat16, "meta")
    return Weights(_count(model), _count(parts.find(model).layers[0]), _count(plugin), bytes_per_value)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def show(training: Training, case: Case, bills: dict[str, Bill]) -> list[dict[str, Any]]:
    """Print the estimate under each bill's schedule and what it assumes; return the same as reports."""
    found = runs(training, case, bills)
    console.out.print(as_table(training, {f"keep {name}": run for name, run in found.items()}))
    console.say(assumptions(training, case.prompt.bytes_per_value))
    return [as_report(training, run) for run in found.values()]


def runs(training: Training, case: Case, bills: dict[str, Bill]) -> dict[str, Estimate]:
    """Estimate a run for each bill's schedule."""
    size, prompt, plugin = case.size, case.prompt, built(case.plugin, case.size)
    weights = count_weights(load_config(case.model), plugin, prompt.bytes_per_value)
    tokens = TokenCounts(prompt.visual, prompt.text, prompt.answer)
    estimates = {}
    for name, bill in bills.items():
        step = plan_step(bill.schedule, tokens, size.depth, plugin.pruner, plugin.repair, training)
        step.student.tower = bill.tower
        estimates[name] = estimate(training, step, size, weights, plugin.pruner, plugin.repair)
    return estimates


def as_table(training: Training, found: dict[str, Estimate]) -> Table:
    """Table with one column per budget."""
    sum_ = training.gpus * training.batch_size * training.accumulate
    title = (
        f"ESTIMATE of training on {training.gpus} GPUs, {training.strategy}, {training.mode}: steps of {sum_} samples"
    )
    table = Table("", title=title, title_justify="left", title_style="bold")
    for name in found:
        table.add_column(name, justify="right")

    def row(label: str, cell: Any) -> None:
        table.add_row(label, *(cell(one) for one in found.values()))

    row("a batch, TFLOP", lambda e: f"{e.flops / 1e12:.1f}")
    if training.checkpointing:
        row("repeated, TFLOP", lambda e: f"{e.repeated / 1e12:.1f}")
    row("computing, s", lambda e: f"{e.compute:.3f}")
    if training.strategy == "deepspeed_3":
        row("gathering weights, s", lambda e: f"{e.transfer:.3f}")
    row("a step, s", lambda e: f"{e.step:.2f}")
    row("samples/s", lambda e: f"{e.rate:.1f}")
    row(f"{training.samples:,} samples, hours", lambda e: f"{e.run / 3600:.2f}")
    table.add_section()
    for part in next(iter(found.values())).memory:
        row(f"{part}, GB", lambda e, part=part: f"{e.memory[part] / 1e9:.2f}")
    row("each GPU, GB", lambda e: f"{sum(e.memory.values()) / 1e9:.1f}")
    return table


def assumptions(training: Training, bytes_per_value: int) -> str:
    """Describe the assumptions of the estimate."""
    return (
        f"Assumed: {training.peak:g} TFLOP/s a GPU, of which {training.utilisation:.0%} are reached; "
        f"{training.bandwidth:g} GB/s to the others, overlapped with computing; {training.reserve:g} GB "
        f"for the CUDA context, workspaces and fragmentation; frozen weights of {bytes_per_value} bytes, what trains "
        f"and Adam in float32; every sample of this length; data loading hidden; no validation, no checkpoints."
    )


def as_report(training: Training, made: Estimate) -> dict[str, Any]:
    """Convert an estimate to JSON, with the settings."""
    return {"settings": asdict(training), **asdict(made), "bytes": sum(made.memory.values())}
