"""Answers of `predict` to benchmarks: kept as they come, taken up after a kill, joined from all ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tiny import ROOT, trainer

from lit_prune import cli
from lit_prune.callbacks import WriteSubmissions
from lit_prune.data import BenchmarkData
from lit_prune.pruners.divprune import DivPrune
from lit_prune.training.module import PruneModule

POPE = 27  # questions of the tiny copy


class Asked(Callback):
    """Notes which questions a prediction asks."""

    def __init__(self) -> None:
        self.ids: list[tuple[str, Any]] = []

    def on_predict_batch_end(self, trainer, module, outputs, batch, *args) -> None:
        places = (trainer.datamodule.questions.place(record)[1] for record in batch["records"])
        self.ids += [(question.group, question.id) for question in places]


def predict(module: PruneModule, data: Any, folder: Path, **options: Any) -> list[tuple[str, Any]]:
    """Run it; the questions that were asked."""
    asked = Asked()
    trainer(folder, [asked, WriteSubmissions()], **options).predict(module, data)
    return asked.ids


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pruned_micro, official, tmp_path_factory) -> Path:
    """POPE in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert len(predict(pruned_micro, BenchmarkData("micro", "pope", str(official), eval_batch_size=5), folder)) == POPE
    return folder / "pope"


def test_a_killed_run_goes_on_where_it_was(pruned_micro, benchmarks, official, whole, tmp_path):
    """SIGKILL between two batches, and a line that was cut in the middle: nothing else is asked once more."""
    start = [sys.executable, str(Path(__file__).with_name("killed_prediction.py")), str(official), str(tmp_path), "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(start, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert answers(tmp_path / "pope") == answers(whole)[:10]
    file = tmp_path / "pope" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    asked = predict(pruned_micro, benchmarks("pope"), tmp_path)
    assert len(asked) == POPE - 9
    assert file.read_text() == (whole / "answers.jsonl").read_text()
    assert sorted(path.name for path in file.parent.iterdir()) == ["answers.jsonl", "made_by.json"]


def test_a_finished_run_asks_nothing(pruned_micro, benchmarks, whole, tmp_path, caplog):
    assert len(predict(pruned_micro, benchmarks("seedbench"), tmp_path)) == 4
    submission = tmp_path / "seedbench" / "submission.jsonl"
    before = submission.read_text()
    submission.unlink()  # as if it had been killed just before
    with caplog.at_level("INFO"):
        assert predict(pruned_micro, benchmarks("seedbench"), tmp_path) == []
    assert submission.read_text() == before
    assert "4 of 4 questions are answered already" in caplog.text


def test_the_rest_of_several_benchmarks(pruned_micro, benchmarks, whole, tmp_path, caplog):
    """What one of them has is kept, also from a run on it alone; batches may have another size."""
    predict(pruned_micro, benchmarks("pope", eval_batch_size=2), tmp_path, limit_predict_batches=4)
    with caplog.at_level("INFO"):
        asked = predict(pruned_micro, benchmarks(["gqa", "pope"]), tmp_path, limit_predict_batches=2)
    assert "pope: 12 of 27 questions are answered" in caplog.text
    assert "run the same command once more for the others" in caplog.text
    assert len(asked) == 10
    assert len(predict(pruned_micro, benchmarks(["gqa", "pope"]), tmp_path)) == POPE + 6 - 18
    assert answers(tmp_path / "pope") == answers(whole)


def test_ranks_files_are_joined_whatever_their_number(pruned_micro, benchmarks, whole, tmp_path):
    predict(pruned_micro, benchmarks("pope"), tmp_path, limit_predict_batches=1)
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pope" / "answers.rank2.jsonl").write_text("".join(lines[7:20:2]) + lines[21][:9])
    (tmp_path / "pope" / "answers.rank1.jsonl").write_text("".join(lines[3:8]))  # some of them twice
    asked = predict(pruned_micro, benchmarks("pope"), tmp_path)
    assert len(asked) == POPE - len({*range(5), *range(7, 20, 2), *range(3, 8)})
    assert answers(tmp_path / "pope") == answers(whole)
    assert not list((tmp_path / "pope").glob("*.rank*"))


def test_answers_of_another_origin_are_left_alone(benchmarks, pruned_micro, tmp_path):
    """Another budget, longest answer, prompt: each has a folder of its own; the first one's run goes on in its own."""
    base, others = benchmarks("gqa"), {"keep": 32, "max_new_tokens": 3}
    predict(pruned_micro, base, tmp_path, limit_predict_batches=1)
    kept = answers(tmp_path / "gqa")
    for number, (name, value) in enumerate(others.items(), 2):
        module = PruneModule("micro", DivPrune(), **{"keep": 48, "max_new_tokens": 4, name: value})
        assert len(predict(module, base, tmp_path)) == 6
        assert len(answers(tmp_path / f"gqa_{number}")) == 6
    assert len(predict(pruned_micro, benchmarks("gqa", system="A chat."), tmp_path)) == 6
    assert len(answers(tmp_path / "gqa_4")) == 6
    assert answers(tmp_path / "gqa") == kept
    assert len(predict(pruned_micro, benchmarks("gqa"), tmp_path)) == 1


def test_trained_weights_tell_answers_apart(student, benchmarks, official, tmp_path):
    module = student()
    predict(module, benchmarks("gqa"), tmp_path)
    with torch.no_grad():
        next(module.plugin.parameters()).add_(1)
    assert len(predict(module, benchmarks("gqa"), tmp_path)) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"gqa", "gqa_2"}


def test_runs_for_debugging_write_nothing(pruned_micro, benchmarks, tmp_path):
    assert predict(pruned_micro, benchmarks("gqa"), tmp_path, fast_dev_run=1)
    assert not list(tmp_path.glob("gqa*"))


@pytest.mark.slow  # tests/test_strategies.py has two processes that predict
@pytest.mark.timeout(600)
def test_two_processes_answer_and_score_as_one(official, tmp_path):
    """A run of two ranks that stops early is finished by one; the scores of two are those of one."""
    words = [
        "-c", "micro.yaml", "-c", "pruners/divprune.yaml", "-c", "benchmarks/gqa.yaml", "--data.root", str(official),
    ]  # fmt: skip
    words += ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.accelerator=cpu", "--model.keep=48"]
    words += ["--data.eval_batch_size=2", "--model.max_new_tokens=4", "--trainer.enable_progress_bar=false"]
    two, one = ([*words, f"--trainer.default_root_dir={tmp_path / name}"] for name in ("two", "one"))
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    lines = [["predict", *two, *ranks, "--trainer.limit_predict_batches=1"], ["test", *two, *ranks]]
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(ROOT / "tests" / "pair.py"), str(tmp_path / "lines.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert len(answers(tmp_path / "two" / "gqa")) == 4
    cli.main(["predict", *two])
    for verb in ("predict", "test"):
        cli.main([verb, *one])
    assert answers(tmp_path / "two" / "gqa") == answers(tmp_path / "one" / "gqa")
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("two", "one")]
    assert scores[0] == scores[1]
    assert scores[0][0]["questions"] == 6
