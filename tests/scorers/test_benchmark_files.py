"""Official files in tiny copies: what is read, LLaVA-1.5's prompts, and errors over files that are missing or wrong."""

from pathlib import Path

import pytest
from official_files import WRITERS, dump, dump_lines

from lit_prune.data.benchmarks import benchmark, names
from lit_prune.data.benchmarks.base import Labels
from lit_prune.data.benchmarks.mmbench import pictures
from lit_prune.data.benchmarks.textvqa import TextVQAFiles, question_of
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers import Question, rule_of

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FILES = {  # of each benchmark, a file without which it can't be read
    "vqa": "v2_mscoco_val2014_annotations.json",
    "vizwiz": "Annotations/val.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "gqa": "testdev_balanced_questions.json",
    "pope": "coco_pope_popular.json",
    "mme": "MME_Benchmark_release_version/scene",
    "scienceqa": "pid_splits.json",
    "mmbench": "mmbench_dev_20230712.tsv",
    "seedbench": "SEED-Bench.json",
    "mmvet": "mm-vet.json",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    return tmp_path


def load(root: Path, name: str, split: str | None = None) -> Labels:
    return benchmark(name).load(root / name, split)


def test_every_benchmark_has_a_tiny_copy():
    assert set(names()) == set(WRITERS) == set(FILES)


# Snapshots of LLaVA-1.5's prompts: of the first question and, where they differ, the second.
PROMPTS = {
    "vqa": ["What is it?" + SHORT],
    "gqa": ["Is it red?" + SHORT],
    "pope": ["Is there a cat in the image?" + SHORT],
    "mme": ["Is it a cat?" + SHORT, "Is it a dog?" + SHORT],
    "textvqa": ["What does it SAY?" + SHORT],
    "vizwiz": [
        "What is this? \nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    ],
    "scienceqa": [
        "Which colour?\nA. red\nB. blue" + LETTER,
        "Context: Look at it.\nWhich one?\nSay.\nA. red\nB. blue" + LETTER,
    ],
    "mmbench": [
        'Look.\nWhat "is" it?\nA. cat\nB. dog' + LETTER,
        'Look.\nWhat "is" it?\nA. dog\nB. cat' + LETTER,
        "How\nmany?\nA. one\nB. two\nC. three" + LETTER,
    ],
    "seedbench": ["What?\nA. option a\nB. option b\nC. option c\nD. option d" + LETTER],
    "mmvet": ["What is x?"],
}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_prompts_are_llavas(root, name):
    prompts = [question.prompt for question in load(root, name).questions]
    assert prompts[: len(PROMPTS[name])] == PROMPTS[name]


def test_textvqa_with_ocr_tokens(root):
    questions = TextVQAFiles(ocr=True).load(root / "textvqa").questions
    assert questions[0].prompt == "What does it SAY?\nReference OCR token: STOP, acme" + SHORT
    dump(root / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "ab", "ocr_tokens": []}]})
    questions = TextVQAFiles(ocr=True).load(root / "textvqa").questions
    assert questions[0].prompt == "What does it SAY?\nReference OCR token: " + SHORT
    dump(root / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": []})
    with pytest.raises(LitPruneError, match=r"TextVQA_Rosetta_OCR_v0.2_val.json: no image ab"):
        TextVQAFiles(ocr=True).load(root / "textvqa")


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What?", "What?"),
        ("What?" + SHORT, "What?"),
        ("What?\nReference OCR token: a, b" + SHORT, "What?"),
        ("Reference OCR token: a, b\nWhat?" + SHORT, "What?"),
    ],
)
def test_questions_in_llavas_textvqa_prompts(prompt, question):
    assert question_of(prompt) == question


def test_mmbench_in_chinese(root):
    path = root / "mmbench" / "mmbench_dev_20230712.tsv"
    path.rename(path.with_name("mmbench_dev_cn_20231003.tsv"))
    assert load(root, "mmbench", "cn").questions[0].prompt.endswith("\nB. dog\n请直接回答选项字母。")


