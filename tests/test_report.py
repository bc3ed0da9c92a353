"""`lit-prune report`: one HTML file of comparisons, on made-up results and on a real comparison."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from tiny import ROOT

from lit_prune import cli
from lit_prune.commands import report
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.groups import Groups
from lit_prune.evaluation.report import figures, gallery, page, template
from lit_prune.evaluation.report.intervals import interval, resampled_means
from lit_prune.evaluation.report.runs import read_run
from lit_prune.evaluation.report.table import UNKNOWN, Column, Figure, Table
from lit_prune.evaluation.report.tables import all_tables, by_budget

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script>\"' onmouseover=alert(1) <img src=x onerror=alert(1)>&amp;"
LAYERS = 4


class Elements(HTMLParser):
    """Start tags with their attributes, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        self.texts.setdefault(self.open, []).append(data)

    def of(self, tag: str, kind: str = "") -> list[dict]:
        return [found for name, found in self.tags if name == tag and kind in (found.get("class") or "").split(" ")[:1]]


def sample(number: int, answer: str, full: str = "yes", reference: str = "yes", **more) -> dict:
    """Three questions an image."""
    return {
        "id": f"q{number}", "record": number, "skill": ("colour", "shape")[number % 2], "question": f"Is {number} red?",
        "reference": reference, "full": full, "answer": answer, "full_right": full == reference,
        "right": answer == reference, "agrees": full == answer, "kl": 0.5, "confidence": 0.9 if number < 4 else 0.4,
        "visual": 8.0, "total": 64,
        "kept": {"0": 8}, "masks": {"0": "ff" + 14 * "0"}, "image": f"{number // 3:016x}", **more,
    }  # fmt: skip


def cell(method: str, keep: int | None, samples: list[dict], seed: int | None = None, **more) -> dict:
    right, same = [each["right"] for each in samples], [each["agrees"] for each in samples]
    skills = {name: [each["right"] for each in samples if each["skill"] == name] for name in ("colour", "shape")}
    return {
        "method": method, "keep": keep, "seed": seed, "split": "val", "status": "measured", "retained": np.mean(right),
        "flops_reduction": 0.5, "accuracy": np.mean(right), "accuracy_se": 0.1, "questions": len(samples),
        "per_skill": {name: np.mean(hits) for name, hits in skills.items()}, "agreement": np.mean(same), "lost": 0.25,
        "gained": 0.0, "kl": 0.5, "avg_visual_tokens": 8.0, "tokens_per_layer": [8.0] * LAYERS, "kept": {"0": 8.0},
        "flops": 2e9, "flops_parts": {}, "kv_bytes": 1e6, "kappa": 0.1, "w2": 1.5, "w2_per_layer": [1.5] * LAYERS,
        "note": "", "reason": "", "cell": f"{method}-{keep}-{seed}".encode().hex(), **more,
    }  # fmt: skip


def write(folder: Path, cells: list[tuple[dict, list[dict]]]) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps([row for row, _ in cells]))
    for row, samples in cells:
        if samples:
            text = "".join(json.dumps(each) + "\n" for each in samples)
            (folder / "samples" / f"{row['cell']}.jsonl").write_text(text)
    return folder


QUESTIONS = 12
FULL = [sample(i, full, full) for i in range(QUESTIONS) for full in ["no" if i == 11 else "yes"]]
HALF = [sample(i, "yes" if i < 6 or i == 11 else "no", FULL[i]["full"]) for i in range(QUESTIONS)]
MOST = [sample(i, "maybe" if i == 0 else FULL[i]["full"], FULL[i]["full"]) for i in range(QUESTIONS)]


@pytest.fixture
def made_up(tmp_path) -> Path:
    """The full model 11 of 12 right, `half` 7, `most` 10."""
    rows = [(cell("full", None, FULL), FULL), (cell("half", 8, HALF), HALF), (cell("most", 8, MOST), MOST)]
    folder = write(tmp_path / "run", rows)
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images" / f"{0:016x}.jpg")
    return folder


