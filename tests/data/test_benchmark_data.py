"""Public benchmarks from their official files to the official score, and to the file that a server takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny import ROOT, trainer
from tiny_benchmarks import WRITERS

from lit_prune import cli
from lit_prune.callbacks import PrintResults, WriteAnswers, WriteScores, WriteSubmissions
from lit_prune.data.benchmarks import names
from lit_prune.data.conversation import read_conversation
from lit_prune.data.prompt import render
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers import rule_of
from lit_prune.files.images import padded_to_square

CONFIGS = sorted((ROOT / "configs" / "benchmarks").glob("*.yaml"))
SHORT = "\nAnswer the question using a single word or phrase."


def init_args(config: Path) -> dict[str, Any]:
    return yaml.safe_load(config.read_text())["data"]["init_args"]


def test_every_benchmark_has_a_tiny_copy_and_a_configuration():
    assert set(WRITERS) == set(names())
    chosen = [init_args(config)["benchmark"] for config in CONFIGS]
    assert {each if isinstance(each, str) else each["name"] for each in chosen} == set(names())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_from_official_files_to_the_official_score(config, pruned_micro, benchmarks, official, tmp_path):
    """`test` gives the score that `lit-prune score` gives of what `predict` wrote, both files of it."""
    made = benchmarks(**init_args(config))
    callbacks = [WriteScores(), WriteSubmissions(), WriteAnswers()]
    run = trainer(tmp_path, callbacks)
    run.predict(pruned_micro, made)
    (part,) = made.questions.parts
    folder = tmp_path / part.label
    written = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in written] == [str(question.id) for question in part.labels.questions]
    assert not (tmp_path / "answers.jsonl").exists()
    assert part.reader.submission is None or (folder / part.reader.submission).stat().st_size
    if part.rule is None:
        with pytest.raises(LitPruneError, match=r"mm-vet.json: mmvet is graded by GPT-4.*`lightning predict` writes"):
            made.check("test")
        return
    logged = run.test(pruned_micro, made, verbose=False)[0]
    (score,) = pruned_micro.scores
    assert score.questions == score.asked == len(written)
    answers = [line["answer"] for line in written]
    assert score.figures == part.rule.score(zip(part.labels.questions, answers, strict=True))
    named = {f"{part.label}/{name}".replace(" ", "_"): x for name, x in score.figures.items() if x is not None}
    assert {name: logged[f"test/{name}"] for name in named} == pytest.approx(named, rel=1e-6)
    assert logged["test/visual_tokens"] <= 48
    assert {"test/kappa", "test/flops", "test/w2/layer_15", "test/agreement"} <= logged.keys()
    assert json.loads((tmp_path / "scores.json").read_text()) == [score.report()]
    for given in (folder, part.reader.submission and folder / part.reader.submission):
        if given:
            figures = scored(part, official, given, tmp_path / "scored.json")
            names = [name for name in score.figures if not (part.reader.label_suffix == "-img" and name == "accuracy")]
            assert {name: figures[name] for name in names} == {name: score.figures[name] for name in names}, given


def scored(part: Any, official: Path, answers: Path, out: Path) -> dict[str, float]:
    """What `lit-prune score` makes of a file."""
    name = type(part.reader).__module__.rpartition(".")[2]
    words = ["score", name, "--answers", answers, "--root", official / name, "--out", out]
    words += ["--split", part.split] if part.split else []
    cli.main([str(word) for word in words])
    return json.loads(out.read_text())["figures"]


@pytest.mark.parametrize(("name", "split"), [("vqa", "test-dev2015"), ("vizwiz", "test")])
def test_submissions_of_splits_without_labels(name, split, pruned_micro, benchmarks, official, tmp_path):
    made = benchmarks(name, split=split)
    with pytest.raises(LitPruneError, match=r"without public labels, so there is no score.*`lightning predict` writes"):
        made.check("test")
    trainer(tmp_path, [WriteSubmissions()]).predict(pruned_micro, made)
    folder = tmp_path / f"{name}-{split}"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    submitted = json.loads((folder / "submission.json").read_text())
    prepare = rule_of(name).prepare
    if name == "vizwiz":
        expected = [{"image": line["image"], "answer": prepare(line["answer"])} for line in answers]
        assert submitted == expected
        return
    given = {int(line["id"]): prepare(line["answer"]) for line in answers}
    everything = json.loads((official / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())["questions"]
    assert submitted == [
        {"question_id": each["question_id"], "answer": given.get(each["question_id"], "")} for each in everything
    ]
    assert 0 < len(given) < len(everything)


def test_several_benchmarks_are_one_table(pruned_micro, benchmarks, tmp_path, capsys):
    made = benchmarks(["pope", "gqa", {"name": "textvqa", "ocr": True}, {"name": "mmbench", "split": "cn"}])
    run = trainer(tmp_path, [PrintResults(), WriteScores()])
    logged = run.test(pruned_micro, made, verbose=False)[0]
    out = capsys.readouterr().out
    assert out.count("official scores") == 1
    rows = [line.split() for line in out.splitlines()]
    for label, headline in (
        ("pope", "f1"),
        ("gqa", "accuracy"),
        ("textvqa-ocr", "accuracy"),
        ("mmbench-cn", "accuracy"),
    ):
        (row,) = [row for row in rows if row[:1] == [label]]
        assert row[1:3] == [f"{headline},", "%"]
        assert float(row[3]) == pytest.approx(logged[f"test/{label}/{headline}"], abs=0.006)
    assert "pope/f1" not in out
    assert [each["benchmark"] for each in json.loads((tmp_path / "scores.json").read_text())] == [
        *("pope", "gqa", "textvqa-ocr", "mmbench-cn")
    ]
    alone = trainer(tmp_path, []).test(pruned_micro, benchmarks("gqa"), verbose=False)[0]
    assert {k: v for k, v in alone.items() if "/gqa/" in k} == {k: v for k, v in logged.items() if "/gqa/" in k}


def test_a_part_of_a_benchmark_is_no_official_figure(pruned_micro, benchmarks, tmp_path, capsys):
    run = trainer(tmp_path, [PrintResults(), WriteScores()], limit_test_batches=1)
    run.test(pruned_micro, benchmarks(["pope", "gqa"]), verbose=False)
    out = capsys.readouterr().out
    assert "note: pope: 5 of 27 questions were answered: no official figure" in out
    assert "note: gqa: 0 of 6 questions were answered: no official figure" in out
    (_, nothing) = json.loads((tmp_path / "scores.json").read_text())
    assert (nothing["figures"], nothing["questions"], nothing["asked"]) == ({}, 0, 6)


def test_other_data_has_other_scores(pruned_micro, benchmarks, tmp_path, world, capsys):
    """The scorer is the data module's: a run on instruction data after one on a benchmark has its own again."""
    run = trainer(tmp_path, [PrintResults(), WriteScores()])
    run.test(pruned_micro, benchmarks("gqa"), verbose=False)
    (tmp_path / "scores.json").unlink()
    capsys.readouterr()
    logged = run.test(pruned_micro, world(), verbose=False)[0]
    assert "test/accuracy/all" in logged
    assert not any("gqa" in name for name in logged)
    assert "official scores" not in capsys.readouterr().out
    assert not (tmp_path / "scores.json").exists()


