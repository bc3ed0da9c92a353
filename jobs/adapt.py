"""Turn a trained plug-in into one with an adaptive budget: as many tokens as the pruner needs to be sure.

    python jobs/adapt.py runs/try/plugin --keep 16 --out runs/try/adaptive

Finds the share of softmax(logits) that keeps the budget on average over training scenes of a configuration, and writes
the plug-in with `select: mass`. Test data are not looked at.
"""

import argparse
from pathlib import Path

import torch

from lit_prune.commands.trainer import build
from lit_prune.data.loader import move_batch
from lit_prune.host import Record, Session
from lit_prune.vlm import VLM, as_plugin


def average(vlm: VLM, batches: list[dict], mass: float) -> float:
    """Visual tokens averaged over decoder layers and samples, with one share for all stages."""
    decider(vlm).keep_mass = mass
    found = []
    for batch in batches:
        record = Record()
        with torch.no_grad(), vlm.using(Session(record=record)):
            vlm.model(**vlm.encode_images(batch["inputs"]), use_cache=False)
        found.append(record.trace.average_visual())
    return torch.cat(found).mean().item()


def decider(vlm: VLM) -> torch.nn.Module:
    """The part of the pruner that selects by mass: itself, or the decoder's method of a chain."""
    return getattr(vlm.plugin.pruner, "then", vlm.plugin.pruner)


def main() -> None:
    """Bisect the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugin", help="a trained plug-in folder")
    parser.add_argument("--keep", type=int, required=True, help="average budget, visual tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adaptive plug-in")
    parser.add_argument("--config", default="configs/micro.yaml", help="configuration of base model and data")
    parser.add_argument("--questions", type=int, default=448, help="training questions to look at")
    chosen = parser.parse_args()

    made = build([chosen.config], [])
    data, vlm = made.datamodule, made.model.vlm
    data.prepare_data()
    data.setup("fit")
    vlm.detach().attach(as_plugin(chosen.plugin), keep=chosen.keep)
    decider(vlm).select = "mass"
    batches, seen = [], 0
    for batch in data.train_dataloader():
        batches.append(move_batch(batch, lambda part: part))
        seen += len(batch["ids"])
        if seen >= chosen.questions:
            break
    low, high = 1e-4, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        spent = average(vlm, batches, middle)
        print(f"mass {middle:.5f}: {spent:.3f} visual tokens on average", flush=True)
        low, high = (middle, high) if spent < chosen.keep else (low, middle)
    decider(vlm).keep_mass = round(low, 5)
    vlm.save_pretrained(chosen.out)
    mass = decider(vlm).keep_mass
    print(f"{chosen.out}: mass {mass}, {average(vlm, batches, mass):.3f} on {seen} questions")


if __name__ == "__main__":
    main()