def summary(*folders: Path, baseline: str = "full") -> list[dict[str, figures.Figure]]:
    runs = [read_run(folder) for folder in folders]
    table = figures.summary(runs, [figures.intervals_of(run, baseline, 500, 0) for run in runs], baseline)
    titles = [column.title for column in table.columns]
    return [dict(zip(titles, row, strict=True)) for row in table.rows]


# -- figures --------------------------------------------------------------------------------------------------------
def test_the_table_has_figures_with_intervals_and_paired_differences(made_up):
    full, half, most = summary(made_up)
    assert (half["method"].text, half["tokens kept"].text) == ("half", "8")
    assert half["accuracy %"].text == f"{700 / 12:.1f}"
    assert half["minus full"].text == f"{-400 / 12:+.1f}"
    assert full["minus full"].text == UNKNOWN
    assert half["of full %"].text == f"{700 / 11:.1f}"
    assert (half["same answer %"].text, half["GFLOP"].text, half["KV MB"].text) == ("50.0", "2.000", "1.00")
    low, high = map(float, most["minus full"].more.split(" to "))
    assert low < float(most["minus full"].text) <= high
    assert not most["minus full"].strong


def test_both_retention_figures(made_up):
    """Over all questions, and the mean of each skill's."""
    run = read_run(made_up)
    half = next(entry for entry in run.entries if entry.method == "half")
    right = {skill: [HALF[i]["right"] for i in range(QUESTIONS) if i % 2 == odd] for odd, skill in enumerate("cs")}
    full = {skill: [FULL[i]["right"] for i in range(QUESTIONS) if i % 2 == odd] for odd, skill in enumerate("cs")}
    by_hand = np.mean([np.mean(right[skill]) / np.mean(full[skill]) for skill in "cs"])
    assert figures.retention(run, half) == pytest.approx((7 / 11, by_hand))
    run.full.mean["headlines"], half.mean["headlines"] = {"pope/f1": 80.0, "mme/all": 1500.0}, {"pope/f1": 40.0}
    assert figures.retention(run, half)[1] == 0.5


def test_the_full_model_need_be_no_row(tmp_path, made_up):
    """Its answers are in every cell's samples."""
    (alone,) = summary(write(tmp_path / "alone", [(cell("half", 8, HALF), HALF)]))
    _, half, _ = summary(made_up)
    for title in ("accuracy %", "minus full", "of full %"):
        assert alone[title].text == half[title].text, title
    assert alone["of full %, mean"].text == half["of full %, mean"].text


def test_another_baseline(made_up):
    full, half, most = summary(made_up, baseline="half")
    assert half["minus half"].text == full["minus half"].text == UNKNOWN, "the full model has another budget"
    assert most["minus half"].text == f"{300 / 12:+.1f}"


def test_seeds_are_averaged(tmp_path):
    rows = [(cell("x", 8, each, seed), each) for seed, each in enumerate((HALF, MOST))]
    (line,) = summary(write(tmp_path / "seeds", rows))
    assert line["accuracy %"].text == f"{(7 + 10) / 2 / 12 * 100:.1f}"
    assert line["method"].more == "2 seeds"
    assert line["minus full"].text == f"{(8.5 - 11) / 12 * 100:+.1f}"


