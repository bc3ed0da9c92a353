"""Can a learned scorer succeed? A small probe finds the patches asked about from the states that enter layer 1.

`python -m jobs.micro_llava.probe --model DIR` trains a bilinear score between the mean state of a question's words and
each visual token, supervised with the true patches, and prints how many of them are among its 8 best on held-out
scenes. It is a ceiling for pruners there, not a pruner: those get no such labels.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from jobs.micro_llava.batches import FIRST_PATCH, NONE, PREFIX, Batch, question_batch
from jobs.micro_llava.evaluate import EVALUATION_SEED, asked_patches, first_layers
from jobs.micro_llava.losses import asked_recall, read, see
from lit_prune.micro.model import VISUAL_TOKENS, WEIGHTS, WIDTH
from lit_prune.micro.world import TRAIN_SEED

PROBE_SEED = TRAIN_SEED + 900_000


class Probe(nn.Module):
    """score[q, v] = key(visual[v]) . query(mean words[q]) / 8 + bias(visual[v])"""

    def __init__(self, width: int = WIDTH, inner: int = 64):
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, inner))
        self.key = nn.Linear(width, inner)
        self.bias = nn.Linear(width, 1)

    def forward(self, visual: Tensor, words: Tensor) -> Tensor:
        """visual float[questions, 144, d], words float[questions, d] -> float[questions, 144]."""
        scores = torch.einsum("qvd,qd->qv", self.key(visual), self.query(words)) / 8
        return scores + self.bias(visual)[..., 0]


@torch.no_grad()
def states(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Normed states entering layer 1: visual tokens, mean of each question's words; and bool[questions, 144], asked."""
    kept = {}
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_pre_hook(lambda module, arguments: kept.update(hidden=arguments[0]))
    try:
        with first_layers(model, 2):
            read(model, batch, see(model, batch.pixels)[0])
    finally:
        handle.remove()
    hidden = layer.input_layernorm(kept["hidden"])
    visual, words, asked = [], [], []
    for b, questions in enumerate(batch.questions):
        for number, question in enumerate(questions, 1):
            if not question.boxes:
                continue
            own = batch.segments[b] == number
            prompt = own.sum() - (batch.labels[b][own] != NONE).sum() + 1
            visual.append(hidden[b, FIRST_PATCH:PREFIX])
            words.append(hidden[b][own][:prompt].mean(0))
            asked.append(torch.zeros(VISUAL_TOKENS, dtype=torch.bool))
            asked[-1][[patch for patches in asked_patches(question) for patch in patches]] = True
    return torch.stack(visual), torch.stack(words), torch.stack(asked)


def train(model: LlavaForConditionalGeneration, steps: int) -> Probe:
    """Fit a probe on fresh scenes, 8 a step."""
    torch.manual_seed(0)
    probe = Probe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in tqdm(range(steps), "probe"):
        batch = question_batch([PROBE_SEED + 8 * step + i for i in range(8)], 2)
        visual, words, asked = states(model, batch)
        share = asked / asked.sum(1, keepdim=True)
        loss = -(share * probe(visual, words).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a probe on the states entering layer 1 of a micro-LLaVA.")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the model (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=250, help="training steps of 8 scenes (default 250)")
    options = parser.parse_args(arguments)
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    probe = train(model, options.steps)
    visual, words, asked = states(model, question_batch([EVALUATION_SEED + i for i in range(32)], 2))
    tqdm.write(f"patches asked about among the 8 best: {100 * asked_recall(probe(visual, words), asked):.1f} %")


if __name__ == "__main__":
    main()
