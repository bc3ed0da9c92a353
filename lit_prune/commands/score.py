"""Score answers to a public benchmark by its official rule."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.data.benchmarks import Benchmark, Labels, benchmark
from lit_prune.errors import LitPruneError
from lit_prune.evaluation import scorers
from lit_prune.evaluation.scorers.answers import Answer, Joined, complete, join, read_answers
from lit_prune.evaluation.scorers.cases import check
from lit_prune.evaluation.scorers.rule import Figures, Missing, Rule
from lit_prune.files.writing import written_whole


def run(
    benchmark: str,
    answers: list[Path] | None = None,
    root: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    missing: Missing | None = None,
    raw: bool | None = None,
    out: Path | None = None,
    cases: Path | None = None,
) -> None:
    """Score answers to a public benchmark by its official rule, or check the rule with frozen cases.

    The benchmarks are vqa, textvqa, vizwiz, gqa, pope, mme, scienceqa, mmbench and seedbench. Answers may be LLaVA's
    JSON lines (question_id, prompt, text), an answers.jsonl of `lightning predict`, or what is submitted: VQA's list
    of question_id and answer, GQA's of questionId and prediction, MME's folder of text files, MMBench's table as .tsv
    or .csv, SEED-Bench's JSON lines. They are joined to the labels by what names a question, never by position. Two
    different answers to a question are an error; answers to no question are counted and reported.

    Args:
        benchmark: Name of the benchmark, e.g. lit-prune score pope.
        answers: Files of answers, or a folder of MME's text files.
        root: Folder of the official files, as downloaded; docs/benchmarks.md says where they are had.
        split: Part of the benchmark, e.g. --split popular; by default the one that LLaVA-1.5 reports, if it has labels.
        questions: LLaVA's question file, for answers that have its ids alone, e.g. --questions llava_pope_test.jsonl;
            by default the one in --root.
        missing: Questions without an answer: error stops, wrong counts them, skip leaves them out. By default as the
            official script: wrong for scienceqa and seedbench, else error.
        raw: Answers are a model's own words, and LLaVA's processing before a submission is needed (vqa, vizwiz, gqa).
            By default it is for `text` fields and our answers.jsonl, and is not for submissions.
        out: JSON file for the figures, e.g. --out pope.json.
        cases: File of frozen cases to check in place of answers; the first difference ends in exit code 1.

    Examples:
        lit-prune score pope --answers answers.jsonl --root data/pope
        lit-prune score vqa --answers answers.json --root data/vqav2 --out vqa.json
        lit-prune score mme --answers eval_tool/answers --root data/MME_Benchmark_release_version
        lit-prune score gqa --cases cases/gqa.json
    """
    chosen = _benchmark(benchmark)
    if cases is not None:
        _check_cases(chosen, cases, alone=not answers and not root)
        return
    if not answers or root is None:
        raise LitPruneError("give --answers FILE and --root DIR, or --cases FILE")
    given = _named(chosen, read_answers(answers), root, questions)
    rule = scorers.rule_of(chosen.rule, raw=True if raw is None else raw)
    if rule.processed and raw is None:
        rule.raw = _raw(given)
    labels = chosen.load(root, split, given)
    if unlabelled := [question for question in labels.questions if not question.reference]:
        raise LitPruneError(f"{labels.files[0]}: {len(unlabelled)} questions have no public labels; submit the answers")
    joined = join(labels.questions, given, chosen.keys, chosen.key)
    remarks = labels.remarks + _remarks(chosen, rule, joined, missing or rule.missing)
    figures = rule.score(joined.pairs(missing or rule.missing))
    remarks += rule.remarks(figures)
    _print(rule, figures, len(joined.answers), remarks)
    if out is not None:
        _write(out, _report(benchmark, rule, figures, joined, labels, answers) | {"remarks": remarks})


def _check_cases(chosen: Benchmark, cases: Path, alone: bool) -> None:
    if not alone:
        raise LitPruneError("--cases checks the rule alone: give it without --answers and --root")
    count = check(scorers.rule_of(chosen.rule), cases)
    console.out.print(f"{cases}: {count} of {count} cases agree", markup=False, highlight=False, soft_wrap=True)


def _print(rule: Rule, figures: Figures, questions: int, remarks: list[str]) -> None:
    console.out.print(f"{rule.title}, {questions} questions", style="bold", highlight=False)
    console.out.print(_table(rule, figures))
    for remark in remarks:
        console.say(f"note: {remark}")


def _benchmark(name: str) -> Benchmark:
    found = benchmark(name)
    if found.rule is None:
        raise LitPruneError(f"{name} can't be scored offline: its answers are graded by GPT-4. {found.source}")
    return found


def _named(chosen: Benchmark, given: list[Answer], root: Path, questions: Path | None) -> list[Answer]:
    """Answers with the image and question that their ids stand for, where LLaVA's question file says it."""
    if questions is None and chosen.question_file and (root / chosen.question_file).exists():
        questions = root / chosen.question_file
    return given if questions is None else complete(given, questions)


