"""lmms-eval with its own command, in an environment that has it: jobs/lmms_eval.sh makes one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT

from lit_prune.vlm import VLM, load

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed here"),
]

TASK = """
task: micro_local
dataset_path: {folder}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.judged
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def judged(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].lower())}
"""
QUESTIONS = 84  # of 12 pictures


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A local task of micro pictures, as `--include_path` takes it."""
    import datasets

    folder = tmp_path_factory.mktemp("task")
    subprocess.run([sys.executable, "-m", "lit_prune", "sample", "--out", folder / "s", "--count", "12"], check=True)
    records = json.loads((folder / "s" / "questions.json").read_text())
    turns = [[turn["value"].removeprefix("<image>").strip() for turn in each["conversations"]] for each in records]
    columns = {
        "image": [str(folder / "s" / each["image"]) for each in records],
        "question": [asked for asked, _ in turns],
        "answer": [answer for _, answer in turns],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    assert len(rows) == QUESTIONS
    datasets.DatasetDict({"test": rows}).save_to_disk(folder / "data")
    (folder / "micro_local.yaml").write_text(TASK.format(folder=folder / "data"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("micro")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """A plug-in folder."""
    folder = tmp_path_factory.mktemp("plugin") / "divprune"
    load("micro").attach("divprune", keep=16).save_pretrained(folder)
    return folder


def lmms_eval(task: Path, out: Path, arguments: str, batch: int | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "lit_prune", "--model_args", arguments]
    command += ["--tasks", "micro_local", "--include_path", task, "--batch_size", str(batch), "--log_samples"]
    command += ["--output_path", out, "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env={**os.environ, **offline}, cwd=out.parent, capture_output=True, text=True)


def answers(task: Path, out: Path, arguments: str, batch: int) -> tuple[list[str], float, str]:
    """The answers in the task's order, the share of right ones, and the log."""
    ran = lmms_eval(task, out, arguments, batch)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (file,) = out.rglob("*samples_micro_local.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda each: each["doc_id"])
    (results,) = out.rglob("*results.json")
    right = json.loads(results.read_text())["results"]["micro_local"]["right,none"]
    found = [each["filtered_resps"] for each in samples]  # of a single answer its text, in place of a list
    return [each if isinstance(each, str) else each[0] for each in found], right, ran.stdout + ran.stderr


def by_hand(task: Path, vlm: VLM) -> list[str]:
    import datasets

    rows = datasets.load_from_disk(str(task / "data"))["test"]
    return [vlm.answer(row["image"].convert("RGB"), row["question"], 8) for row in rows]


def test_the_plain_model_answers_as_ours_does(task, vlm, tmp_path):
    found, right, log = answers(task, tmp_path / "plain", "pretrained=micro", 8)
    assert found == by_hand(task, vlm.detach())
    assert right > 0.95
    assert "visual_tokens: 144" in log


def test_pruned_answers_in_any_batch_equal_ours(task, vlm, plugin, tmp_path):
    """The shipped method's name, and a plug-in folder without a budget; tokens kept and latency are in the log."""
    expected = by_hand(task, vlm.attach("divprune", keep=16))
    plain = by_hand(task, vlm.detach())
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 2, "pruning shows"
    logs = {}
    for batch, arguments in ((8, "pretrained=micro,pruner=divprune,keep=16"), (1, f"pruner={plugin}")):
        found, right, logs[batch] = answers(task, tmp_path / f"batch_{batch}", arguments, batch)
        assert found == expected
        assert 0.8 < right < 1
    for batch, log in logs.items():
        (line,) = (line for line in log.splitlines() if "Metric summary" in line)
        figures = dict(part.rsplit(": ", 1) for part in line.partition("Additional metrics: ")[2].split(", "))
        assert (float(figures["visual_tokens"]), float(figures["visual_tokens_of"])) == (16, 144)
        assert float(figures["ms_per_answer"]) > 0
        assert figures["batch_size"] == str(batch)


@pytest.mark.parametrize(
    ("arguments", "batch", "says"),
    [
        ("pretrained=micro,keep=16", 1, "keep needs a method"),
        ("pruner=nothing,keep=16", 1, "nothing"),
        ("pretrained=micro,pruner=divprune", 1, "give a budget"),
        ("pretrained=micro", "auto", "give a number of prompts"),
    ],
)
def test_wrong_arguments_say_so(task, tmp_path, arguments, batch, says):
    ran = lmms_eval(task, tmp_path / "wrong", arguments, batch)
    assert says in ran.stdout + ran.stderr
    assert not (tmp_path / "wrong").exists() or not list((tmp_path / "wrong").rglob("*results.json"))


def test_prompts_of_a_task_are_read_as_they_are():
    """Several images, text between them, stop texts, settings that transformers doesn't know."""
    from lmms_eval.api.instance import Instance

    from lit_prune.evaluation.lmms_eval.model import LitPrune

    model = LitPrune("micro", batch_size=2)
    grey, red = (Image.new("RGB", (96, 96), colour) for colour in ("grey", "red"))
    docs = [[grey], [red, grey], []]
    model.task_dict = {"t": {"test": docs}}

    def messages(doc):
        images = [{"type": "image", "url": image} for image in doc]
        return [{"role": "user", "content": [*images, {"type": "text", "text": "What colour is the tile?"}]}]

    settings = {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "until": ["\n\n"], "image_aspect_ratio": "pad"}
    known = {"task": "t", "repeats": 1, "split": "test"}
    requests = [
        Instance("generate_until", (f"q{i}", messages, settings, i, "t", "test"), 0, {**known, "doc_id": i})
        for i in range(len(docs))
    ]
    found = model.generate_until(requests)
    assert found[0].text == model.vlm.answer(grey, "What colour is the tile?", 3)
    assert found[1].token_counts.input_tokens == found[0].token_counts.input_tokens + 144
    assert found[2].token_counts.input_tokens == found[0].token_counts.input_tokens - 144
    with pytest.raises(NotImplementedError, match="not loglikelihood"):
        model.loglikelihood([])
