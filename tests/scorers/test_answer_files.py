"""Answers in the formats that people have, and how they are joined to the questions."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_files import WRITERS, dump_lines

from lit_prune.data.benchmarks import benchmark
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer, Joined, complete, join, read_answers
from lit_prune.evaluation.scorers.rule import Question

LLAVA = {"question_id": 7, "prompt": "What?\nSay.", "text": "Cat", "answer_id": "x", "model_id": "y", "metadata": {}}


def read(path: Path, text: str) -> list[Answer]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return read_answers([path])


# -- formats --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", LLAVA, {"text": "Cat", "id": "7", "question": "What?\nSay."}),
        ("a.jsonl", {"id": "7", "answer": "Cat"}, {"text": "Cat", "id": "7"}),
        ("a.json", [{"question_id": 7, "answer": "cat"}], {"text": "cat", "id": "7", "raw": False}),
        ("a.json", [{"questionId": "7", "prediction": "cat"}], {"text": "cat", "id": "7", "raw": False}),
        ("a.json", [{"image": "a.jpg", "answer": "cat"}], {"text": "cat", "image": "a.jpg", "raw": False}),
        ("a.jsonl", {"question_id": "v7", "prediction": "B"}, {"text": "B", "id": "v7", "raw": False}),
        ("a.json", {"v1_0": "A cat."}, {"text": "A cat.", "id": "v1_0"}),
        ("a.json", {"acc": 1.5, "results": {"7": 0}, "outputs": {"7": "A"}}, {"text": "A", "id": "7"}),
        (
            "a.jsonl",  # the question is `text` where the answer is another field
            {"question_id": 7, "category": "random", "image": "a.jpg", "text": "Is it?", "answer": "No"},
            {"text": "No", "id": "7", "group": "random", "image": "a.jpg", "question": "Is it?", "raw": False},
        ),
        ("a.jsonl", {"question_id": 7, "answer": 2}, {"text": "2", "id": "7", "raw": False}),
        ("a.jsonl", {"question_id": 7, "text": ""}, {"text": "", "id": "7"}),
    ],
)
def test_json(tmp_path, name, content, expected):
    (answer,) = read(tmp_path / name, json.dumps(content) + "\n")
    assert answer == Answer(place=answer.place, **expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
def test_lines_are_known_by_their_content(tmp_path, name):
    lines = [LLAVA, LLAVA | {"question_id": 8, "text": "Dog\n\u2028"}]
    answers = read(tmp_path / name, "\ufeff" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert [(answer.text, answer.place.rpartition(":")[2]) for answer in answers] == [
        ("Cat", "1"),
        ("Dog\n\u2028", "3"),
    ]


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_tables(tmp_path, name, delimiter):
    """MMBench's upload has the truth as `answer` beside the `prediction`."""
    rows = [["index", "question", "answer", "prediction"], ["3", '"a\nb"', "A", "B"], ["4", "c", "A", ""]]
    answers = read(tmp_path / name, "\n".join(delimiter.join(row) for row in rows))
    assert [(answer.id, answer.question, answer.text) for answer in answers] == [("3", "a\nb", "B"), ("4", "c", "")]
    assert answers[1].place.endswith(f"{name}:4")


def test_mmes_folder(tmp_path):
    read(tmp_path / "mme" / "count.txt", "0001.txt\tIs it?\tYes\tYes, it is\r\n\n0001.txt\tIs it not?\tNo\t\n")
    answers = read_answers([tmp_path / "mme"])
    assert [(each.group, each.image, each.question, each.text) for each in answers] == [
        ("count", "0001.txt", "Is it?", "Yes, it is"),
        ("count", "0001.txt", "Is it not?", ""),
    ]


