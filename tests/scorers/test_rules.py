"""Official scoring rules against cases of our own; their values were computed by the official scripts.

Literal restatements check what the rules compute in another way. Every frozen case next to the checkout is tried too.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_prune.errors import LitPruneError
from lit_prune.evaluation import scorers
from lit_prune.evaluation.scorers import gqa, mmbench, mme, pope, scienceqa, seedbench, textvqa, vizwiz, vqa
from lit_prune.evaluation.scorers.cases import evaluate
from lit_prune.evaluation.scorers.rule import Question
from lit_prune.evaluation.scorers.words import CONTRACTIONS, evalai, leave_one_out, normalise

FOLDERS = [parent / "shared" / "benchmarks" / "cases" for parent in Path(__file__).parents]
CASES = sorted(path for folder in FOLDERS for path in folder.glob("*.json"))
WORDS = st.sampled_from(
    ["a", "the", "dog", "two", "cant", "1,000", "2.", ".5", "no", "Yes", "t-shirt", ";", " ", "?!", ""]
)
TEXT = st.lists(WORDS, max_size=4).map(" ".join) | st.text(max_size=8)


def test_benchmarks_are_found_by_name():
    rules = {
        scorers.rule_of(path.stem).__class__ for path in Path(scorers.__file__).parent.glob("*.py") if _is_rule(path)
    }
    assert len(rules) == 9
    assert all(rule().title and rule().headline for rule in rules)


def _is_rule(path: Path) -> bool:
    return "\nRULE = " in path.read_text()


# -- normalisation --------------------------------------------------------------------------------------------------

NORMALISED = [  # an answer, as the VQA evaluation has it, as EvalAI's processor has it
    ("Three zebras", "3 zebras", "3 zebras"),
    ("NONE.", "0", "0"),
    ("the tea, an egg, a bun", "tea egg bun", "tea egg bun"),
    ("it's 7.5", "it's 7.5", "it 's 7.5"),
    ("7.", "7", "7"),
    ("2,500 men", "2500 men", "2500 men"),
    ("2, 500 men", "2 500 men", "2 500 men"),
    ("12:45 p.m.", "12:45 pm", "12:45 pm"),
    ("semi-truck", "semi truck", "semi truck"),
    ("semi - truck", "semi truck", "semi truck"),
    ("well-known -", "wellknown", "wellknown"),
    ("well-known -\n", "wellknown", "wellknown"),
    ("north/south", "north south", "north south"),
    ("[exit]", "exit", "exit"),
    ('say "cheese"', "say cheese", "say cheese"),
    ("whats up", "what's up", "what's up"),
    ("who's", "who's", "who 's"),
    ("kid's bike", "kid's bike", "kid 's bike"),
    ("Ive", "ive", "ive"),
    ("it'dve", "it'd've", "it'd've"),
    ("well...done", "welldone", "welldone"),
    ("a.b.c.1", "abc.1", "abc.1"),
    ("9 lives!", "9 lives", "9 lives"),
    ("?!", "", ""),
    ("A", "", ""),
    ("snow\nman", "snow man", "snow man"),
    ("  the   end ", "end", "end"),
    ("." * 33 + "x", ".x", ".x"),  # only 32 full stops go
    ("\u0664,\u0665", "\u0664\u0665", "\u0664\u0665"),
    ("café", "café", "café"),
]


@pytest.mark.parametrize(("text", "vqa_form", "evalai_form"), NORMALISED)
def test_normalisation(text, vqa_form, evalai_form):
    assert normalise(text) == vqa_form
    assert evalai(text) == evalai_form
    assert vqa.VQA().frozen({"kind": "normalise", "text": text}) == vqa_form
    assert textvqa.TextVQA().frozen({"kind": "normalise", "text": text}) == evalai_form


def test_contractions_are_complete():
    """The official table has 120 entries; two are no change and four have capitals, so that they never apply."""
    assert len(CONTRACTIONS) == 114
    assert sum("'" in word for word in CONTRACTIONS.values()) == 113
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert all(normalise(word) == CONTRACTIONS[word] for word in CONTRACTIONS)


# -- VQA, TextVQA, VizWiz -------------------------------------------------------------------------------------------
def accuracy(rule: scorers.Rule, answers: list[str], answer: str | None, raw: bool = False) -> float:
    rule.raw = raw
    return rule.score([(Question(1, "", "", {"answers": answers}), answer)])["accuracy"]


@pytest.mark.parametrize("rule", [vqa.VQA(), vizwiz.VizWiz()])
def test_vqa_normalises_only_where_annotators_differ(rule):
    assert accuracy(rule, ["cat"] * 10, "Cat") == 0
    assert accuracy(rule, ["cat"] * 10, " cat\n") == 100
    assert accuracy(rule, ["cat"] * 9 + ["dog"], "the Cat.") == 100
    assert accuracy(rule, ["The Cat"] * 9 + ["dog"], "cat") == 100
    assert accuracy(rule, ["cat"] * 10, "Cat.", raw=True) == 100, "what LLaVA does before a submission"
    assert accuracy(rule, ["a cat"] * 10, "a cat", raw=True) == 0, "its processing drops the article"
    assert accuracy(rule, ["cat"] * 10, None, raw=True) == 0


def test_textvqa_normalises_always():
    assert accuracy(textvqa.TextVQA(), ["cat"] * 10, "The Cat.") == 100
    assert accuracy(textvqa.TextVQA(), ["cat"] * 10, None) == 0


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_consensus_by_hand(same, expected):
    answers = ["cat"] * same + ["dog"] * (10 - same)
    assert accuracy(vqa.VQA(), answers, "cat") == expected
    assert accuracy(textvqa.TextVQA(), answers, "cat") == pytest.approx(expected)


def test_textvqa_takes_ten_answers_as_the_official_script_does():
    with pytest.raises(LitPruneError, match="question 1 has 9 answers"):
        accuracy(textvqa.TextVQA(), ["cat"] * 9, "cat")
    with pytest.raises(LitPruneError, match="question 1 has no answers"):
        accuracy(vqa.VQA(), [], "cat")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_leave_one_out_restated(answers, answer):
    """Every annotator in turn is taken out of the list."""
    each = [Fraction(min(3, [*answers[:n], *answers[n + 1 :]].count(answer)), 3) for n in range(len(answers))]
    assert leave_one_out(answers, answer) == pytest.approx(float(sum(each) / len(each)))


@settings(max_examples=50)
@given(st.lists(TEXT, min_size=10, max_size=10), TEXT, st.randoms())
def test_vqa_does_not_depend_on_the_annotators_order(answers, answer, random):
    shuffled = random.sample(answers, 10)
    for rule in (vqa.VQA(), textvqa.TextVQA()):
        first = accuracy(rule, answers, answer)
        assert 0 <= first <= 100
        assert accuracy(rule, shuffled, answer) == pytest.approx(first)


def test_vqa_by_answer_type():
    questions = [Question(n, "", "", {"answers": ["cat"] * 10, "type": kind}, index=n) for n, kind in enumerate("xxy")]
    figures = vqa.VQA(raw=False).score(zip(questions, ["cat", "dog", "dog"], strict=True))
    assert figures == {"accuracy": 33.33, "x": 50.0, "y": 0.0}


# -- POPE -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"), ("no cat", "no"), ("I am not sure, yes", "no"), ("no,", "no"), ("There is, no", "no"),
        (" No", "no"), ("Yes. No", "yes"), ("NO", "yes"), ("Not at all", "yes"), ("no!", "yes"), ("No\n", "yes"),
        ("no\tcat", "yes"), ("cannot", "yes"), ("", "yes"), (".No", "yes"),
    ],
)  # fmt: skip
def test_pope_reads_answers(text, answer):
    assert pope.Pope().frozen({"kind": "parse", "text": text}) == answer


def pope_questions(labels: dict[str, str]) -> list[Question]:
    """One question for each letter of a split's labels, y or n."""
    pairs = [(split, letter) for split, letters in labels.items() for letter in letters]
    names = {"y": "yes", "n": "no"}
    return [Question(i, "", "", {"label": names[letter]}, split, i) for i, (split, letter) in enumerate(pairs)]


