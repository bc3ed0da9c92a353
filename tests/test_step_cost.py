"""The price of a training step against PyTorch's own counter, forward and backward."""

import pytest
import torch
from lightning import Callback
from tiny import trainer
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.training.logging import WORK, Work
from lit_prune.training.losses import Anneal, LossWeights

STILL = Anneal(target_share=0.0)  # the budget from the first step on
HEAD = 32  # channels of a head of micro-LLaVA; soft masks travel in 8 more, which are no part of the model


def forward_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    rows, heads, length, _ = query
    return 4 * rows * heads * length * key[2] * HEAD


def backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return 2 * forward_flops(query, key, value)


class Counted(Callback):
    """PyTorch's count of one whole step."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        fused = {
            aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
        }
        self.counter = FlopCounterMode(display=False, custom_mapping=fused)

    def on_train_batch_start(self, *_) -> None:
        self.counter.__enter__()

    def on_train_batch_end(self, *_) -> None:
        self.counter.__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [{}, {"backward": "kept"}, {"train_mode": "drop"}, {"contenders": 2.0}],
    ids=["soft", "kept", "drop", "contenders"],
)
def test_a_step_costs_what_it_runs(student, world, tmp_path, options):
    module, counted = student(anneal=STILL, **options), Counted()
    trainer(tmp_path, [counted], max_steps=1).fit(module, world(batch_size=1))
    found = dict(zip(WORK, module.work.totals.tolist(), strict=True))
    assert found["flops"] == pytest.approx(counted.counter.get_total_flops(), rel=0.02)
    assert found["samples"] == 1
    assert found["visual_tokens"] == 144
    assert found["kept_tokens"] == 16


def test_a_cheaper_step_counts_less(student, world, tmp_path):
    """Dropping against masking, on the same samples; both see as many tokens."""
    done = []
    for options in ({"train_mode": "drop"}, {}):
        module = student(anneal=STILL, **options)
        trainer(tmp_path, max_steps=2).fit(module, world())
        done.append(dict(zip(WORK, module.work.totals.tolist(), strict=True)))
    assert done[0]["flops"] < 0.6 * done[1]["flops"]
    assert {done[0][name] == done[1][name] for name in WORK[:-1]} == {True}


@pytest.mark.parametrize("options", [{}, {"loss": LossWeights(distill=1.0)}], ids=["early", "whole teacher"])
def test_steps_together_cost_what_they_cost_one_by_one(student, world, tmp_path, options, monkeypatch):
    ends = []
    for most in (1, 100):
        monkeypatch.setattr(Work, "MOST", most)
        module = student(**options)
        trainer(tmp_path, max_steps=3).fit(module, world())
        ends.append(module.work.totals)
    assert torch.equal(*ends)
    assert ends[0].gt(0).all()
