"""`lit-prune score`: official figures of answers in files, and frozen cases."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from official_files import POPE, WRITERS, dump, dump_lines

from lit_prune.cli import main

SHARED = [parent / "shared" / "benchmarks" for parent in Path(__file__).parents]
SHARED = next((folder for folder in SHARED if folder.is_dir()), None)
published = pytest.mark.skipif(SHARED is None, reason="no folder `shared` next to the checkout")


def score(name: str, root: Path, *words: Any) -> dict[str, Any]:
    """Run the verb and read its report."""
    out = root / "out" / "report.json"
    main(["score", name, *map(str, words), "--root", str(root), "--out", str(out)])
    return json.loads(out.read_text())


def failing(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 1) -> str:
    """The error that the verb ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["score", *map(str, words)])
    assert stop.value.code == code
    notes, _, error = capsys.readouterr().err.rpartition("error: ")
    assert all(line.startswith("note: ") for line in notes.splitlines())
    assert "Traceback" not in error
    return error


@pytest.fixture
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    WRITERS[request.param](tmp_path)
    return tmp_path


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("root", [name], indirect=True)


# -- official figures -----------------------------------------------------------------------------------------------

LLAVA = {  # LLaVA's answer files: the answers' texts, by what names a question there
    "vqa": [
        {"question_id": 11, "text": "The cat."},
        {"question_id": 12, "text": "Two"},
        {"question_id": 21, "text": "Dog"},
    ],
    "textvqa": [
        {"question_id": "ab", "prompt": "What does it SAY?\nReference OCR token: \nAnswer", "text": "STOP."},
        {"question_id": "ab", "prompt": "what brand?\nAnswer", "text": "None"},
    ],
    "vizwiz": [
        {"image": "VizWiz_val_00000000.jpg", "text": "A can"},
        {"image": "VizWiz_val_00000001.jpg", "text": "Unanswerable"},
    ],
    "gqa": [{"question_id": "201", "text": "Yes."}, {"question_id": "202", "text": "bowl"}],
    "scienceqa": [{"question_id": "1", "text": "A"}, {"question_id": "2", "text": "A. red"}],
    "mmbench": [
        {"question_id": 1, "text": "A"},
        {"question_id": 1000001, "text": "The cat"},
        {"question_id": 2, "text": "A"},
    ],
    "seedbench": [
        {"question_id": 101, "text": "A"},
        {"question_id": 102, "text": "A"},
        {"question_id": "v0", "text": "D"},
    ],
}
FIGURES = {
    "vqa": {"accuracy": 96.67, "number": 100.0, "other": 95.0},
    "textvqa": {"accuracy": 80.0},
    "vizwiz": {"accuracy": 100.0, "other": 100.0, "unanswerable": 100.0},
    "gqa": {"accuracy": 50.0, "binary": 100.0, "open": 0.0},
    "scienceqa": {"accuracy": 50.0, "img_accuracy": 100.0},
    "mmbench": {"accuracy": 50.0, "vanilla": 50.0, "coarse_perception": 100.0, "logic_reasoning": 0.0},
    "seedbench": {"image": 50.0, "video": 100.0, "all": pytest.approx(200 / 3), "type 5": 0.0},
}


@pytest.mark.parametrize(("root", "name"), [(name, name) for name in LLAVA], indirect=["root"])
def test_llavas_answers_in_any_order(root, name, capsys):
    answers = random.Random(0).sample(LLAVA[name], len(LLAVA[name]))
    report = score(name, root, "--answers", dump_lines(root / "answers.jsonl", answers))
    assert {figure: report["figures"][figure] for figure in FIGURES[name]} == FIGURES[name]
    assert (report["questions"], report["missing"], report["extra"], report["repeated"]) == (len(answers), 0, 0, 0)
    printed = capsys.readouterr().out
    assert f"{report['figures'][report['headline']]:.2f}" in printed
    assert f"{len(answers)} questions" in printed