IMAGES = {
    "vqa": "COCO_val2014_000000000001.jpg", "vizwiz": "VizWiz_val_00000000.jpg", "textvqa": "ab.jpg", "gqa": "n7.jpg",
    "pope": "a.jpg", "mme": "existence/0001.png", "scienceqa": "", "mmbench": "1", "seedbench": "SEED-Bench-image/77",
    "mmvet": "v1_0.png",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_images_are_named_as_in_the_official_folders(root, name):
    assert load(root, name).questions[0].image == IMAGES[name]


def test_images_of_other_folders(root):
    assert load(root, "scienceqa").questions[1].image == "test/2/image.png"
    assert load(root, "seedbench").questions[2].image == "SEED-Bench-video-image/10_v0.png"
    assert load(root, "vqa", "test-dev2015").questions[0].image == "COCO_test2015_000000000001.jpg"
    assert load(root, "mme", "count").questions[0].image == "count/images/0001.png"


def test_images_are_found(root):
    files = benchmark("pope")
    question = files.load(root / "pope").questions[0]
    with pytest.raises(LitPruneError, match=r"val2014/a.jpg: no such file \(nor ./a.jpg\)") as error:
        files.image(root / "pope", question)
    assert "github.com/RUCAIBox/POPE" in str(error.value)
    (root / "pope" / "a.jpg").touch()
    assert files.image(root / "pope", question).samefile(root / "pope" / "a.jpg")
    mme = benchmark("mme")
    assert mme.image(root / "mme", mme.load(root / "mme").questions[0]).exists()


def test_images_in_mmbenchs_table(root):
    assert pictures(root / "mmbench" / "mmbench_dev_20230712.tsv") == dict.fromkeys(("1", "1000001", "2"), b"picture")
    (root / "x.tsv").write_text("index\timage\n1\té\n")
    with pytest.raises(LitPruneError, match=r"x.tsv:2: the image is no base64"):
        pictures(root / "x.tsv")


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"mmvet"}))
def test_right_answers_score_highest(root, name):
    """Every reader fits its rule: the references, given as answers, are right."""
    questions = load(root, name).questions
    figures = rule_of(benchmark(name).rule, raw=False).score((question, _right(question)) for question in questions)
    best = 200 if name == "mme" else 100
    assert figures[rule_of(benchmark(name).rule).headline] == pytest.approx(best * 10 if name == "mme" else best)


def _right(question: Question) -> str:
    reference = question.reference
    if "answers" in reference:
        return max(reference["answers"], key=reference["answers"].count)
    if "label" in reference:
        return reference["label"]
    right = reference["answer"]
    return "ABCDE"[right] if isinstance(right, int) else right


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_missing_file_is_named_with_its_source(root, name):
    path = root / name / FILES[name]
    path.rename(root / "elsewhere")
    with pytest.raises(LitPruneError) as error:
        load(root, name)
    assert str(error.value).startswith(f"{path}: no such file")
    assert benchmark(name).source in str(error.value)
    assert "https://" in benchmark(name).source


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_missing_folder(tmp_path, name):
    with pytest.raises(LitPruneError, match="no such folder; it should hold") as error:
        load(tmp_path, name)
    assert benchmark(name).source in str(error.value)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"mme"}))
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "[1]", '{"a": 1}', '{"questions": 3, "data": 3, "test": 3}', "\x00é"]
)
def test_files_with_something_else_in_them(root, name, text):
    (root / name / FILES[name]).write_text(text)
    with pytest.raises(LitPruneError, match=FILES[name].rpartition("/")[2]):
        load(root, name)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"mme"}))
def test_files_that_are_no_text(root, name):
    (root / name / FILES[name]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LitPruneError, match="not UTF-8 text, at byte 0"):
        load(root, name)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("vizwiz", {"image": "x.jpg", "question": "q"}, "item 0: no field 'answers'"),
        (
            "vizwiz",
            {"image": "x.jpg", "question": "q", "answers": 3, "answer_type": "x"},
            "item 0: not as in the official",
        ),
        ("vizwiz", {"image": "x.jpg", "question": None, "answers": [], "answer_type": "x"}, "item 0: not as in the"),
    ],
)
def test_records_that_are_not_the_official_ones(root, name, record, message):
    dump(root / name / "Annotations" / "val.json", [record])
    with pytest.raises(LitPruneError, match=message):
        load(root, name)


