"""Published methods against slow, literal re-statements of their formulas: plain loops in float64."""

import math

import pytest
import tiny
import torch
from tiny import VISUAL, WIDTH, batch, forward, samples
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.pruners.base import Context
from lit_prune.pruners.pyramiddrop import PyramidDrop

COUNTS = (9, 14, 5, 60)  # of 24, 19, 24 and 12 alive ones
TOKENS, WORDS = 24, 6


def context(**changes) -> Context:
    """Four samples with their own counts; some tokens are gone or filler, some words are filler."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator, dtype=torch.float64)

    alive = torch.ones(4, TOKENS, dtype=torch.bool)
    alive[1, ::5] = False
    alive[3, 12:] = False
    made = {
        "stage": 0,
        "visual": draw(TOKENS, WIDTH),
        "alive": alive,
        "ordinal": torch.arange(TOKENS).expand(4, -1),
        "text": draw(WORDS, WIDTH),
        "text_mask": torch.arange(WORDS) < torch.tensor([6, 4, 2, 1])[:, None],
        "visual_embeds": draw(TOKENS, WIDTH),
        "text_embeds": draw(WORDS, WIDTH),
        "attention": draw(TOKENS).softmax(-1),
        "count": torch.tensor(COUNTS),
        "total": torch.full((4,), TOKENS),
        "seed": torch.arange(4),
        "states": draw(TOKENS, WIDTH),
        "visual_keys": draw(TOKENS, 32),
        "text_keys": draw(WORDS, 32),
        "row_attention": draw(WORDS, TOKENS).softmax(-1),
    }
    return Context(**made | changes)


def alive_of(seen: Context, row: int) -> list[int]:
    return seen.alive[row].nonzero()[:, 0].tolist()


def words_of(seen: Context, row: int) -> list[int]:
    return seen.text_mask[row].nonzero()[:, 0].tolist()


def kept_by(pruner, seen: Context) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in pruner.prune(seen).keep]


def cosine(a: Tensor, b: Tensor) -> float:
    dot, aa, bb = (sum(x * y for x, y in zip(p.tolist(), q.tolist(), strict=True)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


# -- PyramidDrop ----------------------------------------------------------------------------------------------------


def test_pyramiddrop_reads_the_last_row_of_the_layer_that_it_cuts(tiny_eager, pruned):
    """Against the attention matrix of the plain model: first stage, by loops over heads and tokens."""
    inputs = batch(samples())
    _, record = forward(pruned(PyramidDrop([2, 4], [2.0, 1.0]), keep=20), inputs, repair=False)
    with torch.no_grad():
        heads = tiny_eager(**inputs, output_attentions=True).attentions[2].double()
    for row, ids in enumerate(inputs["input_ids"]):
        image = (ids == tiny.IMAGE).nonzero()[:, 0].tolist()
        score = [sum(heads[row, head, -1, column].item() for head in range(4)) / 4 for column in image]
        count = int(record.stages[0].kept[row].sum())
        best = sorted(range(VISUAL), key=lambda token: -score[token])[:count]
        assert set(record.stages[0].kept[row].nonzero()[:, 0].tolist()) == set(best)


def test_pyramiddrop_halves():
    """The paper's own counts where the budget is theirs: 576, 288, 144 and 72 tokens over eight layers each."""
    assert PyramidDrop().schedule(270, 576, 32) == {8: 288, 16: 144, 24: 72}


def test_pyramiddrop_below_its_first_segment():
    with pytest.raises(LitPruneError, match=r"at least 144\.8"):
        PyramidDrop().schedule(144, 576, 32)
