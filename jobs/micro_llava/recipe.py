"""Pretraining of micro-LLaVA from scratch: first the vision tower alone, then everything end to end.

`python -m jobs.micro_llava.recipe --out DIR` writes a checkpoint that `--resume` continues, a log (CSV), and the
model's folder. Data is fresh at every step, so there are no epochs. Fast on CPU by three means: Muon on the hidden
matrices, about 16 questions an image behind one shared prefix, and showing late layers where to look.
"""

import argparse
import csv
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from jobs.micro_llava.batches import NONE, Batch, prefetch, question_batch, vision_batch
from jobs.micro_llava.losses import (
    SUPERVISED_LAYERS,
    PatchHeads,
    answer_loss,
    grounding_loss,
    read,
    see,
    word_leak,
)
from jobs.pretraining import learning_share, make_optimizers
from lit_prune.files.writing import written_whole
from lit_prune.micro.model import build
from lit_prune.micro.world import PRETRAIN_SEED, SKILLS, VALIDATION_SEED

VISION_IMAGES, IMAGES = 16, 8
VALIDATION_EVERY, VALIDATION_IMAGES = 50, 24
VISION_OFFSET = 500_000  # the first stage draws its seeds from the second half of the pretraining range
WEIGHTS = {"patch": 0.15, "words": 0.3, "phrases": 0.3, "phrases+": 0.3, "count": 0.3, "answer": 0.3, "leak": 1.0}
# While the learning rate falls: equal shares must be exact to tell one object from two, and digits are small.
LATE, LATE_WEIGHTS = 0.62, WEIGHTS | {"count": 1.0, "patch": 0.3}


class Trainer:
    """Model, read-outs and optimizers of one run, and where it stands."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed = out, seed
        self.model, self.processor = build(seed)
        torch.manual_seed(seed)
        self.heads = PatchHeads()
        self.stage, self.step = "vision", 0
        self.spent = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []

    def start(self, stage: str, muon: float, adam: float) -> None:
        """Begin a stage with fresh optimizers."""
        if self.stage != stage or not self.optimizers:
            self.step = 0 if self.stage != stage else self.step
            self.stage = stage
            self.optimizers = make_optimizers(self.model, self.heads, muon, adam)

    def update(self, loss: Tensor, share: float) -> None:
        """One optimizer step at `share` of the full learning rates."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * share
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint; a run that is killed meanwhile keeps the old one."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stage": self.stage,
            "step": self.step,
            "seed": self.seed,
            "spent": self.spent,
        }
        with written_whole(self.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def load(self) -> None:
        """Continue from the checkpoint."""
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(f"{self.out}/checkpoint.pt was made with seed {state['seed']}, not {self.seed}")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step, self.spent = state["stage"], state["step"], state["spent"]
        self.optimizers = make_optimizers(self.model, self.heads, 0.0, 0.0)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train_vision(trainer: Trainer, steps: int, save_every: float) -> None:
    """Stage 1: the vision tower and the projector learn what each patch shows."""
    trainer.start("vision", muon=1e-2, adam=3e-3)
    saved = time.monotonic()
    todo = range(trainer.step, steps)
    batches = prefetch(vision_batch, PRETRAIN_SEED + VISION_OFFSET, VISION_IMAGES, todo)
    for batch in (bar := tqdm(batches, "vision", total=steps, initial=trainer.step)):
        began = time.monotonic()
        loss, accuracy = trainer.heads(*see(trainer.model, batch.pixels), batch.patches)
        trainer.update(loss, learning_share(trainer.step, steps))
        trainer.spent += time.monotonic() - began
        if trainer.step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", **{name: f"{value:.2f}" for name, value in accuracy.items()})
        if time.monotonic() - saved > save_every:
            trainer.save()
            saved = time.monotonic()
    trainer.save()


def losses_of(trainer: Trainer, batch: Batch) -> tuple[dict[str, Tensor], float]:
    """Loss terms of one end-to-end step by name, and the share of right answer tokens."""
    model = trainer.model
    visual, pooled = see(model, batch.pixels)
    tap = dict.fromkeys(SUPERVISED_LAYERS)
    hidden = read(model, batch, visual, tap)
    answer, right = answer_loss(model, hidden, batch.labels)
    terms = grounding_loss(batch, tap)
    terms["patch"], _ = trainer.heads(visual, pooled, batch.patches)
    terms["leak"] = word_leak(visual, model.get_input_embeddings().weight, batch.patches)
    return {"ce": answer, **terms}, right.float().mean().item()


def train_end_to_end(trainer: Trainer, steps: int, save_every: float) -> None:
    """Stage 2: answers, with patch labels, late attention grounding and the word leak beside them."""
    trainer.start("end-to-end", muon=5e-3, adam=3e-3)
    held_out = question_batch([VALIDATION_SEED + 500_000 + i for i in range(VALIDATION_IMAGES)])
    saved = time.monotonic()
    batches = prefetch(question_batch, PRETRAIN_SEED, IMAGES, range(trainer.step, steps))
    mean: dict[str, float] = {}
    for batch in (bar := tqdm(batches, "end to end", total=steps, initial=trainer.step)):
        began = time.monotonic()
        terms, right = losses_of(trainer, batch)
        weights = WEIGHTS if trainer.step < LATE * steps else LATE_WEIGHTS
        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        trainer.update(loss, learning_share(trainer.step, steps))
        trainer.spent += time.monotonic() - began
        now = {name: term.item() for name, term in terms.items()} | {"right": right}
        mean = {name: 0.9 * mean.get(name, value) + 0.1 * value for name, value in now.items()}
        bar.set_postfix({name: f"{value:.2f}" for name, value in mean.items()})
        if trainer.step % VALIDATION_EVERY == 0:
            skills = validate(trainer.model, held_out)
            tqdm.write(f"{trainer.step}: " + " ".join(f"{name} {value:.2f}" for name, value in skills.items()))
            log(trainer.out / "log.csv", {"step": trainer.step, "seconds": trainer.spent, **mean, **skills})
        if time.monotonic() - saved > save_every:
            trainer.save()
            saved = time.monotonic()
    trainer.save()


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, batch: Batch) -> dict[str, float]:
    """Share of questions whose whole answer is right, overall ("all") and by skill.

    Each token is predicted behind the right ones before it; an answer that is right so is right by greedy generation.
    """
    hidden = read(model, batch, see(model, batch.pixels)[0])
    wrong = (model.lm_head(hidden).argmax(-1) != batch.labels) & (batch.labels != NONE)
    right = defaultdict(list)
    for b, questions in enumerate(batch.questions):
        for number, question in enumerate(questions, 1):
            right[question.skill].append(not wrong[b][batch.segments[b] == number].any())
    every = [one for found in right.values() for one in found]
    return {"all": sum(every) / len(every)} | {s: sum(right[s]) / len(right[s]) for s in SKILLS if right[s]}


def log(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" for name, value in row.items()})


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the Hugging Face folder: weights rounded to bfloat16, a config that loads them as float32."""
    rounded = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=rounded)
    processor.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain micro-LLaVA from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--steps-vision", type=int, default=700, help="steps of 16 images, vision alone (default 700)")
    parser.add_argument("--steps", type=int, default=1400, help="end-to-end steps of 8 images (default 1400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints (default 120)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.out, options.seed)
    if options.resume and (options.out / "checkpoint.pt").exists():
        trainer.load()
    if trainer.stage == "vision":
        train_vision(trainer, options.steps_vision, options.save_every)
    train_end_to_end(trainer, options.steps, options.save_every)
    export(trainer.model, trainer.processor, options.out / "model")


if __name__ == "__main__":
    main()
