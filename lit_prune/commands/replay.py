"""Run a training step again that stopped a run, and say where the first NaN or infinity came up."""

from pathlib import Path

import torch
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.commands.trainer import build
from lit_prune.errors import LitPruneError
from lit_prune.training.replay import load_step, replay

# A single process without loggers: the step alone is wanted.
ALONE = ["--trainer.logger=false", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1"]


def run(file: Path, config: list[str] | None = None) -> None:
    """Repeat the step that `fit` kept when its loss was not finite. Exit code 0: all is finite; 1: something is not.

    The losses are those of the file's own samples; in a run over several ranks the run's were means over all of them.

    Args:
        file: What the run has written: lit-prune replay runs/try/nonfinite/step-000012-rank-0.safetensors.
        config: The run's configuration; by default the one that it saved, if that is still where it was.

    Examples:
        lit-prune replay runs/try/nonfinite/step-000012-rank-0.safetensors
    """
    saved = load_step(file)
    if config is None and (saved.config is None or not Path(saved.config).is_file()):
        raise LitPruneError(f"{file}: the run's configuration is not at {saved.config}: give it with -c")
    made = build(config or saved.config, ALONE)
    precision = made.trainer.precision_plugin
    module = precision.convert_module(made.model).to("cuda" if torch.cuda.is_available() else "cpu")
    with precision.train_step_context():
        found = replay(module, saved)
    table = Table("loss", "value")
    for name, value in {**found.losses, "total": found.total, "total in the run": saved.loss}.items():
        table.add_row(name, f"{value:.9g}")
    console.out.print(table)
    console.say(f"step {saved.step}, rank {saved.rank}, samples {', '.join(saved.ids)}")
    if found.first:
        console.say(f"first not finite: {found.first}")
    if found.gradients:
        console.say(f"gradients that are not finite: {', '.join(found.gradients)}")
    if not found.finite:
        raise SystemExit(1)
    console.say("everything is finite")
