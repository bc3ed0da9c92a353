"""Time, FLOPs and peak memory of a training step of RCP with repair, at a model's real shape with random weights.

python jobs/train_speed.py --variants soft contenders drop          # LLaVA-1.5-7B in bfloat16 on a GPU: 576 + 64 tokens
python jobs/train_speed.py --model configs/bench/cpu.yaml --overlay configs/bench/pruners/rcp.yaml --keep 144 \
    --dtype float32 --batch 2 --clock cpu                           # every variant on one CPU thread, a mid-size model

`naive` is what one would write first: two models, each with its own pass over the images and all decoder layers, the
soft mask as a float mask of seq x seq, logits of all positions. Its losses have to equal those of `soft`. `apart` is
`soft` with teacher and student from end to end. `kept`: gradients through the rows of kept tokens alone; `cached`: so,
with the teacher's answers from a cache, so that of the teacher only the images are encoded.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import yaml
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_prune.evaluation.timing import clock_for, peak_bytes
from lit_prune.evaluation.timing.prompts import random_prompt
from lit_prune.host import Record, Session
from lit_prune.host.attention import REQUEST
from lit_prune.training.losses import Anneal
from lit_prune.training.module import PruneModule
from lit_prune.training.step import Teaching
from lit_prune.vlm import plugin_from_yaml

ATEN = torch.ops.aten
FUSED = {  # attention on a CPU, which PyTorch's counter doesn't know
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
ROOT = Path(__file__).parents[1]
ANSWER = 16  # last tokens of each prompt, which are labelled


class Measured(PruneModule):
    """Hands every whole step to `meter`: forward of teacher and student, backward, optimizer."""

    meter: Callable | None = None

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
        """The step, measured."""
        self.result = self.meter(lambda: optimizer.step(closure=optimizer_closure))

    @property
    def held(self) -> int:
        """Bytes of all weights."""
        return sum(x.numel() * x.element_size() for x in (*self.parameters(), *self.buffers()))


class FromEndToEnd(Teaching):
    """Nothing that teacher and student share, and nothing left out."""

    def sessions(self, ranks: int) -> tuple[Session, Session]:
        """Each over all layers."""
        return tuple(replace(session, prefix=None, stop=None) for session in super().sessions(ranks))


class Apart(Measured):
    """Teacher and student from end to end, one after the other."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.teaching = FromEndToEnd(**vars(self.teaching))


