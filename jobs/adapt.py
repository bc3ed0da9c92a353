"""Turn a trained plug-in into one with an adaptive budget: as many tokens as the pruner needs to be sure.

    python jobs/adapt.py runs/try/plugin --keep 16 --out runs/try/adaptive

Finds, stage by stage, the share of softmax(logits) with which the stage keeps as many tokens of a training scene on
average as the budget plans for it, and writes the plug-in with `select: mass`. Test data are not looked at.
"""

import argparse
from pathlib import Path

import torch
from rich.progress import track

from lit_prune.commands.trainer import build
from lit_prune.data.loader import move_batch
from lit_prune.host import Record, Session
from lit_prune.vlm import VLM, as_plugin

STEPS = 12  # halvings of the range of shares


def main() -> None:
    """Bisect the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugin", help="a trained plug-in folder")
    parser.add_argument("--keep", type=int, required=True, help="average budget, visual tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adaptive plug-in")
    parser.add_argument("--config", default="configs/micro.yaml", help="configuration of base model and data")
    parser.add_argument("--questions", type=int, default=448, help="training questions to look at")
    chosen = parser.parse_args()

    vlm, batches = read(chosen)
    pruner = decider(vlm)
    own = [stage.layer for stage in vlm.host.walk if stage.pruner is pruner]
    pruner.select, pruner.keep_mass = "mass", [1.0] * len(own)
    for stage in track(range(len(own)), description="stages"):
        low, high = 1e-4, 1.0
        for _ in range(STEPS):
            pruner.keep_mass[stage] = (low + high) / 2
            kept, planned, _ = averages(vlm, batches, own[stage])
            low, high = (pruner.keep_mass[stage], high) if kept < planned else (low, pruner.keep_mass[stage])
        pruner.keep_mass[stage] = round(low, 5)
        kept, planned, spent = averages(vlm, batches, own[stage])
        print(f"layer {own[stage]}: mass {pruner.keep_mass[stage]} keeps {kept:.1f}, planned {planned:.1f}", flush=True)
    vlm.save_pretrained(chosen.out)
    print(f"{chosen.out}: {spent:.2f} visual tokens on average, for {chosen.keep}")


def read(chosen: argparse.Namespace) -> tuple[VLM, list[dict]]:
    """The model with the plug-in at the budget, and training batches with enough questions."""
    made = build([chosen.config], [])
    data, vlm = made.datamodule, made.model.vlm
    data.prepare_data()
    data.setup("fit")
    vlm.detach().attach(as_plugin(chosen.plugin), keep=chosen.keep)
    batches, seen = [], 0
    for batch in data.train_dataloader():
        batches.append(move_batch(batch, lambda part: part))
        seen += len(batch["ids"])
        if seen >= chosen.questions:
            break
    return vlm, batches


def decider(vlm: VLM) -> torch.nn.Module:
    """The part of the pruner that selects by mass: itself, or the decoder's method of a chain."""
    return getattr(vlm.plugin.pruner, "then", vlm.plugin.pruner)


def averages(vlm: VLM, batches: list[dict], layer: int) -> tuple[float, float, float]:
    """Tokens that the stage at a layer keeps of a sample, those planned for it, and tokens averaged over all layers."""
    kept, planned, spent = [], [], []
    for batch in batches:
        record = Record()
        with torch.no_grad(), vlm.using(Session(record=record)):
            vlm.model(**vlm.encode_images(batch["inputs"]), use_cache=False)
        stage = next(stage for stage in record.stages if stage.layer == layer)
        kept.append(stage.kept.sum(1).double())
        planned.append(stage.count.minimum(record.trace.total_visual).double())
        spent.append(record.trace.average_visual())
    return tuple(torch.cat(each).mean().item() for each in (kept, planned, spent))


if __name__ == "__main__":
    main()