def test_latency_is_the_comparisons_and_that_of_bench(made_up):
    """Each beside its cost; a method that bench did not time has a dash, and the page says so."""
    (made_up / "cells").mkdir()
    for method, keep, latency in (("full", None, 0.02), ("half", 8, 0.004)):
        file = made_up / "cells" / f"{cell(method, keep, HALF)['cell']}.json"
        file.write_text(json.dumps({"result": {"seconds": 1.2, "latency": latency}}))
    full, half, most = summary(made_up)
    assert (full["latency ms"].text, half["latency ms"].text) == ("20.00", "4.00")
    assert half["CPU ms"].text == "100.0"
    assert most["latency ms"].text == UNKNOWN
    assert "first token ms" not in half
    times = [("full", None, 4, 90.0), ("full", None, 1, 30.0), ("half 8", 8, 1, 10.0), ("half 16", 16, 1, 11.0)]
    rows = [
        {"method": name, "keep": keep, "batch": batch, "ttft_ms": ms, "tokens_per_s": 1e3 / ms}
        for name, keep, batch, ms in times
    ]
    (made_up / "bench.json").write_text(json.dumps({"header": {}, "rows": rows}))
    full, half, most = summary(made_up)
    assert (full["first token ms"].text, full["first token ms"].more) == ("30.0", "batch 1")
    assert (half["first token ms"].text, half["tokens/s"].text) == ("10.0", "100")
    assert most["first token ms"].text == UNKNOWN
    assert "bench.json has no times of most, 8" in page.make([read_run(made_up)], "Timed")


def test_plain_values_of_a_table(made_up):
    """As W&B takes them: the ends of an interval beside its figure."""
    run = read_run(made_up)
    titles, lines = figures.summary([run], [figures.intervals_of(run, "full", 500, 0)], "full").flat()
    assert titles[:8] == [
        "method", "tokens kept", "accuracy %", "accuracy %, low", "accuracy %, high", "minus full", "minus full, low",
        "minus full, high",
    ]  # fmt: skip
    half = dict(zip(titles, lines[1], strict=True))
    assert half["accuracy %"] == pytest.approx(700 / 12)
    shown = summary(made_up)[1]["minus full"].more
    assert shown == f"{half['minus full, low']:+.1f} to {half['minus full, high']:+.1f}"
    assert lines[0][titles.index("minus full")] is None


def test_a_table_in_markdown(made_up, tmp_path, capsys):
    """Each row once, differences in bold as on the page, and no column that says nothing; what the page says too."""
    cli.main(["report", str(made_up), "--out", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "tables.md")])
    text = (tmp_path / "tables.md").read_text()
    said, _, tables = text.partition("### Methods and budgets\n\n")
    titles, rule, full, half, most = (line.split(" | ") for line in tables.splitlines()[:5])
    assert tables.startswith("| method | tokens kept | accuracy % | minus full |")
    lines = said.split("\n\n")[1].splitlines()
    assert said.startswith("# Visual-token pruning: report\n")
    assert lines == [f"- {line}" for line in page.Findings.of([read_run(made_up)]).lines]
    assert lines[-1] == "- With fewer than 20 images such intervals are too narrow."
    assert len(titles) == len(rule) == len(full) == len(half) == len(most)
    run = read_run(made_up)
    shown = figures.summary([run], [figures.intervals_of(run, "full", 2000, 0)], "full").rows[1]
    star = "**" if shown[3].strong else ""
    assert half[2] == f"{shown[2].text} ({shown[2].more})"
    assert half[3] == f"{star}{shown[3].text}{star} ({shown[3].more})"
    assert "first token ms" not in text
    assert "tables.md" in capsys.readouterr().err


