"""Write a report of comparisons: one HTML file with tables, intervals, charts and answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_prune.commands._support import console
from lit_prune.commands._support.outputs import check_file
from lit_prune.errors import LitPruneError, check_number

if TYPE_CHECKING:
    from lit_prune.evaluation.report.table import Table

# What `lit-prune compare`, and `bench` for it, keep in a comparison's folder.
WRITTEN = ("results.json", "results.csv", "table.md", "groups.json", "bench.json", "cells", "samples", "images")


def run(
    runs: list[Path],
    out: Path = Path("report.html"),
    title: str = "Visual-token pruning: report",
    baseline: str = "full",
    samples: int = 200,
    draws: int = 2000,
    seed: int = 0,
    markdown: Path | None = None,
    wandb: bool = False,
) -> None:
    """Write a report of what `lit-prune compare` measured: one HTML file that needs no network and no other file.

    It has a table of methods and budgets with accuracy, 95 % intervals, paired differences, shares of the full model's
    accuracy, agreement with its answers, costs and latency; accuracy per skill and per group of questions; charts; and
    samples with the full model's answer and each method's, to be filtered by method, skill and kind, such as "full
    right, pruned wrong". Intervals are bootstrapped over images: questions on one image stay together. Latency is what
    the comparison measured, and what `lit-prune bench --json RUN/bench.json` wrote, where that file is there.

    Args:
        runs: Folders that `lit-prune compare` wrote, e.g. lit-prune report runs/compare.
        out: HTML file, e.g. --out report.html.
        title: Title of the page, e.g. --title "RCP on POPE".
        baseline: Method that differences are taken to, e.g. --baseline random; by default the full model.
        samples: Most samples to show, those that most methods lose first, e.g. --samples 1000; 0 shows none.
        draws: Bootstrap samples per interval, e.g. --draws 10000.
        seed: Of the bootstrap.
        markdown: Write what was measured, how, and the tables as text too, e.g. --markdown tables.md.
        wandb: Log the tables to Weights & Biases too, offline where there is no key: --wandb.

    Examples:
        lit-prune report runs/compare
        lit-prune report runs/compare runs/pope --out report.html --title "Two data sets"
        lit-prune report runs/compare --baseline random --samples 1000
    """
    check_number("--samples", samples, least=0, whole=True)
    check_number("--draws", draws, least=100, whole=True)
    check_number("--seed", seed, least=0, whole=True)
    if not runs:
        raise LitPruneError("--runs: give a folder that `lit-prune compare --out FOLDER` wrote")
    _check_files(runs, out, markdown)
    from lit_prune.evaluation.report.page import Findings, make  # PyTorch and matplotlib, which --help does without
    from lit_prune.evaluation.report.runs import check_baseline, read_run

    read = [read_run(folder) for folder in dict.fromkeys(runs)]
    check_baseline(read, baseline)
    found = Findings.of(read, baseline, draws, seed)
    _save(make(read, title, found, samples), out)
    if markdown is not None:
        _save(found.markdown(title), markdown)
    if wandb:
        _log(found.tables, out, title)


def _check_files(runs: list[Path], out: Path, markdown: Path | None) -> None:
    """Refuse files that can't be written, that are one, or that belong to a comparison."""
    given = {"--out": out, "--markdown": markdown}
    named = {option: path for option, path in given.items() if path is not None}
    owned = {folder.resolve() / name for folder in runs for name in WRITTEN}
    for option, path in named.items():
        check_file(option, path)
        if owned.intersection([path.resolve(), *path.resolve().parents]):
            raise LitPruneError(f"{option}: {path} belongs to the comparison that is read; give another name")
    if markdown is not None and markdown.resolve() == out.resolve():
        raise LitPruneError(f"--markdown: {markdown} is the page's file too; give another name")


def _save(text: str, out: Path) -> None:
    """Write a whole file, and say so; a model's answer may have what no UTF-8 file can."""
    from lit_prune.files.writing import written_whole

    content = text.encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as file:
        file.write_bytes(content)
    console.say(f"written: {out} ({len(content) / 1e6:.1f} MB)")


def _log(tables: "Sequence[Table]", out: Path, title: str) -> None:
    """The tables as those of a run of W&B, whose files go beside the page."""
    import wandb

    from lit_prune.evaluation.report.logged import as_wandb

    with wandb.init(project="lit_prune", job_type="report", name=out.stem, dir=out.parent, notes=title) as logged:
        logged.log(as_wandb(tables))
