"""Pretraining of micro-LLaVA with 576 visual tokens from scratch, in five stages on two CPU cores.

`python -m jobs.micro_576.recipe --out DIR` writes a checkpoint every few minutes and continues from it when the same
command is run again, also after kill -9. Data is fresh at every step: there are no epochs.

Stages: the tower learns what patches show; the decoder learns to find the object that a question names with 4 layers,
all skills with 8, in two stages, and full scenes with 32. A model is deepened by layers that change nothing at first,
and scenes grow with it, because from answers alone a deep decoder takes long to find out that words name things in the
image.
"""

import argparse
import copy
import csv
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from jobs.micro_576.batches import Batch, question_batch, vision_batch
from jobs.micro_576.figures import word_auc
from jobs.micro_576.losses import PatchHeads, answer_loss, background_likeness, cloud_loss, read, see
from jobs.pretraining import NONE, learning_share, make_optimizers, prefetch
from lit_prune.files.writing import written_whole
from lit_prune.micro.model_576 import LAYERS, build, build_processor
from lit_prune.micro.questions_576 import SKILLS
from lit_prune.micro.scenes_576 import FULL_LEVEL, GATE_SEED, PRETRAIN_SEED

HELD_OUT_SEED = GATE_SEED + 500_000
STAGE_SEEDS = 1_000_000  # of each stage, from PRETRAIN_SEED
WEIGHTS = {"objects": 0.15, "ground": 0.15, "pixels": 0.15, "alike": 1.0, "long": 1.0, "words": 0.05}
LOOKUPS = {"colour": 3, "shape": 3, "pattern": 3, "existence": 2}  # questions an image that a decoder learns to find by


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining.

    Attributes:
        name: in the log. layers: of the decoder; more than before deepens it. levels: shares of the scenes' levels.
        steps: most steps. images: a step. muon, adam: learning rates.
        enough: running share of right answer tokens that ends the stage early; None runs all its steps.
        flat: share of the steps at the full learning rate; a cosine to 2 % follows.
        terms: weights of loss terms that differ from `WEIGHTS`.
        lookups: questions that name one object alone, instead of all skills.
        tower: share of the learning rates that the tower has. 0: it stays as it is; a decoder that can't use its tokens
            yet only disturbs them.
    """

    name: str
    layers: int
    levels: tuple[float, ...]
    steps: int
    images: int
    muon: float
    adam: float
    enough: float | None = None
    flat: float = 1.0
    terms: tuple[tuple[str, float], ...] = ()
    lookups: bool = False
    tower: float = 1.0

    @property
    def answers(self) -> bool:
        return self.name != "tower"


STAGES = (
    # The tower sees full scenes most of the time: they show more, and its labels need no decoder.
    Stage(
        "tower", 4, (0.1, 0.2, 0.7), 1200, 16, 1e-2, 3e-3, flat=0.7,
        terms=(("objects", 1.0), ("ground", 1.0), ("pixels", 1.0), ("words", 0.2)),
    ),
    # Learning rates of 5e-3 and more keep a decoder at "some colour of the scene": it never finds what a word names.
    Stage("find", 4, (0.0, 1.0, 0.0), 1200, 8, 3e-3, 2e-3, enough=0.85, lookups=True, tower=0.0),
    Stage("skills", 8, (0.0, 0.5, 0.5), 5700, 8, 3e-3, 2e-3, enough=0.92, tower=0.2),
    # With some scenes of one or two objects, from which places on the ground were learned at last.
    Stage("ground", 8, (0.15, 0.25, 0.6), 4100, 8, 2.5e-3, 1.7e-3, flat=0.6, tower=0.0),
    Stage("full", LAYERS, (0.0, 0.0, 1.0), 240, 8, 1e-3, 7e-4, flat=0.2, tower=0.0),
)  # fmt: skip
SMOKE = tuple(replace(stage, steps=2, images=2, enough=None) for stage in STAGES)


# Ranks: processes with a share of each batch; their gradients are averaged, so all hold the same weights.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def averaged(values: Tensor) -> Tensor:
    """The mean over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world()
    return values


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the ranks, as one tensor."""
    if not dist.is_initialized():
        return
    with_gradient = [p for p in parameters if p.grad is not None]  # the same ones on each rank
    flat = averaged(torch.cat([p.grad.flatten() for p in with_gradient]))
    for parameter, part in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


# Model


def deepen(model: LlavaForConditionalGeneration, layers: int) -> None:
    """Bring the decoder to so many layers, in place, without changing what it computes.

    After each layer comes a copy of it whose two output projections are zero, so that it adds nothing yet. Layers are
    doubled until there are enough.
    """
    decoder = model.model.language_model
    while (present := len(decoder.layers)) < layers:
        deeper = []
        for index, layer in enumerate(decoder.layers):
            deeper.append(layer)
            if index < layers - present:
                new = copy.deepcopy(layer, {id(decoder.config): decoder.config})  # the configuration stays one object
                nn.init.zeros_(new.self_attn.o_proj.weight)
                nn.init.zeros_(new.mlp.down_proj.weight)
                deeper.append(new)
        decoder.layers = nn.ModuleList(deeper)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    model.config.text_config.num_hidden_layers = decoder.config.num_hidden_layers = len(decoder.layers)


class Trainer:
    """Model, read-outs and optimizers of one run, and where it stands."""

    def __init__(self, out: Path, seed: int, stages: tuple[Stage, ...]):
        self.out, self.seed, self.stages = out, seed, stages
        self.model, _ = build(seed, stages[0].layers)
        torch.manual_seed(seed)
        self.heads = PatchHeads()
        self.model.train()
        self.stage, self.step, self.spent = 0, 0, 0.0
        self.mean: dict[str, float] = {}  # running means of the step's figures
        self.rows: list[dict] = []  # of the log
        self.optimizers: list[torch.optim.Optimizer] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.heads.parameters()]

    def enter(self) -> Stage:
        """The stage that the run stands in, with the model as deep as it asks for and, at its start, new optimizers."""
        stage = self.stages[self.stage]
        deepen(self.model, stage.layers)
        if self.step == 0 or not self.optimizers:
            self.optimizers = make_optimizers(self.model, self.heads, stage.muon, stage.adam, stage.tower)
        return stage

    def leave(self) -> None:
        """Go on to the next stage."""
        self.stage, self.step, self.mean, self.optimizers = self.stage + 1, 0, {}, []

    def update(self, loss: Tensor, share: float) -> None:
        """One optimizer step at `share` of the full learning rates."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * share
        loss.backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):  # else the step is left out, on all ranks alike
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint; a run that is killed meanwhile keeps the old one."""
        if rank():
            return
        state = {
            "model": self.model.state_dict(),
            "layers": len(self.model.model.language_model.layers),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stages": [stage.name for stage in self.stages],
            **{name: getattr(self, name) for name in ("stage", "step", "seed", "spent", "mean", "rows")},
        }
        with written_whole(self.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def load(self) -> None:
        """Continue from the checkpoint."""
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if state["seed"] != self.seed or state["stages"] != [stage.name for stage in self.stages]:
            raise ValueError(
                f"{self.out}/checkpoint.pt is of a run with seed {state['seed']}, stages {state['stages']}"
            )
        deepen(self.model, state["layers"])
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for name in ("stage", "step", "spent", "mean", "rows"):
            setattr(self, name, state[name])
        if state["optimizers"]:
            self.optimizers = make_optimizers(self.model, self.heads, 0.0, 0.0, self.stages[self.stage].tower)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)


# Steps


def make_batch(stage: Stage, number: int, step: int) -> Batch:
    """This rank's share of a step's batch: it depends on the stage's number, the step and the rank alone."""
    share = stage.images // world()
    first = PRETRAIN_SEED + number * STAGE_SEEDS + step * stage.images + rank() * share
    seeds = range(first, first + share)
    levels = [int(np.random.default_rng([seed, 3]).choice(len(stage.levels), p=stage.levels)) for seed in seeds]
    if not stage.answers:
        return vision_batch(seeds, levels)
    return question_batch(seeds, levels, LOOKUPS if stage.lookups else None)