def test_budgets_stand_side_by_side(made_up, tmp_path):
    """The largest first; the full model in each column, a dash where a method has no result; bold beyond the error."""
    assert len(all_tables([read_run(made_up)], "full", 500, 0)) == 2, "one budget: the first table says it all"
    rows = [(cell("half", 4, HALF), HALF), (cell("half", 16, MOST), MOST), (cell("most", 16, MOST), MOST)]
    folder = write(tmp_path / "wide", [(cell("full", None, FULL), FULL), *rows])
    run = read_run(folder)
    found = figures.intervals_of(run, "full", 500, 0)
    accuracy, retained = by_budget(run, found, "full")
    assert [column.title for column in accuracy.columns] == ["method", "16", "4"]
    full, half, most = accuracy.rows
    assert [cell.text for cell in full] == ["full", f"{1100 / 12:.1f}", f"{1100 / 12:.1f}"]
    assert [cell.text for cell in half] == ["half", f"{1000 / 12:.1f}", f"{700 / 12:.1f}"]
    assert [cell.text for cell in most] == ["most", f"{1000 / 12:.1f}", UNKNOWN]
    places = {(entry.method, entry.budget): place for place, entry in enumerate(run.entries)}
    assert [cell.strong for cell in half[1:]] == [
        found.difference[places["half", budget]].excludes_zero for budget in (16, 4)
    ]
    assert retained.rows[1][2].text == f"{700 / 11:.1f}"
    Groups(4, {record: "rest" if record < 6 else "blank" for record in range(QUESTIONS)}).write(folder)
    above = by_budget(read_run(folder), found, "full")[-1]
    assert above.title == "Of full - blank, % by tokens kept"
    assert above.rows[1][2].text == f"{100 * (7 - 6) / (11 - 6):.1f}"


def test_text_in_markdown_stays_in_its_cell():
    """Bars, line breaks, HTML and escapes in a method's name, and characters that no file can have."""
    cells = [Figure("a|b\nc", more="x|y"), Figure("<b>\\|")]
    text = Table("t\n| x |", [Column("one|two"), Column("three")], [cells], names=2).markdown()
    heading, _, titles, _, line = text.splitlines()
    assert heading == "### t \\| x \\|"
    assert (titles, line) == ("| one\\|two | three |", "| a\\|b c (x\\|y) | \\<b>\\\\\\| |")
    assert MarkdownIt("commonmark").enable("table").render(text).count("<td>") == 2


def test_a_surrogate_in_an_answer_stops_no_file(made_up, tmp_path):
    title = "lone \ud800"
    given = ["--title", title, "--out", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "tables.md")]
    cli.main(["report", str(made_up), *given])
    assert (tmp_path / "tables.md").read_bytes().startswith(b"# lone ?\n")


def test_files_that_are_taken_are_refused(made_up, tmp_path):
    """Nothing is overwritten: the comparison's own files, or the page by its tables."""
    before = (made_up / "results.json").read_bytes()
    for given, says in (
        (["--out", str(made_up / "results.json")], "--out: .*results.json belongs to the comparison"),
        (["--markdown", str(made_up / "samples" / "x.md")], "--markdown: .*x.md belongs to the comparison"),
        (["--out", str(tmp_path / "a"), "--markdown", f"{tmp_path}/b/../a"], "--markdown: .* is the page's file too"),
    ):
        with pytest.raises(LitPruneError, match=says):
            report.run([made_up], **dict(zip((name[2:] for name in given[::2]), map(Path, given[1::2]), strict=True)))
    assert (made_up / "results.json").read_bytes() == before


def test_groups_of_questions_have_a_table(made_up):
    rows = json.loads((made_up / "results.json").read_text())
    of = {record: "rest" if record < 6 else "blank" for record in range(QUESTIONS)}
    groups = Groups(4, of)
    for row, samples in zip(rows, (FULL, HALF, MOST), strict=True):
        row["groups"] = groups.figures(samples)
    (made_up / "results.json").write_text(json.dumps(rows))
    groups.write(made_up)
    run = read_run(made_up)
    table = figures.groups(run)
    line = dict(zip([column.title for column in table.columns], table.rows[1], strict=True))
    assert (line["method"].text, line["blank (6): accuracy %"].text, line["rest (6): accuracy %"].text) == (
        "half", f"{100 / 6:.1f}", "100.0",
    )  # fmt: skip
    assert line["blank: same answer %"].text == "0.0"
    assert line["downsampled (0): accuracy %"].text == UNKNOWN
    blank, full = 6 / QUESTIONS, 11 / QUESTIONS
    assert summary(made_up)[1]["of full - blank %"].text == f"{100 * (7 / QUESTIONS - blank) / (full - blank):.1f}"
    found = Elements(page.make([run], "Groups"))
    assert table.title in found.texts["h2"]
    assert [given["data-group"] for given in found.of("li", "card")].count("blank") == 6