def pope_answers(root: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    """The answers that are right but for the oven."""
    given = [
        {"category": split, "image": image, "text": f"Is there {thing} in the image?", "answer": answer.capitalize()}
        for split, records in POPE.items()
        for image, thing, answer in records
    ]
    given[1]["answer"] = "Yes"
    return dump_lines(root / "answers.jsonl", given if lines is None else lines)


@of("pope")
def test_pope(root):
    report = score("pope", root, "--answers", pope_answers(root))
    assert report["figures"]["random/f1"] == pytest.approx(80)
    assert report["figures"]["popular/f1"] == 100
    assert report["figures"]["f1"] == pytest.approx(280 / 3)
    assert [Path(path).name for path in report["labels"]] == [f"coco_pope_{split}.json" for split in POPE]
    part = score("pope", root, "--answers", pope_answers(root), "--split", "popular")
    assert part["figures"]["f1"] == 100
    assert part["remarks"] == ["5 answers are of other parts of the benchmark (adversarial, random)"]


@of("pope")
def test_pope_with_labels_in_another_order_and_number(root):
    """The official script pairs by position and would give another figure, without a word."""
    expected = score("pope", root, "--answers", pope_answers(root))["figures"]
    for path in root.glob("coco_pope_*.json"):
        path.write_text("".join(f"{line}\n" for line in reversed(path.read_text().splitlines())))
    assert score("pope", root, "--answers", pope_answers(root))["figures"] == expected
    with (root / "coco_pope_random.json").open("a") as file:
        print(
            '{"question_id": 9, "image": "z.jpg", "text": "Is there an elk in the image?", "label": "yes"}', file=file
        )
    skipped = score("pope", root, "--answers", pope_answers(root), "--missing", "skip")
    assert skipped["figures"] == expected
    assert skipped["missing"] == 1
    assert "1 of 8 questions have no answer; the first is 9: 'Is there an elk in the image?'" in skipped["remarks"][0]
    assert score("pope", root, "--answers", pope_answers(root), "--missing", "wrong")["figures"] != expected


@of("pope")
def test_pope_with_llavas_question_file(root):
    """LLaVA's answers have neither image nor category; the file lies in DIR, or is named."""
    records = [(split, *record) for split, records in POPE.items() for record in records]
    asked = [
        {"question_id": n, "image": image, "text": f"Is there {thing} in the imange?\nAnswer", "category": split}
        for n, (split, image, thing, _) in enumerate(records)
    ]
    given = [{"question_id": n, "prompt": "x", "text": label.capitalize()} for n, (*_, label) in enumerate(records)]
    asked = [record | {"text": record["text"].partition("\n")[0]} for record in asked]
    answers = dump_lines(root / "answers.jsonl", given)
    other = dump_lines(root / "elsewhere" / "questions.jsonl", asked)
    assert score("pope", root, "--answers", answers, "--questions", other)["figures"]["f1"] == 100
    other.rename(root / "llava_pope_test.jsonl")
    assert score("pope", root, "--answers", answers)["figures"]["f1"] == 100


@of("pope")
def test_pope_without_a_yes(root, capsys):
    lines = [json.loads(line) | {"answer": "No"} for line in pope_answers(root).read_text().splitlines()]
    report = score("pope", root, "--answers", pope_answers(root, lines))
    assert report["figures"]["f1"] == 0
    assert report["figures"]["precision"] is None
    printed = capsys.readouterr()
    assert "–" in printed.out
    assert "some figure divides by zero and the official script stops" in " ".join(printed.err.split())


@of("mme")
def test_mme_in_both_forms(root):
    from lit_prune.evaluation.scorers.mme import CATEGORIES

    prompts = {"Is it a cat?": "Yes", "Is it a  dog?": "Yes"}
    lines = [
        {
            "question_id": f"{category}/0001.png",
            "prompt": f"{prompt}\nAnswer the question using a single word or phrase.",
        }
        | {"text": answer}
        for category in CATEGORIES
        for prompt, answer in prompts.items()
    ]
    report = score("mme", root, "--answers", dump_lines(root / "a.jsonl", lines))
    assert (report["figures"]["perception"], report["figures"]["cognition"], report["unit"]) == (500, 200, "points")
    folder = root / "submitted"
    folder.mkdir()
    for category in CATEGORIES:
        rows = [["0001.txt", f"{p} Please answer yes or no.", "Yes", a] for p, a in prompts.items()]
        (folder / f"{category}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    assert score("mme", root, "--answers", folder)["figures"] == report["figures"]


@of("vqa")
def test_submissions_are_scored_as_they_are(root, capsys):
    raw = [
        {"question_id": 11, "answer": "The cat."},
        {"question_id": 12, "answer": "Two"},
        {"question_id": 21, "answer": "Dog"},
    ]
    answers = dump(root / "a.json", raw)
    report = score("vqa", root, "--answers", answers)
    assert (report["figures"]["accuracy"], report["figures"]["number"], report["raw"]) == (63.33, 0, False)
    assert "answers were scored as they are; --raw true does the other" in " ".join(capsys.readouterr().err.split())
    assert (
        score("vqa", root, "--answers", answers, "--raw", "true")["figures"]
        == score("vqa", root, "--answers", dump_lines(root / "b.jsonl", LLAVA["vqa"]))["figures"]
    )
    ours = dump_lines(root / "answers.jsonl", [{"id": each["question_id"], "answer": each["answer"]} for each in raw])
    assert score("vqa", root, "--answers", ours)["raw"]


@of("gqa")
def test_gqas_submission(root):
    answers = [{"questionId": "201", "prediction": "Yes"}, {"questionId": "202", "prediction": "cup"}]
    assert score("gqa", root, "--answers", dump(root / "a.json", answers))["figures"]["accuracy"] == 50


@of("mmbench")
def test_mmbenchs_table(root):
    rows = ["index question answer prediction", "1 x A A", "1000001 x B B", "2 x C three"]
    (root / "a.tsv").write_text("\n".join(rows).replace(" ", "\t"))
    assert score("mmbench", root, "--answers", root / "a.tsv")["figures"]["accuracy"] == 100


@pytest.mark.parametrize(("root", "name"), [("scienceqa", "scienceqa"), ("seedbench", "seedbench")], indirect=["root"])
def test_what_official_scripts_count_as_wrong(root, name):
    answers = dump_lines(root / "a.jsonl", LLAVA[name][-1:])
    report = score(name, root, "--answers", answers)
    assert report["missing"] == report["questions"] - 1
    assert "they count as wrong" in report["remarks"][0]
    assert score(name, root, "--answers", answers, "--missing", "skip")["figures"] != report["figures"]


# -- errors ---------------------------------------------------------------------------------------------------------
@of("pope")
def test_missing_answers_are_an_error_that_says_how_many(root, capsys):
    lines = [json.loads(line) for line in pope_answers(root).read_text().splitlines()]
    error = failing(capsys, "pope", "--answers", pope_answers(root, lines[1:]), "--root", root)
    assert "1 of 7 questions have no answer; the first is 1: 'Is there a cat in the image?', image a.jpg" in error
    assert "--missing skip" in error
    lines = [line | {"image": "z.jpg"} for line in lines]
    error = failing(capsys, "pope", "--answers", pope_answers(root, lines), "--root", root, "--missing", "skip")
    assert "7 of 7 questions have no answer" in error
    assert "7 answers belong to no question and are left out; the first is" in error


@of("pope")
def test_answers_to_no_question_and_repeated_ones_are_reported(root):
    lines = [json.loads(line) for line in pope_answers(root).read_text().splitlines()]
    expected = score("pope", root, "--answers", pope_answers(root))["figures"]
    report = score("pope", root, "--answers", pope_answers(root, [*lines, lines[0], lines[0] | {"image": "z.jpg"}]))
    assert report["figures"] == expected
    assert (report["extra"], report["repeated"]) == (1, 1)
    assert report["remarks"][0] == "1 answers say again what another did; each question counts once"
    assert report["remarks"][1].startswith("1 answers belong to no question and are left out; the first is ")
    assert report["remarks"][1].endswith("answers.jsonl:9")


@of("pope")
def test_two_answers_to_one_question(root, capsys):
    lines = [json.loads(line) for line in pope_answers(root).read_text().splitlines()]
    answers = pope_answers(root, [*lines, lines[0] | {"answer": "No"}])
    error = failing(capsys, "pope", "--answers", answers, "--root", root)
    assert f"two answers to one question: 'Yes' in {answers}:1, 'No' in {answers}:8" in error


@of("vqa")
def test_other_errors(root, capsys):
    answers = dump_lines(root / "a.jsonl", LLAVA["vqa"])
    assert "give --answers FILE and --root DIR, or --cases FILE" in failing(capsys, "vqa", "--root", root)
    assert "no benchmark 'vqav3'; there are gqa, " in failing(capsys, "vqav3", "--answers", answers, "--root", root)
    assert "mmvet can't be scored offline" in failing(capsys, "mmvet", "--answers", answers, "--root", root)
    both = ["vqa", "--cases", answers, "--answers", answers]
    assert "give it without --answers and --root" in failing(capsys, *both)
    test = ["vqa", "--answers", answers, "--root", root, "--split", "test-dev2015"]
    assert "3 questions have no public labels; submit the answers" in failing(capsys, *test)
    assert "no such file or folder" in failing(capsys, "vqa", "--answers", root / "none", "--root", root)
    assert "https://visualqa.org" in failing(capsys, "vqa", "--answers", answers, "--root", root / "none")
    mixed = dump_lines(root / "b.jsonl", [*LLAVA["vqa"][:2], {"question_id": 21, "answer": "dog"}])
    assert "b.jsonl:3: one has a model's own words, the other" in failing(
        capsys, "vqa", "--answers", mixed, "--root", root
    )
    assert score("vqa", root, "--answers", mixed, "--raw", "true")["figures"]
    assert "`missing`" in failing(capsys, "vqa", "--answers", answers, "--root", root, "--missing", "some", code=2)


@of("vqa")
def test_a_path_to_write_that_is_a_folder(root, capsys):
    answers = dump_lines(root / "a.jsonl", LLAVA["vqa"])
    assert "Is a directory" in failing(capsys, "vqa", "--answers", answers, "--root", root, "--out", root)


# -- frozen cases ---------------------------------------------------------------------------------------------------
def normalised(expected: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "normalise", "text": "The cat.", "expected": expected, **fields}


def test_cases_agree(tmp_path, capsys):
    path = dump(tmp_path / "x.json", {"scorer": "x", "cases": [normalised("cat"), normalised("cat")]})
    main(["score", "vqa", "--cases", str(path)])
    assert capsys.readouterr().out == f"{path}: 2 of 2 cases agree\n"
    main(["score", "textvqa", "--cases", str(dump(path, [normalised("cat")]))])
    path.write_text(json.dumps({"cases": [normalised("cat")] * 9000}, indent="\t"))  # tabs, which YAML doesn't take
    main(["score", "textvqa", "--cases", str(path)])
    assert "9000 of 9000 cases agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cases", "message"),
    [
        (
            "vqa",
            [normalised("cat"), normalised("dog")],
            'case 1 (normalise): expected "dog", got "cat"; the case: {"kind": "norm',
        ),
        ("vqa", [normalised("dog", id="x7")], 'case x7 (normalise): expected "dog", got "cat"'),
        ("vqa", [normalised(3)], 'case 0 (normalise): expected 3, got "cat"'),
        ("vqa", [normalised({"error": "x"})], 'case 0 (normalise): expected {"error": "x"}, got "cat"'),
        ("vqa", [{"kind": "accuracy", "answers": ["x"] * 10, "prediction": "x", "expected": 99.99}], "got 100.0"),
        (
            "vqa",
            [{"kind": "accuracy", "answers": [], "prediction": "x", "expected": 0}],
            "has no answers to compare with",
        ),
        (
            "pope",
            [{"kind": "set", "labels": ["yes"], "texts": ["Yes"], "expected": {"TP": 1, "FP": 0, "TN": 0, "FN": 1}}],
            "case 0 (set).FN: expected 1, got 0",
        ),
        (
            "pope",
            [{"kind": "set", "labels": ["yes"], "texts": ["No"], "expected": {"f1": 0.0}}],
            "case 0 (set).f1: only expected has it: 0.0",
        ),
        (
            "scienceqa",
            [{"kind": "parse", "choices": 2, "text": "B", "parsed": "B", "index": 0}],
            ".index: expected 0, got 1",
        ),
        ("mmbench", [{"kind": "parse", "choices": {"A": "x"}, "text": "B", "expected": 0}], "expected 0, got false"),
        ("vqa", [{"kind": "circular", "rows": [], "expected": 0}], "case 0: not a case of VQAv2: KeyError"),
        ("vqa", [{"kind": "normalise", "text": "x"}], 'case 0: nothing is "expected"'),
        ("vqa", [{"text": "x"}], 'case 0: an object with a "kind" is expected'),
        ("vqa", [3], 'case 0: an object with a "kind" is expected'),
        ("vqa", [], "no cases; a list of them"),
        ("vqa", {"case": 3}, "no cases; a list of them"),
        ("vqa", 3, "no cases; a list of them"),
        ("vizwiz", [normalised("cat")], "VizWiz has no frozen cases; its rule is that of vqa"),
    ],
)
def test_cases_that_differ(tmp_path, capsys, name, cases, message):
    path = dump(tmp_path / "cases.json", cases)
    error = failing(capsys, name, "--cases", path)
    assert str(path) in error
    assert message in error


