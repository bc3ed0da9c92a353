"""Measure several methods side by side on one data set: accuracy, tokens, FLOPs, shift."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from lit_prune.commands import console
from lit_prune.commands.trainer import build
from lit_prune.comparison import Comparison, Contestant
from lit_prune.data.dataset import move_batch
from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.vlm import as_plugin

METHODS = [
    "full",
    "random=configs/pruners/random.yaml",
    "uniform=configs/pruners/uniform.yaml",
    "last-token attention (FastV)=configs/pruners/fastv.yaml",
    "all-question attention=configs/pruners/text_attention.yaml",
    "word similarity=configs/pruners/text_similarity.yaml",
    "RCP untrained=configs/pruners/rcp.yaml",
    "oracle (ceiling)=configs/pruners/oracle.yaml",
]


def run(
    config: list[str] | None = None,
    methods: list[str] | None = None,
    keep: int | None = None,
    draws: int = 3,
    limit: int | None = None,
    data_seed: int | None = None,
    out: Path = Path("runs/compare"),
) -> None:
    """Measure methods on the test set of a configuration, in one process, batch by batch beside the full model.

    Writes table.json, table.csv and table.md into the output folder and prints the table, its rows in the order given.

    Args:
        config: Configuration files of `lightning fit`: they give base model, data and budget. Default:
            configs/micro.yaml.
        methods: `full`, a pruner's YAML, or a plug-in folder, each as PATH or NAME=PATH; `NAME=A,B,C` averages several
            (seeds of one run), `NAME=PATH!` leaves the repair adapter out. Default: the controls and the training-free
            methods of this project.
        keep: Budget, visual tokens averaged over the decoder layers' inputs. Default: the configuration's.
        draws: Draws of each random method, averaged.
        limit: Number of test samples. Default: all.
        data_seed: Another part of the data's seed range, where the data are generated.
        out: Folder for the results.
    """
    overrides = [] if data_seed is None else [f"--data.init_args.data_seed={data_seed}"]
    made = build(config or ["configs/micro.yaml"], overrides)
    module, data = made.model, made.datamodule
    vlm, budget = module.vlm, module.keep if keep is None else keep
    vlm.detach()
    vlm.model.to("cuda" if torch.cuda.is_available() else "cpu")
    contestants = [_contestant(spec, draws) for spec in (METHODS if methods is None else methods)]
    comparison = Comparison(vlm, contestants, budget, module.max_new_tokens)
    data.prepare_data()
    data.setup("test")
    _loop(comparison, data, limit)
    rows = comparison.rows()
    _write(rows, out)
    visual = comparison.dims.visual
    _print(rows, f"{module.hparams['base']}: {budget} of {visual} visual tokens on average ({budget / visual:.1%})")


def _contestant(spec: str, draws: int) -> Contestant:
    """`full`, PATH or NAME=PATH, several paths with commas between, `!` at the end to leave the repair out."""
    name, _, path = spec.rpartition("=")
    repair, path = not path.endswith("!"), path.removesuffix("!")
    if path == "full":
        return Contestant(name or "full")
    plugins = []
    for part in path.split(","):
        plugins.append(as_plugin(part))
        if hasattr(plugins[-1].pruner, "seed"):
            plugins += [_redraw(part, seed) for seed in range(1, draws)]
    return Contestant(name or Path(path).stem, plugins, repair)


def _redraw(path: str, seed: int) -> Plugin:
    plugin = as_plugin(path)
    plugin.pruner.seed += seed
    return plugin


def _loop(comparison: Comparison, data: Any, limit: int | None) -> None:
    loader, device = data.test_dataloader(), comparison.vlm.model.device
    total = len(data.datasets["test"]) if limit is None else min(limit, len(data.datasets["test"]))
    done = 0
    with Progress(console=console.err) as progress:
        task = progress.add_task(f"{len(comparison.contestants)} methods", total=total)
        for batch in loader:
            batch.pop("skipped", None)
            comparison.update(move_batch(batch, lambda part: _to(part, device)))
            done += len(batch["ids"])
            progress.update(task, completed=done)
            if limit is not None and done >= limit:
                break
    if not done:
        raise LitPruneError("the test set gave no usable sample")


def _to(part: Any, device: Any) -> Any:
    from lightning.pytorch.utilities import move_data_to_device

    return move_data_to_device(part, device)


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    """table.json with everything, table.csv with the flat columns, table.md for documents."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "table.json.tmp"
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / "table.json")
    (out / "table.md").write_text(_markdown(rows), encoding="utf-8")
    flat = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, flat, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


COLUMNS = ("method", "accuracy %", "of full %", "tokens", "MFLOP", "saved %", "KV kB", "W2")


def _cells(row: dict[str, Any]) -> list[str]:
    """A row under `COLUMNS`; with several runs the accuracy carries its standard deviation."""
    spread = f" ± {100 * row['accuracy_std']:.1f}" if row["runs"] > 1 else ""
    return [
        row["name"],
        f"{100 * row['accuracy']:.1f}{spread}",
        f"{100 * row['retained']:.1f}",
        f"{row['avg_visual_tokens']:.1f}",
        f"{row['flops'] / 1e6:.0f}",
        f"{100 * row['flops_reduction']:.1f}",
        f"{row['kv_bytes'] / 1e3:.0f}",
        f"{row['w2']:.2f}",
    ]


def _skills(row: dict[str, Any]) -> list[str]:
    return [row["name"], *(f"{100 * value:.1f}" for value in row["per_skill"].values())]


def _print(rows: list[dict[str, Any]], title: str) -> None:
    """Two narrow tables: what a method keeps and costs, and its accuracy per skill."""
    costs, skills = Table(title=title), Table(title="accuracy per skill, %")
    for table, columns, cells in (
        (costs, COLUMNS, _cells),
        (skills, ("method", *rows[0]["per_skill"]), _skills),
    ):
        for column in columns:
            table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
        for row in rows:
            table.add_row(*cells(row))
    console.out.print(costs, skills)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The same two tables for a document."""
    lines = []
    for columns, cells in ((COLUMNS, _cells), (("method", *rows[0]["per_skill"]), _skills)):
        lines += [" | ".join(columns).join(("| ", " |")), "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [" | ".join(cells(row)).join(("| ", " |")) for row in rows] + [""]
    return "\n".join(lines)
