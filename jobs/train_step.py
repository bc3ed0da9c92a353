"""Time and peak memory of a training step of RCP with repair, at a model's real shape with random weights.

python jobs/train_step.py                                        # LLaVA-1.5-7B in bfloat16 on a GPU: 576 + 64 tokens
python jobs/train_step.py --model configs/bench/cpu.yaml --overlay configs/bench/pruners/rcp.yaml --keep 144 --batches 1
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import torch
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

from lit_prune.timing import clock_for
from lit_prune.timing.benchmark import random_prompt
from lit_prune.training import PruneModule
from lit_prune.vlm import plugin_from_yaml

ROOT = Path(__file__).parents[1]
ANSWER = 16  # last tokens of each prompt, which are labelled


class Measured(PruneModule):
    """Notes the seconds of every whole step: forward of teacher and student, backward, optimizer."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
        """The step, timed."""
        clock = clock_for("wall", self.device)
        seconds, _ = clock(lambda: optimizer.step(closure=optimizer_closure))
        self.seconds.append(seconds)


def main() -> None:
    """Print one line per mode and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="shipped shape, or YAML with a `model` key")
    parser.add_argument("--overlay", default=str(ROOT / "configs/models/llava-1.5-7b.yaml"), help="pruner and repair")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens averaged over the decoder layers' inputs")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one that is not")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = args.model
        if base.endswith(".yaml"):
            (Path(folder) / "config.json").write_text(json.dumps(yaml.safe_load(Path(base).read_text())["model"]))
            base = folder
        for mode in ("soft", "drop"):
            measure(base, mode, args)


def measure(base: str, mode: str, args: argparse.Namespace) -> None:
    """Train a few steps on one batch of random prompts at each batch size."""
    plugin = plugin_from_yaml(args.overlay)
    module = Measured(
        base, plugin.pruner, plugin.repair, args.keep, random_weights=True, dtype=args.dtype, train_mode=mode
    )
    cuda = torch.cuda.is_available()
    module.vlm.model.to("cuda" if cuda else "cpu")
    for size in args.batches:
        inputs = random_prompt(module.vlm, size, args.text_tokens).pixels
        labels = inputs["input_ids"].clone()
        labels[:, :-ANSWER] = -100
        batch = {"inputs": {**inputs, "labels": labels}, "ids": list(range(size))}
        module.seconds = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=args.steps + 1, enable_model_summary=False, accelerator="auto", devices=1, **quiet)
        trainer.fit(module, DataLoader([batch] * (args.steps + 1), batch_size=None))
        median = sorted(module.seconds[1:])[args.steps // 2]
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = torch.cuda.max_memory_allocated() if cuda else kib * 1024
        loss = float(trainer.callback_metrics["loss"])
        where = torch.cuda.get_device_name() if cuda else "CPU, resident memory of the process so far"
        print(f"{mode} batch {size}: {median:.3f} s a step, peak {peak / 1e9:.2f} GB ({where}), loss {loss:.3f}")


if __name__ == "__main__":
    main()