def test_answers_of_several_ranks(tmp_path):
    for name in ("answers.jsonl", "answers.rank1.jsonl"):
        dump_lines(tmp_path / name, [{"id": name, "answer": "x"}])
    assert [answer.id for answer in read_answers([tmp_path])] == ["answers.jsonl", "answers.rank1.jsonl"]
    assert len(read_answers([tmp_path / "answers.jsonl", tmp_path / "answers.rank1.jsonl"])) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"id": 1, "answer": "x"}\n{"id": 2}\n',
            "a.jsonl:2: no answer: one of the fields prediction, answer",
        ),
        ("a.jsonl", '{"id": 1, "answer": "x"}\n[2]\n', "a.jsonl:2: a JSON object is expected, not list"),
        ("a.jsonl", '{"id": 1, "answer": "x"}\n{"id": \n', "a.jsonl:2: not JSON: "),
        ("a.jsonl", '{"id": 1, "answer": null}\n', "a.jsonl:1: `answer` is null, not the text of an answer"),
        ("a.jsonl", '{"id": 1, "answer": ["x"]}\n', 'a.jsonl:1: `answer` is \\["x"\\], not the text'),
        ("a.jsonl", '{"id": 1, "answer": true}\n', "a.jsonl:1: `answer` is true"),
        ("a.json", '[{"id": 1, "answer": "x"}, 3]', "a.json, item 1: a JSON object is expected, not int"),
        ("a.json", '[{"id": 1,\n "answer": "x"}', "a.json:2: not JSON"),
        ("a.json", "[" * 100_000, "a.json:1: not JSON that can be read"),
        ("a.json", '{"a": ' + "[" * 100_000, "a.json:1: not JSON that can be read"),
        ("a.json", '{"1": 1}', "a.json:1: no answer"),
        ("a.json", "answers", "a.json:1: unknown format; JSON lines or a JSON list"),
        ("a.json", "", "a.json: no answers"),
        ("a.json", "[]", "a.json: no answers"),
        ("a.tsv", "index\tprediction\n1\tA\tB\n", "a.tsv:2: more cells than the header has columns"),
        ("a.tsv", "index\tprediction\n1\n", "a.tsv:2: fewer cells than the header has columns"),
        ("a.tsv", "index\tguess\n1\tA\n", "a.tsv:2: no answer"),
        ("count.txt", "a\tb\tYes\n", "count.txt:1: 3 fields, not the four of MME's files"),
        ("a.xlsx", "x", "a.xlsx: save the table as .tsv or .csv first"),
    ],
)
def test_files_that_are_not_answers(tmp_path, name, text, message):
    with pytest.raises(LitPruneError, match=message):
        read(tmp_path / name, text)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(LitPruneError, match="nowhere: no such file or folder"):
        read_answers([tmp_path / "nowhere"])
    with pytest.raises(LitPruneError, match=r"neither MME's CATEGORY.txt nor answers\*.jsonl"):
        read_answers([tmp_path])
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(LitPruneError, match=r"a.json: not UTF-8 text"):
        read_answers([tmp_path / "a.json"])


def test_llavas_question_files_name_image_and_question(tmp_path):
    path = dump_lines(
        tmp_path / "q.jsonl", [{"question_id": 7, "image": "a.jpg", "text": "Is it?", "category": "random"}]
    )
    answer = Answer("No", "x:1", id="7", question="prompt")
    assert complete([answer], path) == [Answer("No", "x:1", id="7", image="a.jpg", question="Is it?", group="random")]
    named = Answer("No", "x:1", id="9", image="b.jpg")
    assert complete([named], path) == [named]
    with pytest.raises(LitPruneError, match=r"x:1: .*q.jsonl has no question 8"):
        complete([Answer("No", "x:1", id="8")], path)
    with pytest.raises(LitPruneError, match=r"q.jsonl:1: no field 'question_id'"):
        complete([answer], dump_lines(path, [{"id": 7}]))


# -- joining --------------------------------------------------------------------------------------------------------
def by_id(questions: list[Question], answers: list[Answer]) -> Joined:
    return join(questions, answers, lambda question: [str(question.id)], lambda answer: answer.id)


NUMBERS = st.lists(st.integers(0, 12), unique=True, max_size=12)


@settings(max_examples=100)
@given(NUMBERS, NUMBERS, st.randoms())
def test_joining_restated(asked, answered, random):
    """Each question gets the answer of its id, whatever the order; the rest is missing or extra."""
    questions = [Question(n, "", "", index=i) for i, n in enumerate(asked)]
    answers = [Answer(f"to {n}", f"x:{n}", id=str(n)) for n in answered]
    repeated = random.choices(answers, k=3) if answers else []
    shuffled = random.sample(answers + repeated, len(answers + repeated))
    joined = by_id(questions, shuffled)
    assert [question for question, _ in joined.answers] == questions
    assert all(answer is None or answer.text == f"to {question.id}" for question, answer in joined.answers)
    assert {question.id for question in joined.missing} == set(asked) - set(answered)
    assert {answer.id for answer in joined.extra} == {str(n) for n in set(answered) - set(asked)}
    assert joined.repeated == sum(int(answer.id) in asked for answer in repeated)
    assert len(joined.pairs("skip")) == len(set(asked) & set(answered))
    assert joined.pairs("wrong") == joined.pairs("error") == [(q, a and a.text) for q, a in joined.answers]


def test_two_answers_to_a_question_are_named():
    answers = [Answer("Yes", "a:1", id="1"), Answer("Yes", "a:2", id="1"), Answer("No", "b:7", id="1")]
    assert by_id([Question(1, "", "")], answers[:2]).repeated == 1
    with pytest.raises(LitPruneError, match="two answers to one question: 'Yes' in a:1, 'No' in b:7"):
        by_id([Question(1, "", "")], answers)