def test_official_errors_are_expected_as_errors(tmp_path):
    case = {
        "kind": "set",
        "labels": ["yes"],
        "texts": ["No"],
        "expected": {"error": "ZeroDivisionError: float division"},
    }
    main(["score", "pope", "--cases", str(dump(tmp_path / "x.json", [case]))])


def test_a_file_of_cases_that_is_not_there(tmp_path, capsys):
    assert "nowhere.json: No such file" in failing(capsys, "vqa", "--cases", tmp_path / "nowhere.json")


# -- published answers ----------------------------------------------------------------------------------------------
@published
@pytest.mark.parametrize("today", [False, True])
def test_pope_of_llavas_published_answers(tmp_path, today):
    """Published: 87.1, 86.2, 84.5; also with the 3,000 random questions of the repository today."""
    answers = SHARED / "pope" / "llava15_13b_answers.jsonl"
    for path in (SHARED / "pope").glob("coco_pope_*.json"):
        if not today or "2910" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    lines = answers.read_text().splitlines()
    random.Random(0).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(lines))
    expected = json.loads((SHARED / "pope" / "llava15_13b_expected.json").read_text())["expected"]
    names = {
        "Accuracy": "accuracy",
        "Precision": "precision",
        "Recall": "recall",
        "F1 score": "f1",
        "Yes ratio": "yes_ratio",
    }
    for path in (answers, shuffled):
        report = score("pope", tmp_path, "--answers", path)
        for split, figures in expected.items():
            for name, value in figures.items():
                assert report["figures"][f"{split}/{names[name]}"] == pytest.approx(100 * value, rel=1e-12)
        assert [round(report["figures"][f"{split}/f1"], 1) for split in POPE] == [87.1, 86.2, 84.5]
        assert report["questions"] == 8910
        assert len(report["remarks"]) == 1


@published
def test_every_file_of_cases_agrees(capsys):
    for path in sorted((SHARED / "cases").glob("*.json")):
        main(["score", path.stem, "--cases", str(path)])
    printed = capsys.readouterr().out
    assert sum(int(line.split()[-5]) for line in printed.splitlines()) == 594


# -- start ----------------------------------------------------------------------------------------------------------
@of("vqa")
def test_scoring_needs_no_framework(root):
    answers = dump_lines(root / "a.jsonl", LLAVA["vqa"])
    code = "import sys, lit_prune.cli as c\nc.main(sys.argv[1:])\nprint(*sys.modules, file=sys.stderr)"
    words = ["score", "vqa", "--answers", str(answers), "--root", str(root)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, check=True)
    assert "96.67" in done.stdout
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "lit_prune.evaluation.scorers.vqa" in loaded
    assert not loaded & {"torch", "transformers", "lightning", "torchmetrics", "pandas"}
