"""Choice of the constants of configs/pruners/dcp.yaml: variants that differ in one, on *training* scenes.

    python jobs/tune_dcp.py                       # 560 questions, budgets 4, 8 and 16; about 10 minutes on one core
    python jobs/tune_dcp.py --questions 280 --keep 8 --data-seed 41

A question counts as answered if every token of the right answer is the most likely one after those before it, which is
what greedy decoding asks; one forward a question. Test scenes are never read.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lit_prune import load
from lit_prune.data.instruct import InstructData
from lit_prune.data.micro import INSTRUCTIONS, Split, seeds_of
from lit_prune.micro.worlds import WORLDS
from lit_prune.plugin import Plugin
from lit_prune.vlm import VLM, plugin_from_yaml

BASE = Path("configs/pruners/dcp.yaml")
OTHERS = ("visionzip", "scope", "prumerge_plus", "downsample")
VARIANTS = [
    {},
    {"acgr": False, "tatcs": False},
    {"acgr": False},
    {"tatcs": False},
    {"tatcs": True, "threshold": 0.0},
    {"threshold": 0.0, "text": 0.0},
    {"threshold": 0.0, "text": 1.0},
    {"threshold": 0.0, "candidates": 1.5},
    {"contrast": 0.0},
    {"contrast": 0.5},
    {"strength": 0.0},
    {"strength": 0.5},
    {"strength": 2.0},
    {"temperature": 0.1},
    {"temperature": 1.0},
    {"width": 0.5},
    {"width": 1.5},
    {"vision_layers": [-1], "vision_stage_ratios": [1.0]},
    {"vision_layers": [3, -1]},
    {"vision_layers": [1, -1]},
    {"vision_stage_ratios": [12.0, 1.0]},
    {"vision_stage_ratios": [4.0, 1.0]},
]


def batches(questions: int, data_seed: int, folder: Path) -> list[dict]:
    """Training scenes with their questions, in the form of the test data."""
    world = WORLDS["micro"]
    split = Split(world, "train", questions, seeds_of(world, "train", questions, 7, data_seed), 7)
    split.write(folder)
    data = InstructData("micro", test=str(split.folder(folder) / INSTRUCTIONS), eval_batch_size=70)
    data.setup("test")
    return [data.on_before_batch_transfer(batch, 0) for batch in data.test_dataloader()]


@torch.no_grad()
def accuracy(vlm: VLM, plugin: Plugin | None, keep: int, data: list[dict]) -> float:
    """Share of the questions answered; the full model's without a plug-in."""
    if plugin is not None:
        vlm.attach(plugin, keep=keep)
    right, count = 0, 0
    for batch in data:
        found = vlm.model(**batch["inputs"], use_cache=False).logits[:, :-1].argmax(-1)
        wanted = batch["inputs"]["labels"][:, 1:]
        right += int(((found == wanted) | (wanted == -100)).all(1).sum())
        count += len(wanted)
    vlm.detach()
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=560)
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--data-seed", type=int, default=40)
    asked = parser.parse_args()
    vlm, base = load("micro"), plugin_from_yaml(BASE).pruner
    with tempfile.TemporaryDirectory() as folder:
        data = batches(asked.questions, asked.data_seed, Path(folder))
    table = Table("variant", *(f"{keep} tokens" for keep in asked.keep), title=f"% of {asked.questions} questions")
    rows = [("full", None)]
    rows += [(name, plugin_from_yaml(BASE.with_stem(name))) for name in OTHERS]
    rows += [(str(change or BASE.stem), Plugin(type(base)(**{**base.config(), **change}))) for change in VARIANTS]
    for name, plugin in rows:
        found = [f"{100 * accuracy(vlm, plugin, keep, data):.1f}" for keep in asked.keep]
        table.add_row(name, *found)
        print(name, *found, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