@contextmanager
def half(enabled: bool) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        yield


def losses_of(trainer: Trainer, stage: Stage, batch: Batch, autocast: bool) -> tuple[dict[str, Tensor], dict]:
    """Loss terms of a step by name, and figures to log."""
    model = trainer.model
    with half(autocast):
        visual = see(model, batch.pixels, frozen=not stage.tower)
        hidden = read(model, batch, visual) if stage.answers else None
    terms, figures = trainer.heads(visual, batch.patches)
    terms |= cloud_loss(visual)
    terms["words"] = trainer.heads.presence(visual, model.get_input_embeddings().weight, batch.patches["names"])
    if hidden is not None:
        terms["ce"], figures["right"] = answer_loss(model, hidden, batch.labels)
    return terms, figures


def take_step(trainer: Trainer, stage: Stage, batch: Batch, autocast: bool) -> None:
    """Forward, backward, update; the running means are those of all ranks."""
    terms, figures = losses_of(trainer, stage, batch, autocast)
    weights = WEIGHTS | dict(stage.terms)
    trainer.update(
        sum(weights.get(name, 1.0) * term for name, term in terms.items()),
        learning_share(trainer.step, stage.steps, stage.flat),
    )
    now = {name: term.item() for name, term in terms.items()} | figures
    shared = averaged(torch.tensor(list(now.values()), dtype=torch.float64)).tolist()
    for name, value in zip(now, shared, strict=True):
        if math.isfinite(value):
            trainer.mean[name] = 0.95 * trainer.mean.get(name, value) + 0.05 * value