def _raw(given: list[Answer]) -> bool:
    """Whether answers are a model's own words; files of both kinds can't be scored together."""
    for answer in given:
        if answer.raw != given[0].raw:
            raise LitPruneError(
                f"{given[0].place} and {answer.place}: one has a model's own words, the other a submission; give --raw"
            )
    return given[0].raw


def _remarks(chosen: Benchmark, rule: Rule, joined: Joined, missing: Missing) -> list[str]:
    """Sentences about what did not fit; raises `LitPruneError` if questions are missing that must not be."""
    remarks = []
    absent = joined.missing
    if absent:
        first = f"the first is {absent[0].id}: {absent[0].text!r}, image {absent[0].image}"
        sentence = f"{len(absent)} of {len(joined.answers)} questions have no answer; {first}"
        if missing == "error" or len(absent) == len(joined.answers):
            reasons = [sentence, *_extra(joined), "--missing skip leaves them out, wrong counts them as wrong"]
            raise LitPruneError(f"{'. '.join(reasons)}. {chosen.source}")
        remarks.append(f"{sentence}; they {'count as wrong' if missing == 'wrong' else 'are left out'}")
    if joined.repeated:
        remarks.append(f"{joined.repeated} answers say again what another did; each question counts once")
    remarks += _extra(joined)
    if rule.processed:
        form = "processed as LLaVA does before a submission" if rule.raw else "scored as they are"
        remarks.append(f"answers were {form}; --raw {str(not rule.raw).lower()} does the other")
    return remarks


def _extra(joined: Joined) -> list[str]:
    """A sentence about answers to no question, one about those of other splits or categories."""
    groups = {question.group for question, _ in joined.answers}
    known = {None, *groups} if groups != {""} else {answer.group for answer in joined.extra}
    others = [answer for answer in joined.extra if answer.group not in known]
    extra = [answer for answer in joined.extra if answer.group in known]
    sentences = []
    if others:
        names = ", ".join(sorted({str(answer.group) for answer in others}))
        sentences.append(f"{len(others)} answers are of other parts of the benchmark ({names})")
    if extra:
        sentences.append(f"{len(extra)} answers belong to no question and are left out; the first is {extra[0].place}")
    return sentences


def _table(rule: Rule, figures: Figures) -> Table:
    table = Table()
    table.add_column("figure")
    table.add_column(rule.unit, justify="right")
    for name, value in figures.items():
        table.add_row(escape(name), rule.written(name, value), style="bold" if name == rule.headline else "")
    return table


def _report(
    name: str, rule: Rule, figures: Figures, joined: Joined, labels: Labels, answers: list[Path]
) -> dict[str, Any]:
    return {
        "benchmark": name,
        "headline": rule.headline,
        "unit": rule.unit,
        "figures": figures,
        "questions": len(joined.answers),
        "missing": len(joined.missing),
        "repeated": joined.repeated,
        "extra": len(joined.extra),
        "raw": rule.raw if rule.processed else None,
        "labels": [str(path) for path in labels.files],
        "answers": [str(path) for path in answers],
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