# -- intervals ------------------------------------------------------------------------------------------------------
def test_intervals_are_the_same_each_time():
    images, values = [str(i // 4) for i in range(40)], np.random.default_rng(0).random((40, 3))
    first, again, other = (resampled_means(images, values, 200, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.mean(0) == pytest.approx(values.mean(0), abs=0.02)


def test_draws_in_blocks_are_those_of_one_block(monkeypatch):
    images, values = [str(i // 4) for i in range(40)], np.random.default_rng(0).random((40, 3))
    whole = resampled_means(images, values, 200)
    monkeypatch.setattr("lit_prune.evaluation.report.intervals.AT_ONCE", 70)
    assert np.allclose(resampled_means(images, values, 200), whole)


def test_columns_are_paired():
    values = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    drawn = resampled_means([str(i // 3) for i in range(60)], np.hstack([values, values]))
    assert (drawn[:, 0] == drawn[:, 1]).all()


def test_intervals_cover_the_truth_where_questions_on_an_image_go_together():
    """As often as they say, and questions taken as independent would not."""
    random, covered, naive = np.random.default_rng(0), 0, 0
    repeats, images, each = 200, 60, 5
    for repeat in range(repeats):
        ease = random.beta(0.7, 0.7, images)  # truth: 0.5
        hits = (random.random((images, each)) < ease[:, None]).astype(float).reshape(-1, 1)
        for name, groups in (("image", np.repeat(np.arange(images), each)), ("question", np.arange(images * each))):
            found = interval(hits.mean(), resampled_means(groups, hits, 400, repeat)[:, 0], len(set(groups)))
            covered += name == "image" and found.low <= 0.5 <= found.high
            naive += name == "question" and found.low <= 0.5 <= found.high
    assert 0.90 <= covered / repeats <= 0.99
    assert naive / repeats < 0.85


def test_one_image_has_no_interval(tmp_path):
    few = HALF[:3]
    (line,) = summary(write(tmp_path / "one", [(cell("x", 8, few), few)]))
    assert (line["accuracy %"].text, line["accuracy %"].more) == ("100.0", "")


def test_samples_without_an_image_stand_for_themselves(tmp_path):
    texts = [{**each, "image": ""} for each in HALF]
    run = read_run(write(tmp_path / "texts", [(cell("x", 8, texts), texts)]))
    assert len(set(run.images)) == QUESTIONS


# -- the page -------------------------------------------------------------------------------------------------------
def test_samples_that_flip_come_first(made_up):
    found = gallery.cards([read_run(made_up)], 7)
    assert [card.id for card in found] == ["q0", "q6", "q7", "q8", "q9", "q10", "q11"]
    kinds = {card.id: [answer.kind for answer in card.answers] for card in gallery.cards([read_run(made_up)], 99)}
    assert kinds["q0"] == ["same", "lost"]
    assert kinds["q6"] == ["lost", "same"]
    assert kinds["q11"] == ["gained", "same"]
    assert len(kinds) == QUESTIONS
    pictures = {card.id: card.picture for card in gallery.cards([read_run(made_up)], 99)}
    assert pictures["q0"].startswith("data:image/jpeg;base64,")
    assert pictures["q3"] == ""


def test_kept_tokens_are_drawn_stage_by_stage(made_up):
    """A rectangle for each run of kept patches; what is no mask is left out."""
    mask = np.zeros((4, 4), bool)
    mask[0, 1:3], mask[2, 0], mask[2, 2:], mask[3, 3] = True, True, True, True
    text = np.packbits(mask).tobytes().hex()
    (stage,) = gallery._stages({"total": 16, "masks": {"2": text, "4": "zz", "5": "f"}})
    assert stage == gallery.Stage("layer 2: 6 tokens", 4, "M1 0h2v1H1zM0 2h1v1H0zM2 2h2v1H2zM3 3h1v1H3z")
    assert gallery._stages({"total": 16}) == gallery._stages({"masks": {"2": text}}) == []
    found = Elements(page.make([read_run(made_up)], "Masks"))
    assert len(found.of("svg", "kept")) == 2 * QUESTIONS
    assert {given["d"] for given in found.of("path")} == {"M0 0h8v1H0z"}


def test_the_page_needs_nothing_else(made_up):
    text = page.make([read_run(made_up)], "Title")
    found = Elements(text)
    sources = [given[name] for _, given in found.tags for name in ("src", "href") if name in given]
    assert len(sources) >= 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"link", "iframe", "object"})
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert "prefers-color-scheme: dark" in text
    assert len(found.of("li", "answer")) == 2 * QUESTIONS
    assert page.make([read_run(made_up)], "Title") == text, "the same page each time"


def test_what_data_say_is_escaped(tmp_path):
    evil = [
        {**each, **dict.fromkeys(("id", "skill", "question", "reference", "full", "answer"), EVIL)} for each in HALF
    ]
    row = cell(EVIL, 8, HALF, note=EVIL, cell="evil", per_skill={EVIL: 0.5}, headlines={EVIL: 1.0}, split=EVIL)
    folder = write(tmp_path / "run", [(row, evil)])
    text = page.make([read_run(folder), read_run(write(tmp_path / "b", [(row, evil)]))], EVIL)
    found = Elements(text)
    assert found.texts["script"] == [template.SCRIPT]
    assert len(found.of("script")) == 1
    assert all(given.get("src", "data:").startswith("data:") for given in found.of("img"))
    assert not [name for _, given in found.tags for name in given if name.startswith("on")]
    assert EVIL in found.texts["h1"]
    assert EVIL in found.texts["h3"]
    assert EVIL in [given["data-skill"] for given in found.of("li", "card")]


def test_the_script_is_the_only_one_that_may_run():
    digest = base64.b64encode(hashlib.sha256(template.SCRIPT.encode()).digest()).decode()
    assert f"'{page._hash(template.SCRIPT)}'" == f"'sha256-{digest}'"


def test_several_comparisons(made_up, tmp_path):
    other = write(tmp_path / "other", [(cell("half", 8, HALF), HALF)])
    assert [line["comparison"].text for line in summary(made_up, other)] == ["run"] * 3 + ["other"]
    found = Elements(page.make([read_run(made_up), read_run(other)], "Two"))
    assert {given["data-run"] for given in found.of("li", "card")} == {"run", "other"}


def test_cells_without_answers_are_shown_and_named(tmp_path):
    """As an earlier version left them."""
    old = {name: value for name, value in cell("old", 8, HALF).items() if name not in ("lost", "gained", "kl", "cell")}
    folder = write(tmp_path / "run", [(old | {"cell": ""}, [])])
    rows = json.loads((folder / "results.json").read_text())
    rows[0].pop("cell")
    (folder / "results.json").write_text(json.dumps(rows))
    (line,) = summary(folder)
    assert (line["accuracy %"].text, line["accuracy %"].more) == (f"{700 / 12:.1f}", "")
    assert line["KL, nats"].text == line["minus full"].text == UNKNOWN
    text = page.make([read_run(folder)], "Old")
    assert "old: measured before answers were kept" in text
    assert "No answers were kept" in text


def test_questions_that_not_every_method_answered_are_counted(made_up):
    name = cell("half", 8, HALF)["cell"]
    (made_up / "samples" / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in HALF[:9]))
    assert "3 questions that not every method answered" in page.make([read_run(made_up)], "x")


def test_results_without_what_the_charts_show(tmp_path):
    """Every figure that is there is shown."""
    bare = {
        name: value for name, value in cell("half", 8, HALF).items() if name in ("method", "keep", "seed", "status")
    }
    folder = write(tmp_path / "run", [({**bare, "accuracy": 0.5}, [])])
    found = Elements(page.make([read_run(folder)], "Bare"))
    assert not found.of("img")
    assert "50.0" in found.texts["td"]


# -- the command ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "spoiled", "says"),
    [
        (["nowhere"], {}, "nowhere: no such folder; `lit-prune compare --out nowhere`"),
        (["run/samples"], {}, "run/samples has no results.json"),
        (["run"], {"results.json": "{"}, "run/results.json can't be read"),
        (["run"], {"results.json": "{}"}, "run/results.json is no list of cells"),
        (["run"], {"results.json": "[]"}, "run/results.json is no list of cells"),
        (["run"], {"results.json": '[{"a": 1}]'}, "cell 0 has no `method`"),
        (["run"], {"results.json": json.dumps([{**cell("x", 8, HALF), "accuracy": None}])}, "accuracy is no number"),
        (["run"], {"results.json": json.dumps([{**cell("x", 8, HALF), "keep": []}])}, "no method or budget"),
        (["run"], {"results.json": json.dumps([{**cell("x", 8, HALF), "status": "pending"}])}, "no cell has a result"),
        (["run"], {f"samples/{cell('half', 8, HALF)['cell']}.jsonl": "{"}, "line 1 is damaged"),
        (["run"], {f"samples/{cell('half', 8, HALF)['cell']}.jsonl": "[]"}, "line 1 has no"),
        (["run"], {f"samples/{cell('half', 8, HALF)['cell']}.jsonl": "3"}, "line 1 is damaged"),
        (["run", "--baseline", "third"], {}, "--baseline third: no such method; there are full, half, most"),
        (["run", "--samples=-1"], {}, "--samples is -1"),
        (["run", "--draws=3"], {}, "--draws is 3"),
        (["run", "--seed=-1"], {}, "--seed is -1"),
        (["run", "--out", "run"], {}, "--out: run is a folder"),
    ],
)
def test_bad_input_is_one_line(made_up, monkeypatch, capsys, options, spoiled, says):
    monkeypatch.chdir(made_up.parent)
    for name, text in spoiled.items():
        (made_up / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *options])
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert says in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not Path("report.html").exists()


def test_odd_text_is_written(made_up, monkeypatch):
    """Half a surrogate pair, as JSON may hold it, is no text of any file."""
    name = cell("half", 8, HALF)["cell"]
    odd = [{**each, "answer": "\ud800 \u2028 \0"} for each in HALF]
    (made_up / "samples" / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in odd))
    monkeypatch.chdir(made_up.parent)
    cli.main(["report", "run", "--samples", "3", "-o", "new/report.html"])
    found = Elements(Path("new/report.html").read_text(encoding="utf-8"))
    assert len(found.of("li", "card")) == 3


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A real comparison of a few questions."""
    folder = tmp_path_factory.mktemp("compared")
    sizes = {"train_samples": 7, "val_samples": 21, "test_samples": 7, "eval_batch_size": 7}
    (folder / "small.yaml").write_text(
        yaml.safe_dump({"data": {"init_args": {"root": str(folder / "world"), **sizes}}})
    )
    with chdir(ROOT):
        options = ["-c", "configs/micro.yaml", "-c", str(folder / "small.yaml"), "--out", str(folder / "run")]
        cli.main(["compare", *options, "--methods", "full", "random", "fastv", "--keep", "16", "2", "--seeds", "0"])
        cli.main(["report", str(folder / "run"), "--out", str(folder / "report.html"), "--title", "Tiny"])
    return folder


def test_a_real_comparison(compared):
    rows = json.loads((compared / "run" / "results.json").read_text())
    text = (compared / "report.html").read_text(encoding="utf-8")
    found = Elements(text)
    assert len(found.of("li", "card")) == 21
    assert len([given for given in found.of("img") if given["src"].startswith("data:image/jpeg")]) == 21
    assert len([given for given in found.of("img") if given["src"].startswith("data:image/svg")]) == 5
    chance = next(row for row in rows if row["method"] == "random" and row["keep"] == 16)
    lost = [given for given in found.of("li", "answer") if given["data-kind"] == "lost"]
    measured = [row for row in rows if row["status"] == "measured"]
    assert len(lost) == round(sum(row["lost"] for row in measured) * 21)
    lines = summary(compared / "run")
    assert lines[1]["accuracy %"].text == f"{100 * chance['accuracy']:.1f}"
    assert float(lines[1]["CPU ms"].text) > 0
    assert "FastV: empty at 2 tokens" in text
    assert "21 questions, 3 images" in text


# -- in a browser ---------------------------------------------------------------------------------------------------

CLICKS = """
const state = () => [...document.querySelectorAll(".card")].filter((card) => card.offsetParent).map((card) =>
  [card.querySelector(".facts").textContent.split(" ")[0],
   [...card.querySelectorAll(".answer")].filter((each) => each.offsetParent).map((each) => each.dataset.method)]);
const set = (name, value) => {
  const field = document.querySelector(`[name=${name}]`);
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const found = { all: state().length };
set("kind", "lost");
found.lost = state();
set("method", "most");
found.method = state();
found.count = document.getElementById("count").value;
document.querySelector("[type=reset]").click();
setTimeout(() => {
  found.reset = state().length;
  set("skill", "shape");
  found.skill = state().length;
  set("skill", "");
  set("sure", "50");
  found.sure = state().length;
  set("sure", "");
  set("unsure", "50");
  set("group", "blank");
  found.group = state().map((each) => each[0]);
  set("unsure", "");
  set("group", "");
  const head = [...document.querySelectorAll("th button")].find((each) => each.textContent === "accuracy %");
  const order = () => [...document.querySelector("tbody").rows].map((row) => row.cells[0].textContent);
  head.click();
  found.up = order();
  head.click();
  found.down = order();
  found.sort = head.parentNode.ariaSort;
  found.width = [document.documentElement.scrollWidth, window.innerWidth];
  found.title = document.title;
  document.body.dataset.found = JSON.stringify(found);
}, 50);
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_filters_and_sorting_in_a_browser(made_up, tmp_path):
    """On a phone's width; a script that is none of the page's, were one to get in, is not run."""
    Groups(4, {record: ("blank", "downsampled", "rest")[record % 3] for record in range(QUESTIONS)}).write(made_up)
    text = page.make([read_run(made_up)], "Report")
    allowed = text.replace("script-src '", f"script-src '{page._hash(CLICKS)}' '", 1)
    intruder = "<script>document.title = 'owned'</script>"
    (tmp_path / "page.html").write_text(allowed.replace("</body>", f"{intruder}<script>{CLICKS}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,900", "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (body,) = Elements(shown).of("body")
    found = json.loads(body["data-found"])
    assert found["all"] == found["reset"] == QUESTIONS
    assert found["lost"] == [["q0", ["most"]], *[[f"q{i}", ["half"]] for i in range(6, 11)]]
    assert found["method"] == [["q0", ["most"]]]
    assert found["count"] == f"1 of {QUESTIONS} samples"
    assert found["skill"] == QUESTIONS // 2
    assert found["sure"] == 4
    assert found["group"] == ["q6", "q9"]
    assert (found["up"], found["down"]) == (["half", "most", "full"], ["full", "most", "half"])
    assert found["sort"] == "descending"
    assert found["width"][0] <= found["width"][1], "the page itself does not scroll sideways"
    assert found["title"] == "Report"