def faster_in_half(trainer: Trainer, stage: Stage, batch: Batch) -> bool:
    """True if bfloat16 autocast makes a step faster on this machine, by the better of two timed passes each."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for autocast in (False, True) * 3:
        began = time.process_time()
        terms, _ = losses_of(trainer, stage, batch, autocast)
        sum(terms.values()).backward()
        times[autocast].append(time.process_time() - began)
    for parameter in trainer.parameters:
        parameter.grad = None
    gain = averaged(torch.tensor(min(times[False][1:]) / min(times[True][1:]), dtype=torch.float64)).item()
    say(f"{stage.name}: a bfloat16 step takes {1 / gain:.2f} of a float32 one")
    return gain > 1.05


def train(trainer: Trainer, options: argparse.Namespace) -> None:
    """All stages from where the run stands."""
    held_out = [
        question_batch([HELD_OUT_SEED + 4 * i + j for j in range(4)], [FULL_LEVEL] * 4, 1)
        for i in range(rank(), options.held_out // 4, world())
    ]
    saved = time.monotonic()
    while trainer.stage < len(trainer.stages):
        stage, number = trainer.enter(), trainer.stage
        todo = range(trainer.step, stage.steps)
        if not todo:
            trainer.leave()
            continue
        autocast = {"fp32": False, "bf16": True}.get(options.precision)
        if autocast is None:
            autocast = faster_in_half(trainer, stage, make_batch(stage, number, trainer.step))
        batches = prefetch(lambda step, stage=stage, number=number: make_batch(stage, number, step), todo)
        bar = tqdm(batches, stage.name, total=stage.steps, initial=trainer.step, disable=rank() > 0, mininterval=5)
        for batch in bar:
            began = time.monotonic()
            take_step(trainer, stage, batch, autocast)
            trainer.spent += time.monotonic() - began
            bar.set_postfix({name: f"{value:.2f}" for name, value in trainer.mean.items()}, refresh=False)
            done = trainer.step >= stage.steps or (
                stage.enough is not None and trainer.step >= 100 and trainer.mean["right"] >= stage.enough
            )
            if trainer.step % options.validate_every == 0 or done:
                note(trainer, stage, validate(trainer.model, held_out, stage.answers))
            if time.monotonic() - saved > options.save_every and not done:
                trainer.save()
                saved = time.monotonic()
            if done:
                break
        batches.close()
        trainer.leave()
        trainer.save()
        saved = time.monotonic()


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, batches: list[Batch], answers: bool) -> dict[str, float]:
    """On held-out scenes: the share of whole answers that are right by skill, background likeness, AUC of words.

    Each token is predicted after the right ones before it; an answer that is right so is right by greedy generation.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        visual = see(model, batch.pixels)
        sums["background cosine"].append(background_likeness(visual, batch.patches["colour"] > 0))
        sums["word AUC"] += word_auc(model, visual, batch)
        if not answers:
            continue
        wrong = (model.lm_head(read(model, batch, visual)).argmax(-1) != batch.labels) & (batch.labels != NONE)
        for b, asked in enumerate(batch.questions):
            for number, question in enumerate(asked, 1):
                sums[question.skill].append(float(not wrong[b][batch.segments[b] == number].any()))
    names = ["background cosine", "word AUC", *(SKILLS if answers else ())]
    totals = torch.tensor([[sum(sums[name]), len(sums[name])] for name in names], dtype=torch.float64)
    averaged(totals)
    figures = {name: (total / max(count, 1e-9)).item() for name, (total, count) in zip(names, totals, strict=True)}
    if answers:
        figures["all"] = sum(figures[skill] for skill in SKILLS) / len(SKILLS)
    return figures


