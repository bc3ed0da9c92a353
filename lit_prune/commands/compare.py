"""Measure methods side by side at several budgets: accuracy, tokens, FLOPs, shift; tables and plots."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.commands._support.outputs import check_folder
from lit_prune.commands._support.passes import STAGES, Work, load_data, source_of
from lit_prune.commands._support.processes import started
from lit_prune.commands._support.sample_images import SampleImages
from lit_prune.commands._support.trainer_options import LARGEST_SEED
from lit_prune.commands.trainer import PruneCLI, build
from lit_prune.errors import LitPruneError, UsageError, check_number, check_numbers
from lit_prune.evaluation.cells import FULL, Cell, Method, budget, cells_of, describe, prepare
from lit_prune.evaluation.groups import FILE as GROUPS_FILE
from lit_prune.evaluation.groups import Groups
from lit_prune.evaluation.plots import draw
from lit_prune.evaluation.ranks import Ranks
from lit_prune.evaluation.report.intervals import DRAWS
from lit_prune.evaluation.report.logged import as_wandb
from lit_prune.evaluation.report.runs import read_run
from lit_prune.evaluation.report.tables import all_tables
from lit_prune.evaluation.rows import Row, as_csv, caption, flat
from lit_prune.evaluation.store import Store
from lit_prune.evaluation.tables import markdown, overviews, remarks
from lit_prune.files.shipped import config_names
from lit_prune.files.writing import written_whole
from lit_prune.host.parts import find
from lit_prune.ops.budget import as_json, parse_budget
from lit_prune.plugin import learns
from lit_prune.vlm import VLM

PRUNERS = Path("configs/pruners")
DATA_SEED = "data.init_args.data_seed"


def run(
    config: list[str] | None = None,
    methods: list[str] | None = None,
    keep: list[Any] | None = None,
    seeds: list[int] | None = None,
    limit: int | None = None,
    data_seed: int | None = None,
    out: Path = Path("runs/compare"),
    fresh: bool = False,
    wandb: bool = False,
    split: Literal["val", "test"] = "val",
    groups: int | None = None,
    processes: int | None = None,
) -> None:
    """Measure methods x budgets x seeds on a configuration's data, batch by batch beside the full model.

    That is the validation set, which may be looked at again and again; the test set is for what is chosen and reported.
    Writes results.json (a list of cells), results.csv, table.md and plots into the output folder and prints the tables;
    samples/ has a record of each answer, from which `lit-prune report` makes a page.
    A cell that is done is kept in OUT/cells and not measured again while nothing it depends on has changed: method,
    weights, budget, seed, base model, data. Budgets are passes, so a run that is cut off loses at most one of them.
    A budget that a method can't meet is an empty cell with the reason. An error in one method leaves its cell empty,
    the others continue, and the exit code is 1.

    Args:
        config: Configuration files of `lightning fit`: they give base model, data and budget. Default:
            configs/micro.yaml.
        methods: `full`, a shipped method, a YAML file, or a plug-in folder, each as PATH or NAME=PATH; NAME=A,B,C are
            trained runs of one method; {keep} and {seed} in a path stand for each budget and seed, as in
            RCP=runs/seeds/keep_{keep}/seed_{seed}/plugin; `!` after the path leaves the repair adapter out. Default:
            full and all of configs/pruners.
        keep: Budgets, visual tokens averaged over the decoder layers' inputs, or shares of the model's, e.g. --keep 32
            16 5.6%. Default: the configuration's.
        seeds: Draws of random methods, initialisations of untrained ones, and what {seed} stands for. Default: 0 1 2.
        limit: Number of samples. Default: all.
        data_seed: Other scenes, where the data are generated, e.g. --data-seed 1 for some that nobody chose on.
        out: Folder for the results.
        fresh: Measure every cell again: --fresh.
        wandb: Log cells, tables with intervals and paired differences, and plots to Weights & Biases, offline where
            there is no key: --wandb.
        split: What to measure on: --split val (the default), or --split test.
        groups: Tell questions that the full model answers from a blank image, or from one whose sides are divided by
            this number, e.g. --groups 4, from the rest, with figures for each group. Takes two more passes of the full
            model.
        processes: Number of processes of this machine, one a GPU, that share the batches; the results are those of one.
            Over several machines, start `torchrun ... -m lit_prune compare` instead.

    Examples:
        lit-prune compare --methods full random fastv divprune --keep 16 --limit 140
        lit-prune compare --keep 33.3% 11.1% --seeds 0 1 2 --split test --out runs/compare
        lit-prune compare --methods full fastv divprune --keep 16 --groups 4
        lit-prune compare -c micro.yaml --methods full RCP=runs/try/plugin --keep 16
    """
    _check(keep, limit, groups, seeds, out)
    chosen = [Method.parse(text) for text in dict.fromkeys(methods or _all_methods())]
    for method in chosen:
        method.check()
    if started(processes):
        return
    with Ranks.joined() as ranks:
        made = _build(config or ["configs/micro.yaml"], data_seed, STAGES[split])
        vlm = made.model.vlm.detach()
        _to_gpu(vlm, ranks)
        dims = find(vlm.model).dims
        asked_for = [as_json(made.model.keep)] if keep is None else keep
        keeps = list(dict.fromkeys(budget(each, dims.visual, dims.varies) for each in asked_for))
        setting = load_data(made, split, limit, ranks)
        cells = cells_of(chosen, keeps, [0, 1, 2] if seeds is None else seeds, lambda plugin: learns(plugin, dims))
        images = SampleImages(source_of(made.datamodule, split), out / "images")
        work = Work(made, split, Store(out / "cells"), images, ranks)
        prepare([work.full, *cells], vlm, {**describe(vlm), **setting})
        views = work.views(groups, {**describe(vlm), **setting})
        if not fresh:
            work.recall([work.full, *views.values(), *cells])
        divided = work.divide(groups, views)

        def write() -> None:
            if ranks.writes:
                _write(work.rows(cells, divided), divided, out, dims.visual)

        work.measure(cells, keeps, write)
        write()
    if not ranks.writes:
        return
    rows = work.rows(cells, divided)
    pictures = _draw(rows, out, dims.visual)
    _print(rows, dims.visual)
    if wandb:
        _log(rows, pictures, out, {**setting, "split": split})
    _judge(cells, work.results)


def _check(keep: list[Any] | None, limit: int | None, groups: int | None, seeds: list[int] | None, out: Path) -> None:
    """Raise `LitPruneError` for options that nothing can be measured with, before a model is loaded."""
    for each in keep or []:
        parse_budget(each, "--keep")
    if limit is not None and limit < 1:
        raise LitPruneError(f"--limit {limit}: at least one sample must be measured")
    check_number("--groups", groups, least=2, whole=True)
    check_numbers("--seeds", seeds or [], least=0, most=LARGEST_SEED, whole=True)
    check_folder("--out", out)


def _build(config: list[str], data_seed: int | None, verb: str) -> PruneCLI:
    """Model, and the data that a verb reads; raises `LitPruneError` for a seed where the data have none."""
    overrides = [] if data_seed is None else [f"--{DATA_SEED}={data_seed}"]
    try:
        return build(config, overrides, reads=verb)
    except UsageError as error:
        if error.key != DATA_SEED:
            raise
        raise LitPruneError("--data-seed: these data are not generated, so they have no seed; leave it out") from error


def _all_methods() -> list[str]:
    """The full model and `configs/pruners`, of this folder or else of the package."""
    found = sorted(map(str, PRUNERS.glob("*.yaml")))
    return [FULL, *(found or config_names("pruners"))]


def _to_gpu(vlm: VLM, ranks: Ranks) -> None:
    import torch

    vlm.model.to(torch.device("cuda", ranks.local) if torch.cuda.is_available() else "cpu")


# What comes out


def _write(rows: list[Row], divided: Groups | None, out: Path, visual: int) -> None:
    """results.json with everything, results.csv with the flat columns, table.md for documents; each whole or not.

    And groups.json, which belongs to these results: that of others goes.
    """
    out.mkdir(parents=True, exist_ok=True)
    if divided is None:
        (out / GROUPS_FILE).unlink(missing_ok=True)
    else:
        divided.write(out)
    texts = {
        "results.json": json.dumps(rows, indent=1) + "\n",
        "results.csv": as_csv(rows),
        "table.md": markdown(rows, visual),
    }
    for name, text in texts.items():
        with written_whole(out / name) as file:
            file.write_text(text, encoding="utf-8")


def _draw(rows: list[Row], out: Path, visual: int) -> dict[str, Path]:
    """The plots as PNG files."""
    paths = {}
    for name, page in draw(rows, visual).items():
        paths[name] = out / f"{name}.png"
        page.savefig(paths[name])
    return paths


def _print(rows: list[Row], visual: int) -> None:
    for title, (columns, *body) in overviews(rows, visual).items():
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
        for line in body:
            table.add_row(*line)
        console.out.print(table)
    for line in (f"Measured on the {caption(rows)}.", *remarks(rows)):
        console.out.print(f"- {line}", markup=False, highlight=False)


def _log(rows: list[Row], pictures: dict[str, Path], out: Path, setting: dict[str, Any]) -> None:
    """The cells, the report's tables with intervals and paired differences, and the plots, in one run."""
    import wandb

    lines = flat(rows)
    measured = any(each["status"] == "measured" for each in rows)
    tables = as_wandb(all_tables([read_run(out)], FULL, DRAWS, 0)) if measured else {}
    with wandb.init(project="lit_prune", job_type="compare", name=out.name, dir=out, config=setting) as logged:
        logged.log({"cells": wandb.Table(list(lines[0]), [list(line.values()) for line in lines])})
        logged.log(tables)
        logged.log({name: wandb.Image(str(path)) for name, path in pictures.items()})


def _judge(cells: list[Cell], results: dict[str, Row]) -> None:
    """Say how many cells have no result; raise `LitPruneError` if some should have one."""
    failed = [cell for cell in cells if cell.failed and cell.key not in results]
    empty = sum(1 for cell in cells if cell.reason and not cell.failed)
    if empty:
        console.say(f"{empty} of {len(cells)} cells are empty: budgets that can't be met, or runs that are not there")
    if failed:
        raise LitPruneError(
            f"{len(failed)} of {len(cells)} cells failed; the first: {failed[0].method} at {failed[0].keep}: "
            f"{failed[0].reason}"
        )
