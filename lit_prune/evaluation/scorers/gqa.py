"""GQA: exact answers over balanced questions, as the official eval.py (kept in MILVLG/openvqa) computes it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by, share, total

COMMON = ["color", "material", "shape"]  # the choices of questions about what objects have in common
COUNTED = ("accuracy", "binary", "open", "validity", "plausibility")


class GQA(Rule):
    """Accuracy in percent: of all balanced questions, of binary and open ones, by structural and semantic type.

    `distribution` is a chi-square statistic of predicted against true answers, lower is better, in the official unit.
    References: the record of the official questions file, and its entry of the choices file, if there is one, as
    `choices`: with it come `validity` and `plausibility`. Raw answers lose trailing full stops and capitals, as in
    LLaVA's convert_gqa_for_eval.py.
    """

    title, headline, fine = "GQA", "accuracy", ("distribution",)
    processed = True
    undefined = "the distribution divides by zero: no question belongs to a group; the official script stops here"

    def prepare(self, text: str) -> str:
        return text.rstrip(".").lower()

    def judge(self, question: Question, answer: str | None) -> Judged:
        record = question.reference
        types, gold = record["types"], record["answer"]
        judged = {
            "right": answer == gold,
            "balanced": record["isBalanced"],
            "kind": "open" if types["structural"] == "query" else "binary",
            "structural": types["structural"],
            "semantic": types["semantic"],
            "group": record["groups"]["global"],
            "gold": gold,
            "answer": answer,
        }
        for name, choices in (("validity", "valid"), ("plausibility", "plausible")):
            if "choices" in record:
                common = "Common" in types["detailed"]
                judged[name] = answer in (COMMON if common else record["choices"][choices])
        return judged

    def figures(self, judged: Sequence[Judged]) -> Figures:
        balanced = [each for each in judged if each["balanced"]]
        if not balanced:
            return {}
        kinds = {kind: [each for each in balanced if each["kind"] == kind] for kind in ("binary", "open")}
        figures: Figures = {"accuracy": _accuracy(balanced), **{kind: _accuracy(kinds[kind]) for kind in kinds}}
        for name in ("validity", "plausibility"):
            if all(name in each for each in balanced):
                figures[name] = _accuracy(balanced, name)
        figures["distribution"] = _chi_square(balanced)
        for field in ("structural", "semantic"):
            figures |= {f"{field}/{kind}": _accuracy(part) for kind, part in sorted(by(balanced, field).items())}
        return figures

    def frozen(self, case: dict[str, Any]) -> Any:
        judged = []
        for index, (qid, record) in enumerate(case["questions"].items()):
            choices = {"choices": case["choices"][qid]} if "choices" in case else {}
            question = Question(qid, "", record["question"], {**record, **choices}, index=index)
            judged.append(self.verdict(question, _raw(case["raw"], qid)))
        figures = self.figures(judged)
        if figures.get("distribution") is None:
            raise LitPruneError(self.undefined)
        nested: dict[str, Any] = {"structural": {}, "semantic": {}}
        for name, value in figures.items():
            field, _, kind = name.partition("/")
            (nested[field] if kind else nested)[kind or name] = value
        return nested


def _raw(answers: dict[str, str], qid: str) -> str:
    if qid not in answers:
        raise LitPruneError(f"no answer to question {qid}; the official script stops here")
    return answers[qid]


def _accuracy(judged: Sequence[Judged], name: str = "right") -> float:
    return share([each[name] for each in judged]) or 0.0


def _chi_square(judged: Sequence[Judged]) -> float | None:
    """Chi-square of predicted against true answers per group, averaged by the groups' sizes, over 100."""
    groups = {name: part for name, part in by(judged, "group").items() if name is not None}
    size = sum(len(part) for part in groups.values())
    weighted = 0.0
    for part in groups.values():
        gold = Counter(each["gold"] for each in part)
        answers = Counter(each["answer"] for each in part)
        weighted += total((answers[answer] - count) ** 2 / count for answer, count in gold.items()) * len(part)
    return weighted / size / 100 if size else None


RULE = GQA