def note(trainer: Trainer, stage: Stage, figures: dict[str, float]) -> None:
    """Add a row to the log, which is written whole, and print it."""
    row = {"stage": stage.name, "step": trainer.step, "seconds": trainer.spent, **trainer.mean, **figures}
    trainer.rows.append(row)
    if rank():
        return
    columns = list(dict.fromkeys(name for each in trainer.rows for name in each))
    with written_whole(trainer.out / "log.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for each in trainer.rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in each.items()})
    say(f"{stage.name} {trainer.step}: " + " ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def say(text: str) -> None:
    if not rank():
        tqdm.write(text)


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the Hugging Face folder: weights rounded to bfloat16, a config that loads them as float32."""
    rounded = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.eval().save_pretrained(folder, state_dict=rounded)
    build_processor().save_pretrained(folder)


# Command


def work(number: int, options: argparse.Namespace) -> None:
    """One rank's run."""
    torch.set_num_threads(options.threads)
    if options.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{options.meeting}", rank=number, world_size=options.processes
        )
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.out, options.seed, options.stages)
    if (options.out / "checkpoint.pt").exists():
        trainer.load()
        say(f"continues with stage {trainer.stage}, step {trainer.step}, after {trainer.spent / 3600:.2f} h")
    train(trainer, options)
    if not rank():
        export(trainer.model, options.out / "model")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain micro-LLaVA with 576 visual tokens; run again to continue.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--steps", type=float, default=1.0, help="multiplies the steps of all stages (default 1)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"decoder layers, 24 to 32 (default {LAYERS})")
    parser.add_argument("--processes", type=int, default=2, help="processes that share each batch (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: the faster one")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints (default 240)")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations (default 100)")
    parser.add_argument("--held-out", type=int, default=40, help="scenes to validate on (default 40)")
    parser.add_argument("--smoke", action="store_true", help="two steps of two images a stage: does it run?")
    options = parser.parse_args(arguments)
    stages = SMOKE if options.smoke else STAGES
    options.stages = tuple(
        replace(each, steps=max(1, round(each.steps * options.steps)), layers=min(each.layers, options.layers))
        for each in stages
    )
    for stage in options.stages:
        if stage.images % options.processes:
            parser.error(f"--processes {options.processes} doesn't divide the {stage.images} images of a step")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.processes == 1:
        return work(0, options)
    options.out.mkdir(parents=True, exist_ok=True)
    options.meeting = (options.out / f".meeting.{os.getpid()}").absolute()
    for left in options.out.glob(".meeting.*"):  # by a run that was killed
        left.unlink()
    try:
        torch.multiprocessing.spawn(work, (options,), nprocs=options.processes)
    finally:
        options.meeting.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