def test_compare_has_official_scores(official, tmp_path, capsys):
    """Of the full model too, and those of `test`; the table beside the others."""
    config = tmp_path / "gqa.yaml"
    shared = yaml.safe_load((ROOT / "configs" / "micro.yaml").read_text()) | {"trainer": {"logger": False}}
    shared["model"]["max_new_tokens"] = 4
    init = {"benchmark": ["gqa", "pope"], "root": str(official), "eval_batch_size": 40}
    shared["data"] = {"class_path": "lit_prune.data.BenchmarkData", "init_args": init}
    config.write_text(yaml.safe_dump(shared))
    words = ["compare", "-c", config, "--methods", "full", "divprune", "--keep", "48", "--seeds", "0", "--limit", "20"]
    cli.main([*map(str, words), "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["full", "DivPrune"]
    assert all(set(row["headlines"]) == {"gqa/accuracy", "pope/f1"} for row in rows)
    assert all(row["scores"]["gqa/binary"] >= 0 for row in rows)
    assert "official scores" in capsys.readouterr().out
    assert "official scores" in (tmp_path / "out" / "table.md").read_text()


# -- prompts and images ---------------------------------------------------------------------------------------------
def test_prompts_as_the_model_reads_them(benchmarks):
    """Image, question, instruction; the system prompt of LLaVA-1.5's protocol in front, where it is asked for."""
    overlay = yaml.safe_load((ROOT / "configs" / "protocols" / "llava_1_5.yaml").read_text())["data"]["init_args"]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    for options, head in (({}, ""), (overlay, system)):
        made = benchmarks("pope", **options)
        made.setup("predict")
        messages = read_conversation(made.questions[0], answered=False).messages
        text, _ = render(made.processor, messages)
        assert text == f"{head}USER: <image>\nIs there a white cross in the image?{SHORT} ASSISTANT:"


def test_questions_without_an_image(benchmarks):
    made = benchmarks("scienceqa")
    made.setup("test")
    (question,) = [each for each in made.questions.parts[0].labels.questions if not each.image]
    record = made.questions[question.index]
    assert "images" not in record
    assert record["messages"][0]["content"] == [{"type": "text", "text": question.prompt}]


def test_padding_to_a_square_is_llavas():
    """A restatement of LLaVA's expand2square, for both shapes."""
    for size, corner in (((6, 3), (0, 1)), ((3, 6), (1, 0)), ((4, 4), (0, 0))):
        image = Image.new("RGB", size, (9, 8, 7))
        square = padded_to_square(image, (122, 116, 104))
        assert square.size == (max(size),) * 2
        expected = Image.new("RGB", square.size, (122, 116, 104))
        expected.paste(image, corner)
        assert square.tobytes() == expected.tobytes()


def test_pad_to_square_is_an_option(benchmarks, official, tmp_path):
    WRITERS["vizwiz"](tmp_path)
    for path in (tmp_path / "val").iterdir():
        Image.new("RGB", (96, 32), "red").save(path)
    pixels = {}
    for pad in (False, True):
        made = benchmarks("vizwiz", root=str(tmp_path), pad_to_square=pad)
        made.setup("test")
        pixels[pad] = next(iter(made.test_dataloader()))["inputs"]["pixel_values"][0]
    assert (pixels[False][0] > 0.9).all()
    assert (pixels[True][0, 34:62] > 0.9).all()
    assert pixels[True][:, :30].abs().max() < 0.01  # the mean colour
    made.processor.image_processor.image_mean = None
    with pytest.raises(LitPruneError, match="pad_to_square: LlavaProcessor has no mean colour"):
        made.setup("test")


# -- what is refused, before a model is loaded ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "popp"}, "no benchmark 'popp'; there are gqa, mmbench"),
        ({"benchmark": []}, "no benchmark is given"),
        ({"benchmark": {"split": "val"}}, "has no name"),
        ({"benchmark": {"name": "textvqa", "orc": True}}, "textvqa has no option 'orc'; it takes ocr"),
        ({"benchmark": {"name": "pope", "orc": True}}, "pope has no option 'orc'; it takes none"),
        ({"benchmark": "pope", "root": None}, r"data.root is not given: the folder of pope's.*github.com/RUCAIBox"),
        ({"benchmark": ["pope", "gqa"], "split": "random"}, "data.split is that of one benchmark"),
        (
            {"benchmark": {"name": "pope", "split": "all"}, "split": "random"},
            "data.split is random, and data.benchmark",
        ),
    ],
)
def test_settings_that_cannot_be(benchmarks, options, message):
    with pytest.raises(LitPruneError, match=message):
        benchmarks(**options)