def test_pope_by_hand():
    questions = pope_questions({"random": "yynn", "popular": "yn"})
    figures = pope.Pope().score(zip(questions, ["Yes", "No", "Yes", "No", "Yes", "No"], strict=True))
    assert [figures[f"random/{name}"] for name in pope.NAMES] == [50, 50, 50, 50, 50]
    assert [figures[f"popular/{name}"] for name in pope.NAMES] == [100, 100, 100, 100, 50]
    assert figures["f1"] == 75
    assert pope.Pope().remarks(figures) == []


def test_pope_of_one_split_has_plain_names():
    assert set(pope.Pope().score([(q, "Yes") for q in pope_questions({"random": "yn"})])) == set(pope.NAMES)


@pytest.mark.parametrize(
    ("labels", "answers", "expected"),
    [
        ("yn", ["No", "No"], {"f1": 0.0, "precision": None, "recall": 0.0, "accuracy": 50.0, "yes_ratio": 0.0}),
        ("nn", ["No", "Yes"], {"f1": 0.0, "precision": 0.0, "recall": None, "accuracy": 50.0, "yes_ratio": 50.0}),
        ("yn", ["No", "Yes"], {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.0, "yes_ratio": 50.0}),
    ],
)
def test_pope_without_true_positives(labels, answers, expected):
    """The official script raises ZeroDivisionError for each of these."""
    questions = pope_questions({"random": labels})
    figures = pope.Pope().score(zip(questions, answers, strict=True))
    assert figures == expected
    (remark,) = pope.Pope().remarks(figures)
    assert "the official script stops" in remark
    names = [question.reference["label"] for question in questions]
    with pytest.raises(LitPruneError, match="divides by zero"):
        pope.Pope().frozen({"kind": "set", "labels": names, "texts": answers})


