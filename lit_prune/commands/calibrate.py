"""Set a method's threshold by quantile on unlabelled images, for each budget."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lit_prune.commands._support import console
from lit_prune.commands._support.inputs import Choice, Dtype, attach, load_model
from lit_prune.commands._support.outputs import check_file, check_folder, write_json
from lit_prune.errors import LitPruneError, check_number
from lit_prune.files.images import SUFFIXES
from lit_prune.files.inputs import as_image
from lit_prune.host import Record, Session
from lit_prune.ops.budget import format_budget, parse_budget
from lit_prune.vlm import VLM


def run(
    pruner: str,
    image: list[Path],
    keep: list[Any],
    quantile: float = 0.5,
    model: str = "micro",
    out: Path | None = None,
    json: Path | None = None,
    batch_size: int = 8,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> None:
    """Measure on images what a method compares with its threshold, and set the threshold to a quantile of it.

    For DCP-Prune this is kappa of the plain selection: images above the threshold take the second half of the method,
    which reads the question. No answer and no label is read. Prints a line of YAML for each budget.

    Args:
        pruner: Shipped method, YAML file or plug-in folder with a threshold, e.g. --pruner dcp.
        image: Image files or folders of them, e.g. --image photos.
        keep: Budgets, visual tokens averaged over the decoder layers, e.g. --keep 32 16 8.
        quantile: Share of the images at or below the threshold, e.g. --quantile 0.8.
        model: "micro", a model folder, or a hub id, e.g. --model llava-hf/llava-1.5-7b-hf.
        out: Folder for plug-ins with the threshold set, OUT/keep_16 and so on, which every command takes in place of a
            method's name, e.g. --out calibrated.
        json: File for the figures, e.g. --json thresholds.json.
        batch_size: Images at a time, e.g. --batch-size 32.
        dtype: Of the weights, e.g. --dtype bfloat16; auto is what the checkpoint says.
        device: E.g. --device cuda:1; auto is the GPU if there is one.

    Examples:
        lit-prune calibrate --pruner dcp --image sample --keep 16 8
        lit-prune calibrate --pruner dcp --image sample --keep 16 --quantile 0.8 --out calibrated
    """
    check_number("--quantile", quantile, least=0, most=1)
    check_number("--batch-size", batch_size, least=1, whole=True)
    check_file("--json", json)
    if out is not None:
        check_folder("--out", out)
    choices = {format_budget(parse_budget(budget, "--keep")): Choice.of(pruner, budget) for budget in keep}
    for choice in choices.values():
        _check(choice)
    files = list(_files(image))
    vlm = load_model(model, dtype, device)
    report = []
    for budget, choice in choices.items():
        attach(vlm, choice)
        values = torch.cat(list(_measured(vlm, files, batch_size))).double()
        threshold = round(torch.quantile(values, quantile).item(), 4)
        vlm.plugin.pruner.tower.threshold = threshold
        report.append({"keep": budget, "threshold": threshold, "quantile": quantile, "values": values.tolist()})
        if out is not None:
            vlm.save_pretrained(out / f"keep_{budget}")
    _show(report)
    if out is not None:
        console.say(f"wrote {', '.join(str(out / f'keep_{budget}') for budget in choices)}")
    if json is not None:
        write_json(json, report)


def _show(report: list[dict[str, Any]]) -> None:
    """A row and a line of YAML for each budget."""
    table = Table("budget", "threshold", "lowest", "median", "highest")
    for row in report:
        ends = [torch.quantile(torch.tensor(row["values"]), share).item() for share in (0.0, 0.5, 1.0)]
        table.add_row(row["keep"], f"{row['threshold']:g}", *(f"{value:.4f}" for value in ends))
    console.out.print(table)
    for row in report:
        measured = f"keep {row['keep']}, quantile {row['quantile']:g}, {len(row['values'])} tiles"
        console.say(f"threshold: {row['threshold']:g}  # {measured}")


def _check(choice: Choice) -> None:
    tower = choice.plugin.pruner.tower
    if tower is None or tower.measured is None:
        raise LitPruneError(f"--pruner {choice.name}: no threshold to calibrate; DCP-Prune with tatcs: true has one")


def _files(paths: list[Path]) -> Iterator[Path]:
    """Image files, those in folders by name; raises `LitPruneError` for a folder without any."""
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise LitPruneError(f"--image {path}: no image ({', '.join(SUFFIXES)}) in this folder")
        yield from inside


def _measured(vlm: VLM, files: list[Path], batch_size: int) -> Iterator[Tensor]:
    """Values that the method compares with its threshold, one per tile; only the vision tower runs."""
    name = vlm.plugin.pruner.tower.measured
    for start in range(0, len(files), batch_size):
        record = Record()
        inputs: dict[str, Any] = dict(
            vlm.encode([as_image(file) for file in files[start : start + batch_size]], "What is this?")
        )
        with vlm.using(Session(record=record)):
            vlm.encode_images(inputs)
        if name not in record.memory:
            raise LitPruneError(
                f"keep {vlm.plugin.keep} drops nothing from {files[start]}: there is nothing to calibrate; give fewer"
            )
        yield record.memory[name].float().cpu()