def test_what_a_benchmark_cannot_do(benchmarks):
    with pytest.raises(LitPruneError, match="no split 'vall'; there are val, train"):
        benchmarks("textvqa", split="vall").check("test")
    with pytest.raises(LitPruneError, match=r"data.benchmark: pope is there twice"):
        benchmarks(["pope", {"name": "pope"}]).check("test")
    with pytest.raises(LitPruneError, match="benchmarks are for validate, test and predict"):
        benchmarks("pope").check("fit")
    benchmarks("pope").check("validate")


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("pope", "coco/coco_pope_popular.json", r"coco_pope_popular.json: no such file.*https://github.com/RUCAIBox"),
        (
            "pope",
            "val2014/COCO_val2014_000000000002.jpg",
            r"1 of 3 images of pope are missing; the first: .*0002.jpg: no such.*cocodataset",
        ),
        ("mmbench", "mmbench_dev_20230712.tsv", r"mmbench_dev_20230712.tsv: no such file.*https://download.openmmlab"),
        (
            "seedbench",
            "SEED-Bench-image",
            r"3 of 3 images of seedbench-image are missing.*huggingface.co/datasets/AILab-CVC",
        ),
        ("scienceqa", "images/test/2/image.png", r"1 of 3 images of scienceqa-img are missing.*lupantech/ScienceQA"),
    ],
)
def test_a_missing_file_is_an_error_that_names_it(name, file, message, tmp_path, capsys):
    """Also with a base that can't be loaded here: the data are checked first."""
    WRITERS[name](tmp_path)
    (tmp_path / file).rename(tmp_path / "away")
    words = ["test", "-c", "rcp.yaml", "-c", f"benchmarks/{name}.yaml", "--data.root", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(words)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, " ".join(error.split())), error


def test_a_picture_that_cannot_be_read_stops_the_run(pruned_micro, benchmarks, tmp_path):
    WRITERS["gqa"](tmp_path / "gqa")
    (tmp_path / "gqa" / "images" / "n2.jpg").write_bytes(b"x")
    with pytest.raises(LitPruneError, match=r"testdev_balanced_questions.json, question 2020: image n2.jpg cannot be"):
        trainer(tmp_path, []).test(pruned_micro, benchmarks("gqa", root=str(tmp_path)), verbose=False)
    trainer(tmp_path, []).test(pruned_micro, benchmarks("gqa", root=str(tmp_path), max_bad_share=0.9), verbose=False)
    (score,) = pruned_micro.scores
    assert (score.questions, score.asked) == (4, 6)
    assert "no official figure" in score.remarks[0]