def test_pope_undefined_in_one_split_leaves_the_means_of_others():
    questions = pope_questions({"random": "yn", "popular": "yn"})
    figures = pope.Pope().score(zip(questions, ["No", "No", "Yes", "No"], strict=True))
    assert (figures["f1"], figures["precision"], figures["popular/precision"]) == (50.0, None, 100.0)
    assert pope.Pope().remarks(figures)


def test_pope_counts_a_missing_answer_as_wrong():
    figures = pope.Pope().score((q, None) for q in pope_questions({"random": "yn"}))
    assert (figures["accuracy"], figures["yes_ratio"]) == (0, 50)


# -- MME ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, a cat", "yes"), ("  no", "no"), ("   no", "other"), ("know", "no"), ("Eyes", "yes"), ("yno", "no"),
        ("Sure", "other"), ("", "other"), ("The yes", "other"), ("no, yes", "no"),
    ],
)  # fmt: skip
def test_mme_reads_answers(text, answer):
    assert mme.MME().frozen({"kind": "parse", "text": text}) == answer


def mme_questions(categories: dict[str, list[str]]) -> list[Question]:
    """Pairs of questions, yes first, about each image of a category."""
    return [
        Question(f"{image}{label}", image, "", {"label": label}, category, index)
        for category, images in categories.items()
        for index, (image, label) in enumerate((image, label) for image in images for label in ("Yes", "No"))
    ]


def test_mme_by_hand():
    questions = mme_questions({"count": ["a", "b"], "OCR": ["a"], "code_reasoning": ["a"]})
    answers = ["Yes", "No", "Yes", "Yes", "No", "Yes", "Yes", "No"]
    figures = mme.MME().score(zip(questions, answers, strict=True))
    assert figures == {"perception": 125, "cognition": 200, "count": 125, "OCR": 0, "code_reasoning": 200}


