"""A benchmark is added with three files: its reader, its rule, its configuration."""

import json
from pathlib import Path

import pytest
from tiny_benchmarks import of_skill, save, scenes

from lit_prune import cli
from lit_prune.data import benchmarks
from lit_prune.evaluation import scorers

READER = """
from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines
from lit_prune.evaluation.scorers.files import official, read_lines, take
from lit_prune.evaluation.scorers.rule import Question

class MadeUp(Benchmark):
    rule, source, splits = "madeup", "It is at https://example.org (CC0).", ("all",)

    def load(self, root, split=None, answers=()):
        path = official(root, ["madeup.jsonl"], self.source)
        questions = []
        for index, (place, record) in enumerate(read_lines(path)):
            image, text, answer = take(record, place, "image", "question", "answer")
            prompt = lines(text, SHORT)
            questions.append(Question(index, image, text, {"answer": answer}, index=index, prompt=prompt))
        return Labels(questions, [path])

BENCHMARK = MadeUp()
"""
RULE = """
from lit_prune.evaluation.scorers.rule import Rule, share

class Letters(Rule):
    title, headline = "Made up", "first letters"

    def judge(self, question, answer):
        return {"right": answer is not None and answer[:1] == question.reference["answer"][:1]}

    def figures(self, judged):
        return {"first letters": share([each["right"] for each in judged])}

RULE = Letters
"""
CONFIG = """
model: {max_new_tokens: 4}
data:
  class_path: lit_prune.data.BenchmarkData
  init_args: {benchmark: madeup}
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """The three files, where the package would have them."""
    found = []
    for package, name, text in ((benchmarks, "reader", READER), (scorers, "rule", RULE)):
        (tmp_path / name).mkdir()
        found.append(tmp_path / name / "madeup.py")
        found[-1].write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
    found.append(tmp_path / "madeup.yaml")
    found[-1].write_text(CONFIG)
    return found


def test_three_files_make_a_benchmark(files, tmp_path, capsys):
    """Listed, tested, predicted, scored; a missing file is named."""
    assert len(files) == 3
    assert "madeup" in benchmarks.names()
    words = ["-c", "micro.yaml", "-c", "pruners/divprune.yaml", "-c", str(files[2]), "--data.root", str(tmp_path)]
    words += [
        "--trainer.logger=false",
        "--trainer.callbacks=null",
        "--trainer.accelerator=cpu",
        "--model.keep=48",
        "--model.positions=original",
    ]
    words += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"]
    with pytest.raises(SystemExit):
        cli.main(["test", *words])
    assert f"{tmp_path / 'madeup.jsonl'}: no such file. It is at https://example.org" in capsys.readouterr().err
    lines = []
    for number, scene in enumerate(scenes()):
        save(scene, tmp_path / f"{number}.png")
        for question in of_skill(scene, "colour", "existence"):
            lines.append({"image": f"{number}.png", "question": question.text, "answer": question.answer})
    (tmp_path / "madeup.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for verb in ("test", "predict"):
        cli.main([verb, *words])
    (score,) = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert score["questions"] == 6
    out = str(tmp_path / "out.json")
    cli.main(["score", "madeup", "--answers", str(tmp_path / "run" / "madeup"), "--root", str(tmp_path), "--out", out])
    assert json.loads(Path(out).read_text())["figures"] == score["figures"]
    assert score["figures"]["first letters"] > 0