def test_an_answer_without_a_group_is_for_all_groups():
    questions = [Question(1, "", "", group=group) for group in ("random", "popular")]
    assert not by_id(questions, [Answer("Yes", "a:1", id="1")]).missing
    joined = by_id(questions, [Answer("Yes", "a:1", id="1", group="popular")])
    assert [question.group for question in joined.missing] == ["random"]
    assert by_id([Question(1, "", "")], [Answer("Yes", "a:1", id="1", group="default")]).missing == []


# What each benchmark's answers name a question by, of the first question of its tiny copy, and what they must not lack.
NAMED = {
    "vqa": [{"id": "11"}],
    "gqa": [{"id": "201"}],
    "scienceqa": [{"id": "1"}],
    "mmbench": [{"id": "1"}],
    "seedbench": [{"id": "101"}],
    "textvqa": [
        {"id": "5"},
        {"id": "ab", "question": "What does it SAY?\nAnswer the question using a single word or phrase."},
        {"id": "ab", "question": "what does it say?\nReference OCR token: x\nAnswer the question using a single word."},
        {"id": "9", "image": "ab", "question": "What does it SAY?"},
    ],
    "vizwiz": [{"image": "VizWiz_val_00000000.jpg"}, {"id": "VizWiz_val_00000000.jpg"}],
    "pope": [
        {"image": "a.jpg", "question": "Is there a cat in the image?", "group": "random"},
        {
            "image": "a.jpg",
            "question": "Is there a cat in the imange?\nAnswer the question using a single word or phrase.",
        },
        {"image": "val2014/a.jpg", "question": " is  there an cat in the image?", "id": "88"},
    ],
    "mme": [
        {"id": "existence/0001.png", "question": "Is it a cat?\nAnswer the question using a single word or phrase."},
        {"image": "0001.txt", "question": "Is it a  cat?  Please answer yes or no.", "group": "existence"},
        {"id": "existence/images/0001.png", "question": "Is it a cat? Please answer yes or no."},
    ],
}
UNNAMED = {
    "vqa": [{}],
    "textvqa": [{"question": "What?"}],
    "vizwiz": [{}, {"id": "3"}],
    "pope": [{"id": "1"}, {"image": "a.jpg"}, {"question": "Is there a cat in the image?"}],
    "mme": [{"id": "existence/0001.png"}, {"image": "0001.png", "question": "x"}, {"question": "x", "group": "count"}],
}


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, all_ in NAMED.items() for fields in all_])
def test_answers_find_their_question(tmp_path, name, fields):
    WRITERS[name](tmp_path)
    files = benchmark(name)
    questions = files.load(tmp_path).questions
    joined = join(questions, [Answer("x", "a:1", **fields)], files.keys, files.key)
    assert not joined.extra
    found = [question for question, answer in joined.answers if answer]
    assert found[0] == questions[0]
    assert len(found) == (3 if name == "pope" and "group" not in fields else 1)


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, all_ in UNNAMED.items() for fields in all_])
def test_answers_that_name_no_question(name, fields):
    with pytest.raises(LitPruneError, match=r"^a:1: "):
        benchmark(name).key(Answer("x", "a:1", **fields))


def test_popes_answers_choose_the_version_of_the_labels(tmp_path):
    WRITERS["pope"](tmp_path)
    old = [{"question_id": 1, "image": "c.jpg", "text": "Is there an owl in the imange?", "label": "yes"}]
    dump_lines(tmp_path / "coco_pope_random_old.json", old)
    files = benchmark("pope")
    answers = [Answer("Yes", "a:1", image="c.jpg", question="Is there an owl in the image?", group="random")]
    labels = files.load(tmp_path, "random", answers)
    assert labels.files == [tmp_path / "coco_pope_random_old.json"]
    assert labels.remarks == [
        "random: read coco_pope_random_old.json, one of 2 versions there, whose questions the answers fit best"
    ]
    assert files.load(tmp_path, "random").files == [tmp_path / "coco_pope_random.json"]


def test_answers_by_llavas_ids_of_vizwiz(tmp_path):
    WRITERS["vizwiz"](tmp_path)
    path = dump_lines(tmp_path / "q.jsonl", [{"question_id": 0, "image": "VizWiz_val_00000000.jpg", "text": "What?"}])
    files = benchmark("vizwiz")
    (answer,) = complete([Answer("x", "a:1", id="0")], path)
    joined = join(files.load(tmp_path).questions, [answer], files.keys, files.key)
    assert len(joined.missing) == 1