def test_questions_with_one_id(root):
    path = root / "pope" / "coco_pope_random.json"
    path.write_text(path.read_text() * 2)
    with pytest.raises(LitPruneError, match="two questions have the id random/1"):
        load(root, "pope")


def test_vqa_without_an_annotation(root):
    dump(root / "vqa" / FILES["vqa"], {"annotations": [{"question_id": 3, "answer_type": "x", "answers": []}]})
    with pytest.raises(LitPruneError, match=r"annotations.json: no annotation of question 11"):
        load(root, "vqa")


def test_scienceqa_without_a_problem(root):
    dump(root / "scienceqa" / "pid_splits.json", {"test": ["9"]})
    with pytest.raises(LitPruneError, match=r"problems.json: no problem 9, which pid_splits.json names"):
        load(root, "scienceqa")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Is it?\tYes\n", "1 questions; the official file has two an image"),
        ("Is it?\tYes\nIs it not?\n", "0001.txt:2: 1 fields where the official file has 2"),
        ("Is it?\tYes\nIs it not?\tperhaps\n", "0001.txt:2: the label is 'perhaps', not Yes or No"),
        ("Is it?\tYes\nIs it?\tNo\n", "two questions have the id count/0001/Is it?"),
    ],
)
def test_mmes_texts(root, lines, message):
    folder = root / "mme" / "MME_Benchmark_release_version" / "count" / "questions_answers_YN"
    (folder / "0001.txt").write_text(lines)
    with pytest.raises(LitPruneError) as error:
        load(root, "mme")
    assert message in str(error.value)
    (folder / "0001.txt").unlink()
    with pytest.raises(LitPruneError, match=r"no questions \(\*.txt\)"):
        load(root, "mme")


def test_mme_from_the_eval_tool(tmp_path):
    """Its files have the labels of all categories, without images."""
    lines = [
        "0001.png\tIs it a cat? Please answer yes or no.\tYes",
        "0001.png\tIs it a dog? Please answer yes or no.\tNo",
    ]
    for category in ("count", "OCR"):
        (tmp_path / f"{category}.txt").write_text("\n".join(lines))
    questions = benchmark("mme").load(tmp_path, "count, OCR").questions
    assert [(each.group, each.prompt) for each in questions[1:3]] == [
        ("count", "Is it a dog?" + SHORT),
        ("OCR", "Is it a cat?" + SHORT),
    ]


@pytest.mark.parametrize(
    ("name", "split"), [("pope", "rare"), ("mme", "count,rare"), ("vqa", "rare"), ("mmvet", "rare")]
)
def test_splits_that_are_not_there(root, name, split):
    with pytest.raises(LitPruneError, match="no split 'rare'; there are "):
        load(root, name, split)


def test_parts_of_a_benchmark(root):
    assert {question.group for question in load(root, "pope", "popular").questions} == {"popular"}
    assert len(load(root, "seedbench", "image").questions) == 2
    assert len(load(root, "scienceqa", "train").questions) == 1
    assert load(root, "vizwiz", "test").questions[0].reference == {}


def test_gqas_choices_give_validity(root):
    choices = {number: {"valid": ["yes", "cup"], "plausible": ["yes"]} for number in ("201", "202")}
    dump(root / "gqa" / "testdev_choices.json", choices)
    labels = load(root, "gqa")
    assert len(labels.files) == 2
    figures = rule_of("gqa").score((question, "cup") for question in labels.questions)
    assert (figures["validity"], figures["plausibility"]) == (100, 0)


def test_popes_folders(root):
    (root / "other" / "coco").mkdir(parents=True)
    for path in (root / "pope").iterdir():
        path.rename(root / "other" / "coco" / path.name)
    assert len(benchmark("pope").load(root / "other").questions) == 7


def test_no_such_benchmark():
    with pytest.raises(LitPruneError, match="no benchmark 'base'; there are gqa, mmbench, mme"):
        benchmark("base")


def test_lines_of_a_label_file(root):
    path = dump_lines(root / "pope" / "coco_pope_random.json", [{"question_id": 1}])
    path.write_text("\n" + path.read_text() + "\n{\n")
    with pytest.raises(LitPruneError, match=r"coco_pope_random.json:2: no field 'image'; the official file has"):
        load(root, "pope")
