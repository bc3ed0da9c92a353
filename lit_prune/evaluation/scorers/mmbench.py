"""MMBench: multiple choice under rotation of the options, as VLMEvalKit's exact matching computes it."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by, share

ROTATION = 1_000_000  # a rotated question has the first one's index plus a multiple of this
NONE_OF_THEM = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
SENTENCE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 4  # a letter counts among these only


class MMBench(Rule):
    """Circular accuracy in percent: a question is right if all rotations of its options are.

    `vanilla` takes the first rotation alone; ability groups are circular. References: `choices` by letter, `answer`,
    and `ability`, the official `l2-category`, if there is one. Answers that name no option are wrong: no GPT is asked,
    which the server does.
    """

    title, headline = "MMBench", "accuracy"

    def judge(self, question: Question, answer: str | None) -> Judged:
        reference = question.reference
        right = answer is not None and parse(answer, reference["choices"]) == reference["answer"]
        return {"index": int(question.id), "right": right, "ability": reference.get("ability", "")}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        groups = _circles(judged)
        if not groups:
            return {}
        hits = [{"ability": part[0]["ability"], "right": all(e["right"] for e in part)} for part in groups.values()]
        abilities = {
            name: share([each["right"] for each in part]) for name, part in sorted(by(hits, "ability").items())
        }
        first = [part[0]["right"] for part in groups.values()]
        overall = {"accuracy": share([each["right"] for each in hits]), "vanilla": share(first)}
        return overall | {name: value for name, value in abilities.items() if name}

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "parse":
            return parse(case["text"], case["choices"]) or False
        judged = []
        for row in case["rows"]:
            reference = {"choices": choices(row), "answer": row["answer"]}
            judged.append(self.judge(Question(row["index"], "", row["question"], reference), str(row["prediction"])))
        circles = _circles(judged)
        if not circles:
            raise LitPruneError("no question is there in its first rotation, so that the accuracy divides by zero")
        hits = {str(index): int(all(each["right"] for each in part)) for index, part in circles.items()}
        vanilla = [part[0]["right"] for part in circles.values()]
        return {
            "hit": hits,
            "circular_accuracy": sum(hits.values()) / len(hits),
            "vanilla_accuracy": sum(vanilla) / len(vanilla),
        }


def choices(row: Mapping[str, Any]) -> dict[str, str]:
    """The options of a row of the official table, by letter; empty cells are none."""
    return {letter: str(row[letter]) for letter in ascii_uppercase if row.get(letter) is not None}


def parse(text: str, choices: Mapping[str, str]) -> str | None:
    """Read the option that an answer names: its letter or its text; "Z" for a refusal, None for no option."""
    return _letter(text, choices) or _option(text.lower(), choices)


def _letter(text: str, choices: Mapping[str, str]) -> str | None:
    if NO_ANSWER in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return NONE_OF_THEM
    words = text.translate(MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    # In "the answer is a cat" this reads the article as option A, as the official code does.
    sentence = SENTENCE.search(text)
    return sentence[1].upper() if sentence and sentence[1].upper() in choices else None


def _option(text: str, choices: Mapping[str, str]) -> str | None:
    """The one option whose text is in an answer that is not much longer than the options together."""
    options = {letter: str(option).lower() for letter, option in choices.items()}
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option in text]
    return named[0] if len(named) == 1 else None


def _circles(judged: Sequence[Judged]) -> dict[int, list[Judged]]:
    """The rotations of each question, the first one at the front; without the first, a question is left out."""
    groups: dict[int, list[Judged]] = {each["index"]: [] for each in judged if each["index"] < ROTATION}
    for each in sorted(judged, key=lambda each: each["index"] >= ROTATION):
        groups.get(each["index"] % ROTATION, []).append(each)
    return groups


RULE = MMBench