class Naive(Measured):
    """A second model as the teacher, a float mask of seq x seq, logits of all positions."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        teacher = copy.deepcopy(self.vlm.model)
        for module in teacher.modules():  # the copy took the host's hooks along
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.teacher, self.states = [teacher], {}  # in a list: not among this module's own
        for layer in self.host.feeds:
            keep = partial(self._keep, layer)
            teacher.get_decoder().layers[layer].register_forward_hook(keep)
        AttentionInterface.register("square", SquareMask())
        AttentionMaskInterface.register("square", sdpa_mask)
        self.model.config.text_config._attn_implementation = "square"

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The same losses, the long way."""
        key, inputs, teaching = self.step_key(), batch["inputs"], self.teaching
        torch.manual_seed(key.seed)
        self.plugin.pruner.anneal(teaching.anneal.tau(key.done), teaching.anneal.noise_scale(key.done))
        self.plugin.pruner.relax(teaching.anneal.surplus(key.done))
        with torch.no_grad():
            target = self.teacher[0].to(self.device)(**inputs, use_cache=False)
        student = Record(keep_hidden=frozenset(self.host.feeds))
        with self.vlm.using(Session(soft=True, record=student)):
            output = self.model(**inputs, use_cache=False)
        answers = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
        teacher = Record(hidden={layer: states[answers] for layer, states in self.states.items()})
        student.targets = inputs["labels"][:, 1:][answers[:, :-1]]
        logits = output.logits[answers], target.logits[answers]
        losses = teaching.losses(*logits, student, teacher, key.done)
        losses["task"] = output.loss
        total = sum(getattr(teaching.loss, name) * value for name, value in losses.items())
        self.log_dict({"loss/total": total, **{f"loss/{name}": value for name, value in losses.items()}})
        return total

    def _keep(self, layer: int, module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        self.states[layer] = output

    @property
    def held(self) -> int:
        """Bytes of both models."""
        return super().held + sum(x.numel() * x.element_size() for x in self.teacher[0].parameters())


class SquareMask:
    """Attention with the bias per key as a float mask (batch, 1, seq, seq), made once per stage."""

    lit_prune = True  # takes the host's requests, as the functions that it wraps

    def __init__(self) -> None:
        self.of, self.mask = None, None

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        """sdpa with that mask."""
        request = kwargs.pop(REQUEST, None)
        if request is not None and request.key_bias is not None:
            if self.of is not request.key_bias:
                length = query.shape[2]
                future = torch.full((length, length), float("-inf"), device=query.device).triu(1)
                self.of, self.mask = request.key_bias, (future + request.key_bias[:, None, None]).to(query.dtype)
            attention_mask = self.mask
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


class Batches(LightningDataModule):
    """One batch, whose samples have names."""

    def __init__(self, inputs: dict[str, Tensor], samples: int) -> None:
        super().__init__()
        names = list(map(str, range(samples)))
        self.batch, self.digests = {"inputs": inputs, "ids": names, "digests": names}, False

    def train_dataloader(self) -> DataLoader:
        """That batch."""
        return DataLoader([self.batch], batch_size=None)


VARIANTS = {
    "naive": (Naive, {}),
    "apart": (Apart, {}),
    "soft": (Measured, {}),
    "kept": (Measured, {"backward": "kept"}),
    "cached": (Measured, {"backward": "kept", "teacher_cache": "cache"}),
    "checkpointed": (Measured, {"checkpoint_activations": True}),
    "contenders": (Measured, {"contenders": 2.0}),
    "drop": (Measured, {"train_mode": "drop"}),
}


def main() -> None:
    """Measure in turn, round by round; print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="shipped shape, or YAML with a `model` key")
    parser.add_argument("--overlay", default=str(ROOT / "configs/models/llava-1.5-7b.yaml"), help="pruner and repair")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens averaged over the decoder layers' inputs")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant, after two that are not")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time of this thread alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.clock == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = args.model
        if base.endswith(".yaml"):
            (Path(folder) / "config.json").write_text(json.dumps(yaml.safe_load(Path(base).read_text())["model"]))
            base = folder
        modules = {name: build(name, base, folder, args) for name in args.variants}
        rows = {name: {"held": module.held, "losses": None, "seconds": []} for name, module in modules.items()}
        for turn in range(-1, args.rounds + 1):
            for name, module in modules.items():
                measure(module, rows[name], turn, args)
            if turn > 0:
                report(rows, args)


def build(name: str, base: str, folder: str, args: argparse.Namespace) -> Measured:
    """One variant; all begin with the same weights."""
    kind, options = VARIANTS[name]
    plugin = plugin_from_yaml(args.overlay)
    options = {"anneal": Anneal(target_share=0.0), **options}  # the budget's counts from the first step on
    if "teacher_cache" in options:
        options["teacher_cache"] = f"{folder}/{options['teacher_cache']}"
    module = kind(base, plugin.pruner, plugin.repair, args.keep, random_weights=True, dtype=args.dtype, **options)
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def measure(module: Measured, row: dict, turn: int, args: argparse.Namespace) -> None:
    """One step of one variant: its FLOPs in turn -1, its memory in turn 0, then its seconds."""
    inputs = random_prompt(module.vlm, args.batch, args.text_tokens).pixels
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    data = Batches({**inputs, "labels": labels}, args.batch)
    clock = clock_for(args.clock, module.vlm.model.device)
    meters = {-1: flops, 0: lambda work: peak_bytes(work, module.vlm.model.device)}
    module.meter = meters.get(turn, clock)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    for _ in range(1 + (turn < 0 and module.teaching.cache is not None)):  # the first time fills the cache
        trainer = Trainer(max_steps=1, enable_model_summary=False, accelerator="auto", devices=1, **quiet)
        trainer.fit(module, data)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("loss/")}
        row["losses"] = row["losses"] or found  # before any weight has moved
    if turn > 0:
        row["seconds"].append(module.result[0])
    else:
        row["peak" if turn == 0 else "flops"] = module.result


def flops(work: Callable) -> int:
    """FLOPs of a step by PyTorch's counter, which keeps tensors alive: not to be measured beside memory."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        work()
    return counter.get_total_flops()


def report(rows: dict, args: argparse.Namespace) -> None:
    """A table of the rounds so far, and whether the naive form computes what `soft` does."""
    heads = f"{'s/step':>8}{'faster':>8}{'TFLOP':>8}{'fewer':>8}{'weights GB':>12}{'peak GB':>9}{'both':>7}{'share':>7}"
    print(f"{'variant':14}{heads}")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        row["median"] = median(row["seconds"])
        both = row["held"] + row["peak"]
        share = both / (first["held"] + first["peak"])
        faster = median(first["seconds"]) / row["median"]
        print(
            f"{name:14}{row['median']:8.3f}{faster:7.2f}x"
            f"{row['flops'] / 1e12:8.3f}{first['flops'] / row['flops']:7.2f}x"
            f"{row['held'] / 1e9:12.3f}{row['peak'] / 1e9:9.3f}{both / 1e9:7.3f}{share:7.2f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))
    if {"naive", "soft"} <= set(rows):
        for name, value in rows["soft"]["losses"].items():
            other = rows["naive"]["losses"][name]
            print(f"{name}: naive {other:.7g}, soft {value:.7g}")
            if abs(other - value) > 1e-4 * abs(value):
                raise SystemExit(f"{name} differs")


if __name__ == "__main__":
    main()