def test_mme_pairs_by_image_wherever_its_questions_stand():
    questions = mme_questions({"count": ["a", "b"]})
    answers = dict(zip([q.id for q in questions], ["Yes", "No", "No", "Yes"], strict=True))
    apart = [questions[0], questions[2], questions[1], questions[3]]
    assert mme.MME().score((q, answers[q.id]) for q in apart)["count"] == 100


def test_mme_knows_only_yes_and_no():
    with pytest.raises(LitPruneError, match="question x: the label is 'maybe'"):
        mme.MME().judge(Question("x", "", "", {"label": "Maybe"}, "count"), "Yes")


# -- GQA ------------------------------------------------------------------------------------------------------------
def record(answer: str, structural: str = "query", balanced: bool = True, group: str | None = "g", **rest) -> dict:
    types = {"structural": structural, "semantic": "obj", "detailed": rest.pop("detailed", "x")}
    return {
        "question": "q?", "answer": answer, "isBalanced": balanced, "groups": {"global": group}, "types": types,
        **rest,
    }  # fmt: skip


def test_gqa_by_hand():
    records = [record("cat"), record("yes", "verify"), record("no", "verify"), record("red", balanced=False)]
    answers = ["Cat.", "yes..", "nope", "red"]
    questions = [Question(n, "", "", each, index=n) for n, each in enumerate(records)]
    figures = gqa.GQA().score(zip(questions, answers, strict=True))
    assert figures["accuracy"] == pytest.approx(200 / 3)
    assert (figures["open"], figures["binary"]) == (100, 50)
    assert (figures["structural/query"], figures["structural/verify"], figures["semantic/obj"]) == (
        100,
        50,
        2 / 3 * 100,
    )
    # of the three true answers of the group, one is never given: (0 - 1) ** 2 / 1
    assert figures["distribution"] == pytest.approx(0.01)


def test_gqa_takes_submissions_as_they_are():
    question = Question(1, "", "", record("cat"))
    assert gqa.GQA().score([(question, "Cat.")])["accuracy"] == 100
    assert gqa.GQA(raw=False).score([(question, "Cat.")])["accuracy"] == 0
    assert gqa.GQA().score([(question, " cat")])["accuracy"] == 0


def test_gqa_choices():
    choices = {"valid": ["cat", "dog"], "plausible": ["cat"]}
    questions = [
        Question(1, "", "", record("cat", choices=choices)),
        Question(2, "", "", record("color", detailed="twoCommon", choices=choices), index=1),
    ]
    figures = gqa.GQA().score([(questions[0], "dog"), (questions[1], "shape")])
    assert (figures["validity"], figures["plausibility"]) == (100, 50)
    assert "validity" not in gqa.GQA().score([(Question(1, "", "", record("cat")), "dog")])


def test_gqa_without_groups_has_no_distribution():
    figures = gqa.GQA().score([(Question(1, "", "", record("cat", group=None)), "cat")])
    assert figures["distribution"] is None
    assert "official script stops" in gqa.GQA().remarks(figures)[0]
    assert gqa.GQA().score([(Question(1, "", "", record("cat", balanced=False)), "cat")]) == {}


# -- ScienceQA ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "parsed", "index"),
    [
        ("B", "B", 1), ("D", "D", -1), ("C. red", "C", 2), ("C. ", "C", 2), ("C.", "FAILED", -1),
        ("C.red", "FAILED", -1), ("F", "FAILED", -1), ("The answer is B.", "B", 1), ("The answer is B", "FAILED", -1),
        ("I think. The answer is C, red", "C", 2), ("The answer is B\n", "FAILED", -1),
        ("The answer is A. The answer is A.", "FAILED", -1), ("The answer is X.", "X", -1), ("", "FAILED", -1),
        ("AB", "FAILED", -1),
    ],
)  # fmt: skip
def test_scienceqa_reads_answers(text, parsed, index):
    case = {"kind": "parse", "choices": 3, "text": text}
    assert scienceqa.ScienceQA().frozen(case) == {"parsed": parsed, "index": index}


