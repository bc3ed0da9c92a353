"""The table that `test` and `validate` print."""

import re

import pytest
from rich.console import Console
from tiny import trainer

from lit_prune.callbacks import PrintResults
from lit_prune.callbacks.results import as_table


def printed(figures: dict[str, float], width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(as_table("test", figures))
    return captured.get()


def test_figures_are_grouped_and_rounded():
    figures = {"accuracy/all": 0.98333, "accuracy/colour": 1.0, "accuracy/counting": 0.8833, "agreement": 0.98451}
    figures |= {f"kept/layer_{i}": float(n) for i, n in enumerate([144, 15, 15, 6, 4, 4])}
    figures |= {f"w2/layer_{i}": float(i) for i in (0, 2, 10, 1)} | {"visual_tokens": 16.0, "kappa": 0.74770802}
    figures |= {"flops": 167730480.0, "kv_bytes": 433005.71875, "mine": 1 / 3}
    lines = [re.sub(" {2,}", " | ", line.strip()) for line in printed(figures).splitlines() if line.strip()]
    assert lines == [
        "test", "accuracy, % | 98.3", "by skill | colour 100.0, counting 88.3", "as the full model, % | 98.5",
        "visual tokens a layer | 16.0 (144, 15 x2, 6, 4 x2)", "decoder's prefill | 168 MFLOP", "KV cache | 433 kB",
        "shift W2 | 3.25 on average, 10.00 at most (after layer 3)", "kappa | 0.748", "mine | 0.3333",
    ]  # fmt: skip


def test_many_skills_fit_the_width():
    text = printed({"accuracy/all": 0.5, **{f"accuracy/skill_{i}": 0.5 for i in range(40)}})
    assert max(map(len, text.splitlines())) <= 80
    assert "skill_39 50.0" in re.sub(r"\s+", " ", text)


def test_what_has_no_price_is_left_out():
    assert "prefill" not in printed({"accuracy/all": 0.5})


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_run_prints_them(student, world, tmp_path, capsys, verb):
    run = trainer(tmp_path, [PrintResults()], limit_val_batches=1)
    getattr(run, verb)(student(), world(), verbose=False)
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == verb
    assert "visual tokens a layer   16.0 (144, 15 x4" in out
    assert "layer_" not in out
    assert "/all" not in out


def test_fit_prints_no_table(student, world, tmp_path, capsys):
    run = trainer(tmp_path, [PrintResults()], max_steps=1, limit_val_batches=1, val_check_interval=1)
    run.fit(student(), world())
    assert "visual tokens a layer" not in capsys.readouterr().out
