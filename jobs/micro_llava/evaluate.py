"""Measure a micro-LLaVA: accuracy per skill with all tokens, without the image, and with few visual tokens.

`python -m jobs.micro_llava.evaluate --model DIR --questions 1400` prints the table of the model card and, with
`--json`, writes it. Tokens are dropped here by masking their columns from layer 1 on, with original positions; this
needs nothing of the rest of the project.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from jobs.micro_llava.batches import FIRST_PATCH, NONE, PREFIX, Batch, question_batch
from jobs.micro_llava.losses import asked_recall, attention_rows, read, see
from lit_prune.micro.model import PAD, VISUAL_TOKENS, WEIGHTS
from lit_prune.micro.world import GRID, PATCH_SIZE, SKILLS, TEST_SEED, Question

EVALUATION_SEED = TEST_SEED + 900_000  # a corner of the test range
SCHEDULE = {1: 8, 8: 7}  # 144 + 7 * 8 + 8 * 7 = 256 = 16 * 16: an average of 16 of 144 over 16 decoder layers
RANDOM_DRAWS = 3

Scores = Callable[[LlavaForConditionalGeneration, Batch, Tensor], Tensor]


def single_batches(questions: int, batch: int = 32, seed: int = EVALUATION_SEED) -> Iterator[Batch]:
    """Batches of single questions, every skill equally often, one of each skill an image."""
    images = -(-questions // len(SKILLS))
    for first in range(0, images, max(batch // len(SKILLS), 1)):
        seeds = range(seed + first, seed + min(first + max(batch // len(SKILLS), 1), images))
        yield split(question_batch(list(seeds), 1))


def split(packed: Batch) -> Batch:
    """The questions of a packed batch as sequences of their own, padded on the right."""
    rows = [
        (b, packed.segments[b] == number)
        for b, questions in enumerate(packed.questions)
        for number in range(1, len(questions) + 1)
    ]
    length = max(int(chosen.sum()) for _, chosen in rows)

    def take(values: Tensor, fill: int) -> Tensor:
        tails = [F.pad(values[b][chosen], (0, length - int(chosen.sum())), value=fill) for b, chosen in rows]
        return torch.stack([torch.cat([values[b, :PREFIX], tail]) for (b, _), tail in zip(rows, tails, strict=True)])

    ids = take(packed.input_ids, PAD)
    total = PREFIX + length
    segments = take(packed.segments, -1)
    mask = torch.ones(total, total, dtype=torch.bool).tril().expand(len(rows), 1, total, total)
    owner = torch.tensor([b for b, _ in rows])
    return Batch(
        pixels=packed.pixels[owner],
        patches={},
        input_ids=ids,
        positions=torch.arange(total).expand(len(rows), total),
        mask=mask,
        labels=take(packed.labels, NONE),
        segments=(segments > 0).long(),  # 1 on the question
        questions=[[question] for questions in packed.questions for question in questions],
    )


def asked_patches(question: Question) -> list[list[int]]:
    """Patches of each object asked about, those nearest to its box's centre first."""
    found = []
    for x0, y0, x1, y1 in question.boxes:
        centre = (x0 + x1) / 2, (y0 + y1) / 2
        inside = [
            row * GRID + column
            for row in range(y0 // PATCH_SIZE, (y1 - 1) // PATCH_SIZE + 1)
            for column in range(x0 // PATCH_SIZE, (x1 - 1) // PATCH_SIZE + 1)
        ]
        found.append(sorted(inside, key=lambda patch: _distance(patch, centre)))
    return found


def _distance(patch: int, point: tuple[float, float]) -> float:
    x, y = (patch % GRID + 0.5) * PATCH_SIZE, (patch // GRID + 0.5) * PATCH_SIZE
    return (x - point[0]) ** 2 + (y - point[1]) ** 2


# Scores of the rows of the table: float[questions, 144], higher is kept.


def oracle(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor) -> Tensor:
    """The patches of the objects asked about, turn by turn over the objects, nearest to the centre first."""
    scores = torch.zeros(visual.shape[:2])
    for row, (question,) in enumerate(batch.questions):
        for patches in asked_patches(question):
            for rank, patch in enumerate(patches):
                scores[row, patch] = VISUAL_TOKENS - rank
    return scores


def uniform(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor) -> Tensor:
    """Evenly spaced over the sequence, half a step from its ends."""
    steps = [(2 * i + 1) * VISUAL_TOKENS // (2 * SCHEDULE[1]) for i in range(SCHEDULE[1])]
    scores = torch.zeros(visual.shape[:2])
    scores[:, steps] = torch.linspace(2, 1, len(steps))
    return scores


def word_similarity(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor) -> Tensor:
    """Largest cosine between a visual token and the embedding of any word of the question."""
    embeddings = F.normalize(model.get_input_embeddings()(batch.input_ids[:, PREFIX:]), dim=-1)
    cosine = F.normalize(visual, dim=-1) @ embeddings.transpose(1, 2)
    return cosine.masked_fill(~_prompt(batch)[:, None], -2).amax(-1)


def attention(layer: int, last: bool = False) -> Scores:
    """Softmax attention of a layer from all question tokens (or the last prompt token), mean over the heads."""

    def scores(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor) -> Tensor:
        tap = {layer: None}
        with first_layers(model, layer + 1):
            read(model, batch, visual, tap)
        heads = tuple(range(model.config.text_config.num_attention_heads))
        rows = attention_rows(*tap[layer], batch.mask, heads).exp().mean(1)[:, PREFIX:, FIRST_PATCH:]
        prompt = _prompt(batch)
        if last:
            prompt = prompt & (prompt.long().cumsum(1) == prompt.sum(1, keepdim=True))
        return (rows * prompt[..., None]).sum(1) / prompt.sum(1)[:, None]

    return scores


@contextmanager
def first_layers(model: LlavaForConditionalGeneration, count: int) -> Iterator[None]:
    """Within this block the decoder runs its first `count` layers only."""
    decoder = model.model.language_model
    layers = decoder.layers
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers


def _prompt(batch: Batch) -> Tensor:
    """bool[questions, text]: the words behind the image, "ASSISTANT:" included, without the answer."""
    answers = (batch.labels != NONE).sum(1) - 1
    lengths = batch.segments[:, PREFIX:].sum(1) - answers
    return torch.arange(batch.segments.shape[1] - PREFIX) < lengths[:, None]


def random_scores(draw: int) -> Scores:
    """Uniform noise, another one for each draw and batch."""
    generator = torch.Generator().manual_seed(draw)
    return lambda model, batch, visual: torch.rand(visual.shape[:2], generator=generator)


ROWS: dict[str, Scores] = {
    **{f"random {draw}": random_scores(draw) for draw in range(RANDOM_DRAWS)},
    "uniform": uniform,
    "last-token attention, layer 0": attention(0, last=True),
    "all-question attention, layer 0": attention(0),
    "all-question attention, layer 1": attention(1),
    "word similarity": word_similarity,
    "oracle": oracle,
}


@contextmanager
def dropped(model: LlavaForConditionalGeneration, scores: Tensor) -> Iterator[None]:
    """Within this block, layers from 1 on do not see the columns of visual tokens that `SCHEDULE` drops."""
    order = scores.argsort(-1, descending=True)
    layers = model.model.language_model.layers
    handles = []
    for index in range(min(SCHEDULE), len(layers)):
        keep = SCHEDULE[max(first for first in SCHEDULE if first <= index)]
        columns = FIRST_PATCH + order[:, keep:]

        def hook(module, arguments, kwargs, columns=columns):
            mask = kwargs["attention_mask"]
            blocked = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool).scatter_(1, columns, True)
            smallest = torch.finfo(mask.dtype).min
            return arguments, kwargs | {"attention_mask": mask.masked_fill(blocked[:, None, None], smallest)}

        handles.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration, batch: Batch, scores: Scores | None = None, blank: bool = False
) -> tuple[Tensor, Tensor | None]:
    """bool[questions], and the scores that were used. A whole answer counts, as by greedy generation."""
    visual, _ = see(model, torch.zeros_like(batch.pixels) if blank else batch.pixels)
    if scores is None:
        hidden, found = read(model, batch, visual), None
    else:
        found = scores(model, batch, visual)
        with dropped(model, found):
            hidden = read(model, batch, visual)
    asked = batch.labels != NONE
    wrong = torch.zeros_like(asked)
    wrong[asked] = model.lm_head(hidden[asked]).argmax(-1) != batch.labels[asked]
    return ~wrong.any(1), found


def evaluate(model: LlavaForConditionalGeneration, questions: int, rows: list[str] | None = None) -> list[dict]:
    """One row for all tokens, one for the blank image, one for the majority answer, and one per way to choose tokens.

    Each row holds name, accuracy ("all" and per skill), and `recall`, the share of the patches asked about that were
    among the first stage's tokens.
    """
    batches = list(single_batches(questions))
    asked = [question for batch in batches for (question,) in batch.questions]
    todo: dict[str, tuple[Scores | None, bool]] = {"all tokens": (None, False), "blank image": (None, True)}
    todo |= {name: (scores, False) for name, scores in ROWS.items() if rows is None or name in rows}
    table = []
    for name, (scores, blank) in (bar := tqdm(todo.items(), "rows")):
        bar.set_postfix_str(name)
        right, recall = [], []
        for batch in batches:
            good, found = right_answers(model, batch, scores, blank)
            right += good.tolist()
            if found is not None:
                recall.append(asked_recall(found, oracle(model, batch, found[..., None]) > 0, SCHEDULE[1]))
        row = {"name": name, **_by_skill(asked, right)}
        table.append(row | ({"recall": sum(recall) / len(recall)} if recall else {}))
        if blank:
            table.append({"name": "majority answer", **majority(asked)})
    return table


def _by_skill(asked: list[Question], right: list[bool]) -> dict[str, float]:
    found = defaultdict(list)
    for question, good in zip(asked, right, strict=True):
        found[question.skill].append(good)
    return {"all": sum(right) / len(right)} | {skill: sum(found[skill]) / len(found[skill]) for skill in SKILLS}


def majority(asked: list[Question]) -> dict[str, float]:
    """Accuracy of always giving a skill's most frequent answer."""
    answers = {skill: Counter(q.answer for q in asked if q.skill == skill) for skill in SKILLS}
    hits = {skill: count.most_common(1)[0][1] for skill, count in answers.items()}
    return {"all": sum(hits.values()) / len(asked)} | {s: hits[s] / answers[s].total() for s in SKILLS}


def show(table: list[dict], console: Console) -> None:
    """Print the rows in percent; the draws of random are merged to their mean."""
    columns = ("all", *SKILLS, "recall")
    printed = Table("tokens", *columns)
    draws = [row for row in table if row["name"].startswith("random")]
    if draws:
        mean = {key: sum(row[key] for row in draws) / len(draws) for key in columns}
        table = [row for row in table if row not in draws] + [{"name": f"random, mean of {len(draws)}", **mean}]
    for row in table:
        printed.add_row(row["name"], *(f"{100 * row[key]:.1f}" if key in row else "" for key in columns))
    console.print(printed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure a micro-LLaVA on held-out questions.")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the model (default: the shipped one)")
    parser.add_argument("--questions", type=int, default=1400, help="how many, equally many of each skill")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="which ways to choose tokens (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    table = evaluate(model, options.questions, options.rows)
    show(table, Console(width=150))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