def test_scienceqa_counts_what_is_missing_as_the_official_script_does():
    problem = {"choices": ["x", "y"], "answer": 0, "image": "image.png"}
    questions = [scienceqa.question(str(n), problem, index=n) for n in range(3)]
    questions.append(scienceqa.question("3", problem | {"image": None}, index=3))
    figures = scienceqa.ScienceQA().score(zip(questions, ["A", "B", None, "A"], strict=True))
    assert figures == {"img_accuracy": 50.0, "accuracy": 50.0}
    figures = scienceqa.ScienceQA().score([(questions[3], "A")])
    assert figures == {"img_accuracy": None, "accuracy": 100}
    assert scienceqa.ScienceQA().remarks(figures)


# -- MMBench --------------------------------------------------------------------------------------------------------

KITES = {"A": "red kite", "B": "blue kite", "C": "two kites"}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("A", "A"),
        ("c", False),
        ("(B)", "B"),
        ("B) blue kite", "B"),
        ("The correct answer is **c**.", "C"),
        ("I see two kites", "C"),
        ("a red kite", "A"),
        ("red or blue kite", "B"),
        ("A B", False),
        ("A is a good option for everyone today", False),
        ("Z", "Z"),
        ("#C!", "C"),
        ("D", False),
        ("I can't process this file.", "Z"),
        ("blue kite " * 9, False),
        ("The answer is a dog", "A"),
        ("", False),
        ("Failed to obtain answer via API: A", False),
    ],
)
def test_mmbench_reads_answers(text, option):
    assert mmbench.MMBench().frozen({"kind": "parse", "text": text, "choices": KITES}) == option


def rotations(number: int, count: int, ability: str = "x") -> list[Question]:
    """The rotations of a question with two options, of which A is right first, then B."""
    options = ["cat", "dog"]
    return [
        Question(
            number + k * mmbench.ROTATION,
            "",
            "",
            {"choices": dict(zip("AB", options[k:] + options[:k], strict=True)), "answer": "AB"[k], "ability": ability},
            index=2 * number + k,
        )
        for k in range(count)
    ]


def test_mmbench_wants_every_rotation():
    questions = rotations(1, 2) + rotations(2, 2, "y") + rotations(3, 1, "y")
    figures = mmbench.MMBench().score(zip(questions, ["A", "B", "A", "A", "cat"], strict=True))
    assert figures == {"accuracy": pytest.approx(200 / 3), "vanilla": 100, "x": 100, "y": 50}


def test_mmbench_leaves_out_rotations_without_a_first():
    first, second = rotations(1, 2)
    assert mmbench.MMBench().score([(second, "B")]) == {}
    assert mmbench.MMBench().score([(second, "A"), (first, "A")])["accuracy"] == 0


# -- SEED-Bench -----------------------------------------------------------------------------------------------------
def test_seedbench_by_hand():
    record = {"question": "q", "data_id": "x", "answer": "A"}
    kinds = [("image", 1), ("image", 2), ("image", 10), ("video", 11)]
    questions = [
        seedbench.question(record | {"question_id": n, "data_type": data, "question_type_id": kind}, index=n)
        for n, (data, kind) in enumerate(kinds)
    ]
    figures = seedbench.SeedBench().score(zip(questions, ["A", "a", "A.", None], strict=True))
    assert figures["image"] == pytest.approx(100 / 3)
    assert (figures["video"], figures["all"], figures["type 1"], figures["type 11"]) == (0, 25, 100, 0)
    assert list(figures)[3:] == ["type 1", "type 2", "type 10", "type 11"]


# -- all ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_frozen_cases(path):
    """To the last bit."""
    rule = scorers.rule_of(path.stem)
    for number, case in enumerate(json.loads(path.read_text())["cases"]):
        expected, got = evaluate(rule, case, str(number))
        if "error" in str(expected):
            assert set(expected) == set(got) == {"error"}
        else:
            assert got == expected, number


@pytest.mark.parametrize("name", [path.stem for path in Path(scorers.__file__).parent.glob("*.py") if _is_rule(path)])
def test_no_answers_give_no_figures(name):
    assert not [value for value in scorers.rule_of(name).score([]).values() if value is not None]
