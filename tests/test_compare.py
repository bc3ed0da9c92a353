"""`lit-prune compare` on a few questions of the micro world: cells, resuming, failures, tables and plots."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import PRUNERS, ROOT, shake, small_rcp, small_repair
from torch import nn

from lit_prune import cli
from lit_prune.commands import compare
from lit_prune.commands._support import passes as passes_module
from lit_prune.commands._support.processes import started
from lit_prune.data import MicroData
from lit_prune.errors import LitPruneError
from lit_prune.evaluation import measuring, plots, tables
from lit_prune.evaluation import rows as rows_module
from lit_prune.evaluation.cells import FULL, Cell, Method, budget, cells_of, describe, prepare
from lit_prune.evaluation.comparison import TIMES, Comparison
from lit_prune.evaluation.groups import Groups, downsampled, views
from lit_prune.evaluation.ranks import Ranks
from lit_prune.evaluation.store import Store
from lit_prune.ops.moments import kappa
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Context, Kept, Pruner
from lit_prune.pruners.random import Random
from lit_prune.vlm import VLM, as_plugin, load

RANDOM, FASTV = (f"configs/pruners/{name}.yaml" for name in ("random", "fastv"))
QUESTIONS = 14


class Broken(Pruner):
    """Fails when it is asked."""

    def __init__(self, layers: tuple[int, ...] = (0,)) -> None:
        super().__init__(layers)

    def prune(self, context: Context) -> Kept:
        raise RuntimeError("no idea")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Options of a small data set."""
    root = tmp_path_factory.mktemp("world")
    sizes = {"train_samples": 7, "val_samples": 7, "test_samples": QUESTIONS, "eval_batch_size": 7}
    return {"root": str(root), **sizes}


@pytest.fixture(scope="module")
def config(small, tmp_path_factory) -> list[str]:
    """Configuration files of the micro run on that data."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(yaml.safe_dump({"data": {"init_args": small}}))
    return [str(ROOT / "configs" / "micro.yaml"), str(file)]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


METHODS = [FULL, f"chance={RANDOM}", FASTV]


@pytest.fixture(scope="module")
def measured(config, tmp_path_factory) -> Path:
    """The results of a whole run through the command line."""
    out = tmp_path_factory.mktemp("measured")
    options = ["--methods", *METHODS, "--keep", "16", "5.6%", "--seeds", "0", "1", "--split", "test", "--out", str(out)]
    with chdir(ROOT):
        cli.main(["compare", *(part for file in config for part in ("-c", file)), *options])
    return out


def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())


def on_two(config: list[str], out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    """The comparison of two processes, as a user starts it."""
    files = [part for file in config for part in ("-c", file)]
    command = [sys.executable, "-m", "lit_prune", "compare", *files, "--out", str(out), "--processes", "2", *more]
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=alike)


@pytest.mark.slow  # two starts of the libraries
@pytest.mark.timeout(600)
def test_two_processes_give_the_table_of_one(config, measured, tmp_path):
    """With three batches for two: answers and tables byte for byte, sums of floats to their last digits."""
    files = [*config, str(tmp_path / "batches.yaml")]
    (tmp_path / "batches.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"eval_batch_size": 5}}}))
    options = ["--methods", *METHODS, "--keep", "16", "--seeds", "0", "--split", "test", "--groups", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    cli.main(["compare", *(part for file in files for part in ("-c", file)), *options, "--out", str(one)])
    done = on_two(files, two, *options)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("test, 16 tokens (1 of 1): 2 cells\n") == 1, "one process speaks"
    rounded = [
        re.sub(r"\d+\.\d+(e-\d+)?", lambda x: f"{float(x[0]):.9g}", (out / "results.json").read_text())
        for out in (one, two)
    ]
    assert rounded[0] == rounded[1]
    for name in ("table.md", "groups.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    for file in (one / "samples").iterdir():
        assert (two / "samples" / file.name).read_bytes() == file.read_bytes()
    again = on_two(files, one, *options)
    assert again.returncode == 0, again.stderr[-6000:]
    assert "5 cells were measured before" in again.stderr


def test_processes_end_with_the_first_that_fails(monkeypatch, capfd):
    """And none starts where there are some already, or too few are asked for."""
    monkeypatch.setattr(sys, "argv", ["lit-prune", "--version"])
    assert started(2)
    assert capfd.readouterr().out.count("lit-prune") == 2
    monkeypatch.setattr(sys, "argv", ["lit-prune", "compair"])
    with pytest.raises(SystemExit) as end:
        started(2)
    assert end.value.code == 2
    assert not started(None)
    assert not started(1)
    with pytest.raises(LitPruneError, match="--processes"):
        started(0)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert not started(None)
    assert not started(2)
    with pytest.raises(LitPruneError, match="--processes 3: torchrun has started 2 already"):
        started(3)


def test_what_another_process_measured_is_taken_in_by_the_order_of_the_data(micro, batch):
    """And a cell that failed there has failed here."""

    class Other(Ranks):
        def gather(self, value):
            records, parts, *_, end = value
            theirs = [replace(each, record=each.record - 100) for each in records]
            failed = (True, "broken there") if parts and end[1] == "fails" else end
            return [value, (theirs, parts, [2.0], 1.0, failed)]

    comparison = Comparison(micro, Cell(FULL), [Cell("x", 16, 0, Plugin(Random()), reason="fails")], 4)
    comparison.update(batch)
    full, cell = comparison.tallies
    before, spent = list(full.records), full.parts["decoder"]
    comparison.gather(Other(0, 2))
    assert [each.record for each in full.records] == sorted(each.record + n for n in (0, -100) for each in before)
    assert (full.parts["decoder"], full.waits[1:]) == (2 * spent, [2.0])
    assert (cell.cell.failed, cell.cell.reason) == (True, "broken there")
    assert [found.method for found, _ in comparison.results()] == [FULL]


# -- what comes out -------------------------------------------------------------------------------------------------
def test_results_are_a_list_of_cells(measured):
    rows = rows_of(measured)
    found = [(row["method"], row["keep"], row["seed"], row["status"]) for row in rows]
    assert found == [
        ("full", None, None, "measured"),
        *[("chance", keep, seed, "measured") for keep in (16, 8) for seed in (0, 1)],
        ("FastV", 16, None, "measured"),
        ("FastV", 8, None, "empty"),
    ]
    full, chance, empty = rows[0], rows[1], rows[-1]
    assert (full["retained"], full["w2"], full["kappa"], full["flops_reduction"]) == (1.0, 0.0, 0.0, 0.0)
    assert full["avg_visual_tokens"] == 144
    assert (chance["avg_visual_tokens"], chance["tokens_per_layer"], chance["kept"]) == (16, [16] * 16, {"0": 16})
    assert chance["questions"] == QUESTIONS
    assert chance["retained"] == chance["accuracy"] / full["accuracy"]
    assert 0 < chance["flops"] < full["flops"]
    assert chance["kappa"] > 0
    assert chance["w2"] == pytest.approx(np.mean(chance["w2_per_layer"]))
    assert rows[1]["w2"] != rows[2]["w2"], "two draws are two"
    assert chance["accuracy_se"] == pytest.approx((chance["accuracy"] * (1 - chance["accuracy"]) / QUESTIONS) ** 0.5)
    assert set(empty) == set(chance)
    assert "at least 9.9" in empty["reason"]
    assert empty["accuracy"] is empty["flops"] is None


def test_csv_and_markdown_say_the_same(measured):
    rows = rows_of(measured)
    lines = list(csv.DictReader((measured / "results.csv").open()))
    assert [line["w2"] for line in lines] == ["" if row["w2"] is None else str(row["w2"]) for row in rows]
    text = (measured / "table.md").read_text()
    chance = next(each for each in rows_module.means(rows) if each["method"] == "chance" and each["keep"] == 16)
    assert f"| chance | {100 * chance['accuracy']:.1f} ± {100 * chance['accuracy_std']:.1f} |" in text
    assert "| FastV | – |" in text
    assert "at least 9.9" in text


def test_plots_show_something(measured):
    for name in ("accuracy_tokens", "accuracy_flops", "shift_accuracy", "tokens_per_layer"):
        picture = Image.open(measured / f"{name}.png").convert("RGB")
        assert len(picture.getcolors(picture.width * picture.height)) > 100, name


def test_one_budget_gives_the_plain_table(config, tmp_path):
    compare.run(config, [FULL, RANDOM], ["16"], [0], 7, out=tmp_path)
    text = (tmp_path / "table.md").read_text().splitlines()
    assert text[0] == "| method | accuracy % | of full % | tokens | MFLOP | saved % | KV kB | W2 |"
    assert text[2].startswith("| full |")
    assert rows_of(tmp_path)[0]["questions"] == 7


def test_what_chooses_looks_at_the_validation_set_and_says_so(config, tmp_path, capsys):
    """In all that comes out; its cells are none of the test set's."""
    compare.run(config, [FULL, RANDOM], ["16"], [0], out=tmp_path)
    printed = capsys.readouterr().out
    compare.run(config, [FULL, RANDOM], ["16"], [0], out=tmp_path / "test", split="test")
    found = {}
    for split, out, count in (("val", tmp_path, 7), ("test", tmp_path / "test", QUESTIONS)):
        rows = rows_of(out)
        assert {row["split"] for row in rows} == {split}
        assert {row["questions"] for row in rows} == {count}
        assert {line["split"] for line in csv.DictReader((out / "results.csv").open())} == {split}
        assert f"Measured on the {split} split, {count} questions." in (out / "table.md").read_text()
        figures = plots.draw(rows, 144)
        assert all(f"{split} split, {count} questions" in [t.get_text() for t in f.texts] for f in figures.values())
        found[split] = {path.name for path in (out / "cells").iterdir()}
    assert "val split, 7 questions" in " ".join(printed.split())
    assert not found["val"] & found["test"]


def test_fresh_scenes(config, tmp_path):
    compare.run(config, [RANDOM], ["16"], [0], out=tmp_path)
    compare.run(config, [RANDOM], ["16"], [0], data_seed=1, out=tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 4
    (tmp_path / "data.json").write_text("[]")
    other = tmp_path / "other.yaml"
    data = {"class_path": "lit_prune.data.InstructData", "init_args": {"val": str(tmp_path / "data.json")}}
    other.write_text(yaml.safe_dump({"data": data}))
    with pytest.raises(LitPruneError, match="--data-seed: these data are not generated"):
        compare.run([config[0], str(other)], [RANDOM], ["16"], [0], data_seed=1, out=tmp_path)


def test_untrained_weights_are_initialised_once_a_seed(config, tmp_path):
    """And the table has their spread, as for random draws."""
    compare.run(config, ["configs/pruners/rcp.yaml", FASTV], ["16"], [0, 1, 2], 7, out=tmp_path)
    rows = rows_of(tmp_path)
    assert [(row["method"], row["seed"], row["note"]) for row in rows] == [
        *[("RCP, untrained", seed, "untrained") for seed in (0, 1, 2)],
        ("FastV", None, ""),
    ]
    assert len({row["w2"] for row in rows[:3]}) == 3
    assert re.search(r"\| RCP, untrained \| [\d.]+ ± [\d.]+ \|", (tmp_path / "table.md").read_text())


def test_table_and_plots_go_to_wandb(config, measured, tmp_path, monkeypatch):
    for part in ("cells", "samples"):
        shutil.copytree(measured / part, tmp_path / part)
    compare.run(config, METHODS, ["16", "5.6%"], [0, 1], out=tmp_path, wandb=True, split="test")
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/cells_*.table.json")
    logged = json.loads(table.read_text())
    at = logged["columns"].index("w2")
    assert [line[at] for line in logged["data"]] == [row["w2"] for row in rows_of(measured)]
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/report/Methods*.table.json")
    logged = json.loads(table.read_text())
    lines = [dict(zip(logged["columns"], line, strict=True)) for line in logged["data"]]
    assert [(line["method"], line["tokens kept"]) for line in lines] == [
        ("full", "all"), ("chance", "16"), ("chance", "8"), ("FastV", "16"),
    ]  # fmt: skip
    full, chance = lines[0], lines[1]
    mean = rows_module.means(rows_of(measured))[1]["accuracy"]
    assert chance["accuracy %"] == pytest.approx(100 * mean)
    assert chance["minus full"] == pytest.approx(chance["accuracy %"] - full["accuracy %"])
    assert chance["minus full, low"] <= chance["minus full"] <= chance["minus full, high"]
    assert (full["minus full"], full["minus full, low"]) == (None, None)
    assert chance["latency ms"] > 0
    images = {path.name.rpartition("_")[0][:-2] for path in tmp_path.glob("wandb/*/files/media/images/*.png")}
    assert images == {"accuracy_tokens", "accuracy_flops", "shift_accuracy", "tokens_per_layer"}


def samples_of(out: Path, row: dict) -> list[dict]:
    return [json.loads(line) for line in (out / "samples" / f"{row['cell']}.jsonl").read_text().splitlines()]


def test_every_answer_has_a_record(measured):
    """It adds up to the cell's figures, and the cell names the questions that flip."""
    rows = rows_of(measured)
    for row in rows[:-1]:
        samples = samples_of(measured, row)
        cell = json.loads((measured / "cells" / f"{row['cell']}.json").read_text())["result"]
        assert "".join(str(int(each["right"])) for each in samples) == cell["hits"]
        assert np.mean([each["agrees"] for each in samples]) == pytest.approx(row["agreement"])
        assert np.mean([each["kl"] for each in samples]) == pytest.approx(row["kl"])
        assert np.mean([each["visual"] for each in samples]) == pytest.approx(row["avg_visual_tokens"])
        lost = [each["id"] for each in samples if each["full_right"] and not each["right"]]
        gained = [each["id"] for each in samples if not each["full_right"] and each["right"]]
        assert cell["flips"] == {"lost": lost, "gained": gained}
        assert (row["lost"], row["gained"]) == (len(lost) / QUESTIONS, len(gained) / QUESTIONS)
        assert row["accuracy"] == pytest.approx(rows[0]["accuracy"] - row["lost"] + row["gained"])
    full, chance = samples_of(measured, rows[0]), samples_of(measured, rows[1])
    assert (rows[0]["agreement"], rows[0]["lost"], rows[0]["gained"], rows[0]["kl"]) == (1, 0, 0, 0)
    assert [each["full"] for each in chance] == [each["answer"] for each in full]
    assert rows[1]["lost"] > 0
    assert rows[1]["kl"] > 0
    assert chance[0]["kept"] == {"0": 16}
    assert [bin(int(each["masks"]["0"], 16)).count("1") for each in chance] == [16] * QUESTIONS
    assert all(0 < each["confidence"] <= 1 for each in chance)
    assert full[0]["masks"] == {}
    assert {each["image"] for each in chance} == {path.stem for path in (measured / "images").iterdir()}
    assert len({each["image"] for each in chance}) == QUESTIONS // 7, "seven questions an image"
    assert all(max(Image.open(path).size) <= 256 for path in (measured / "images").iterdir())
    assert "flips" not in rows[0]
    assert "right to wrong %" not in (measured / "results.csv").read_text()
    assert "right to wrong %" in (measured / "table.md").read_text()


def test_questions_are_grouped_by_how_much_of_the_image_the_plain_model_needs(config, measured, micro, small, tmp_path):
    """The groups are those of its own answers to a grey and a coarse image, and the figures those of their records."""
    for part in ("cells", "samples"):
        shutil.copytree(measured / part, tmp_path / part)
    compare.run(config, METHODS, ["16", "5.6%"], [0, 1], out=tmp_path, split="test", groups=6)
    data = MicroData("micro", **small)
    data.setup("test")
    source, expected = data.datasets["test"].source, {"blank": [], "downsampled": [], "rest": []}
    for index, record in enumerate(source):
        question, answer = (turn["value"].replace("<image>", "").strip() for turn in record["conversations"])
        with source.images(index, record)[0].open() as file:
            image = Image.open(file).convert("RGB")
        side = image.width // 6
        coarse = image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
        views = {"blank": Image.new("RGB", image.size, (128, 128, 128)), "downsampled": coarse, "rest": None}
        group = next(g for g, view in views.items() if view is None or micro.answer(view, question, 8) == answer)
        expected[group].append(index)
    found = json.loads((tmp_path / "groups.json").read_text())
    assert found == {"factor": 6, **expected}
    assert expected["downsampled"]
    assert expected["rest"]
    chance = rows_of(tmp_path)[1]
    samples = samples_of(tmp_path, chance)
    for group, held in expected.items():
        mine = [samples[record] for record in held]
        assert chance["groups"][group]["questions"] == len(held)
        if not held:
            assert chance["groups"][group]["accuracy"] is None
            continue
        assert chance["groups"][group]["accuracy"] == pytest.approx(np.mean([each["right"] for each in mine]))
        assert chance["groups"][group]["agreement"] == pytest.approx(np.mean([each["agrees"] for each in mine]))
    line = list(csv.DictReader((tmp_path / "results.csv").open()))[1]
    assert float(line["groups/rest/accuracy"]) == pytest.approx(chance["groups"]["rest"]["accuracy"])
    sizes = ", ".join(f"{len(held)} {group}" for group, held in expected.items())
    assert f"**groups of questions at 16: {sizes};" in (tmp_path / "table.md").read_text()
    compare.run(config, METHODS, ["16", "5.6%"], [0, 1], out=tmp_path, split="test")
    assert not (tmp_path / "groups.json").exists(), "they belong to the results of a run that asked for them"
    assert rows_of(tmp_path)[1]["groups"] is None


def test_a_group_is_that_of_the_poorest_view_that_is_enough(tmp_path):
    right = {"blank": {0: True, 1: False, 2: True, 3: False}, "downsampled": {0: False, 1: True, 2: True, 3: False}}
    found = Groups.divide(4, right)
    assert found.of == {0: "blank", 1: "downsampled", 2: "blank", 3: "rest"}
    found.write(tmp_path)
    assert Groups.read(tmp_path) == found
    assert Groups.read(tmp_path / "none") is None
    (tmp_path / "groups.json").write_text('{"factor": 4, "blank": 1}')
    with pytest.raises(LitPruneError, match=r"groups\.json is damaged .*compare --groups"):
        Groups.read(tmp_path)
    picture = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    assert downsampled(picture, 100).getextrema() == tuple(
        (mean, mean) for mean in downsampled(picture, 100).getpixel((0, 0))
    )
    assert {view(picture).size for view in views(4).values()} == {(12, 8)}


def test_cells_of_before_are_read_and_their_loyalty_is_unknown(config, measured, tmp_path):
    """Those that an earlier version measured have neither flips nor divergence."""
    shutil.copytree(measured / "cells", tmp_path / "cells")
    for file in (tmp_path / "cells").iterdir():
        cell = json.loads(file.read_text())
        for name in ("flips", "lost", "gained", "kl"):
            del cell["result"][name]
        file.write_text(json.dumps(cell))
    compare.run(config, METHODS, ["16"], [0, 1], out=tmp_path, split="test")
    rows = rows_of(tmp_path)
    assert [row["kl"] for row in rows] == [None] * len(rows)
    assert rows[1]["agreement"] == rows_of(measured)[1]["agreement"]
    assert re.search(r"\| chance \| [\d.]+ \| unknown \| unknown \| unknown \|", (tmp_path / "table.md").read_text())
    old = {**rows[1], "seed": 0}
    (mean,) = rows_module.means([old, {**rows_of(measured)[2]}])
    assert (mean["kl"], mean["runs"]) == (None, 2)


# -- resuming -------------------------------------------------------------------------------------------------------


# The command, killed by force at the second of two batches of its second pass.
KILLED = """
import os, signal, sys
from lit_prune import cli
from lit_prune.evaluation.comparison import TIMES, Comparison
from lit_prune.evaluation.store import Store

batches, update = [], Comparison.update

def last(self, batch, *args, **options):
    batches.append(batch)
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch, *args, **options)

Comparison.update = last
cli.main(["compare", *sys.argv[1:]])
"""


def test_killed_run_goes_on_and_equals_an_uninterrupted_one(config, measured, tmp_path, monkeypatch):
    """Killed in the second pass; the first isn't measured again."""
    arguments = [*(part for file in config for part in ("-c", file)), "--methods", *METHODS]
    options = ["--keep", "16", "5.6%", "--seeds", "0", "1", "--split", "test", "--out", str(tmp_path)]
    command = [sys.executable, "-c", KILLED, *arguments, *options]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4
    passes = []
    make = passes_module.Comparison
    monkeypatch.setattr(passes_module, "Comparison", lambda *a: passes.append([c.keep for c in a[2]]) or make(*a))
    compare.run(config, METHODS, ["16", "5.6%"], [0, 1], out=tmp_path, split="test")
    assert passes == [[8, 8]]
    for name in ("results.json", "results.csv", "table.md"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes()


def test_cells_of_other_settings_are_left_alone(config, measured, tmp_path, capsys):
    """Another limit measures anew; a new name doesn't; a damaged file is named."""
    shutil.copytree(measured / "cells", tmp_path / "cells")
    compare.run(config, [f"renamed={RANDOM}"], ["16"], [0], out=tmp_path, split="test")
    assert len(list((tmp_path / "cells").iterdir())) == 6
    compare.run(config, [RANDOM], ["16"], [0], 7, out=tmp_path, split="test")
    assert len(list((tmp_path / "cells").iterdir())) == 8
    assert "files in" in capsys.readouterr().err
    for file in (tmp_path / "cells").iterdir():
        file.write_text("{")
    with pytest.raises(LitPruneError, match=r"\.json is damaged"):
        compare.run(config, [RANDOM], ["16"], [0], 7, out=tmp_path, split="test")


def keyed(model: nn.Module, pruner: Pruner, keep: int = 12, repair=None, with_repair: bool = True, **setting) -> Cell:
    vlm = VLM(model, None, "tiny")
    cell = Cell("x", keep, None, Plugin(pruner, repair).eval(), with_repair)
    prepare([cell], vlm, {**describe(vlm), **setting})
    return cell


def test_key_holds_everything_that_determines_a_result(tiny_model):
    same = keyed(tiny_model, small_rcp(), repair=small_repair(), data="a").key
    assert keyed(tiny_model, small_rcp(), repair=small_repair(), data="a").key == same
    others = [
        keyed(tiny_model, small_rcp(), 13, small_repair(), data="a"),
        keyed(tiny_model, small_rcp(), repair=small_repair(), data="b"),
        keyed(tiny_model, small_rcp(), repair=small_repair(), with_repair=False, data="a"),
        keyed(tiny_model, small_rcp(bias=1.0), repair=small_repair(), data="a"),
        keyed(tiny_model, Random(), data="a"),
        keyed(tiny_model, Random(seed=1), data="a"),
    ]
    trained = small_rcp()
    keyed(tiny_model, trained, data="a")
    shake(trained)
    others.append(keyed(tiny_model, trained, repair=small_repair(), data="a"))
    assert len({same, *(cell.key for cell in others)}) == 1 + len(others)


# -- failures -------------------------------------------------------------------------------------------------------
def test_a_failing_method_loses_no_other(config, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({"model": {"pruner": {"class_path": f"{__name__}.Broken"}}}))
    with pytest.raises(LitPruneError, match="1 of 2 cells failed; the first: broken at 16: RuntimeError: no idea"):
        compare.run(config, [str(broken), RANDOM], ["16"], [0], 7, out=tmp_path)
    failed, fine = rows_of(tmp_path)
    assert (failed["status"], failed["reason"], failed["accuracy"]) == ("failed", "RuntimeError: no idea", None)
    assert fine["status"] == "measured"
    assert "failed at 16 tokens, RuntimeError: no idea" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ["x=nowhere.yaml"]}, "nowhere.yaml: No such file"),
        ({"methods": ["x=nowhere/{seed}"]}, "x: plug-in nowhere/0"),
        ({"methods": ["x="]}, "write PATH or NAME=PATH"),
        ({"methods": [RANDOM], "keep": ["0.1%"]}, "--keep 0.1%: 0 visual tokens"),
        ({"methods": [RANDOM], "keep": ["few"]}, "--keep few"),
        ({"methods": [RANDOM], "limit": 0}, "--limit 0"),
        ({"methods": [RANDOM], "keep": ["2:64"]}, "give an average such as 16 or 11.1%"),
        ({"methods": [RANDOM], "keep": ["145"]}, "--keep 145: 145 visual tokens"),
        ({"methods": [f"a={RANDOM}", f"a={FASTV}"]}, "two are called a"),
    ],
)
def test_wrong_options_are_refused_at_once(config, tmp_path, options, says):
    with pytest.raises(LitPruneError, match=says):
        compare.run(config, out=tmp_path, **options)
    assert not (tmp_path / "results.json").exists()


def test_methods_have_the_names_that_people_write():
    """One place says them; no two shipped files share one."""
    methods = [Method.parse(str(path)) for path in PRUNERS]
    names = [next(iter(cells_of([m], [16], [0], lambda plugin: False))).method for m in methods]
    assert len(set(names)) == len(names)
    assert set(names) >= {
        "CDPruner", "DART", "DCP-Prune", "DivPrune", "FastV", "PruMerge+", "PyramidDrop", "RCP", "SCOPE", "SparseVLM",
        "VisionZip", "random", "uniform", "oracle", "FastV + repair", "RCP after DCP-Prune",
        "DCP-Prune, proportional attention",
    }  # fmt: skip


def test_methods_of_one_name_are_told_apart(tmp_path):
    """By where they were read; a given name stays."""
    other = tmp_path / "other.yaml"
    shutil.copy(FASTV, other)
    methods = [Method.parse(text) for text in (FASTV, str(other), f"{other}!", f"mine={other}")]
    names = [cell.method for cell in cells_of(methods, [16], [0], lambda plugin: False)]
    assert names == [f"FastV ({FASTV})", f"FastV ({other})", f"FastV ({other}!)", "mine"]


def test_shares_stay_where_images_differ():
    assert budget("11.1%", 576, varies=True) == "11.1%"
    assert budget("5000", 576, varies=True) == 5000


@pytest.mark.parametrize(("text", "visual", "keep"), [("48", 144, 48), ("100%", 144, 144), ("2.8%", 576, 16)])
def test_budgets_are_counts_or_shares(text, visual, keep):
    assert budget(text, visual) == keep
    assert [budget(share, 144) for share in ("33.3%", "22.2%", "11.1%", "5.6%", "2.8%")] == [48, 32, 16, 8, 4]


# -- methods --------------------------------------------------------------------------------------------------------
def save(folder: Path, keep: int, seed: int) -> None:
    plugin = Plugin(Random(seed=10 * keep + seed), None, keep)
    folder.mkdir(parents=True)
    plugin.save_pretrained(folder)


def test_patterns_name_a_run_per_budget_and_seed(tmp_path):
    save(tmp_path / "16_0", 16, 0)
    save(tmp_path / "16_1", 16, 1)
    save(tmp_path / "8_0", 8, 0)
    cells = Method.parse(f"RCP={tmp_path}/{{keep}}_{{seed}}").cells([16, 8], [0, 1])
    assert [(c.method, c.keep, c.seed, c.plugin and c.plugin.pruner.seed) for c in cells] == [
        ("RCP", 16, 0, 160),
        ("RCP", 16, 1, 161),
        ("RCP", 8, 0, 80),
        ("RCP", 8, 1, None),
    ]
    assert "8_1" in cells[-1].reason
    listed = Method.parse(f"both={tmp_path}/16_0,{tmp_path}/16_1!")
    assert [(c.seed, c.repair, c.plugin.pruner.seed) for c in listed.cells([4], [5, 6, 7])] == [
        (0, False, 160),
        (1, False, 161),
    ]


def test_random_methods_are_drawn_once_a_seed():
    cells = Method.parse(RANDOM).cells([16], [0, 3])
    assert [(c.method, c.seed, c.plugin.pruner.seed) for c in cells] == [("random", 0, 0), ("random", 3, 3)]
    assert [c.seed for c in Method.parse(FASTV).cells([16], [0, 3])] == [None]


def test_budgets_of_trained_weights_are_told(tiny_model, tmp_path):
    VLM(tiny_model, None, "tiny").attach(small_rcp(), keep=12).save_pretrained(tmp_path)
    same, other = Method.parse(str(tmp_path)).cells([12, 9], [0])
    prepare([same, other], vlm := VLM(tiny_model, None, "tiny"), {})
    assert vlm.host is None
    assert (same.note, other.note) == ("", "trained at 12 tokens")


# -- measuring ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def micro() -> VLM:
    return load("micro")


@pytest.fixture(scope="module")
def batch(small) -> dict:
    data = MicroData("micro", **small)
    data.prepare_data()
    data.setup("test")
    return next(iter(data.test_dataloader()))


def test_images_are_encoded_once_for_all_cells(micro, batch, monkeypatch):
    calls = []
    inner = micro.model.base_model
    encode = inner.get_image_features
    counted = wraps(encode)(lambda **kwargs: calls.append(1) or encode(**kwargs))  # its signature is read
    monkeypatch.setattr(inner, "get_image_features", counted)
    cells = [Cell("x", keep, 0, Plugin(Random())) for keep in (16, 8)]
    comparison = Comparison(micro, Cell(FULL), cells, 4)
    comparison.update(batch)
    assert calls == [1]
    assert micro.host is None
    assert [cell.keep for cell, _ in comparison.results()] == [None, 16, 8]


def test_methods_of_the_tower_encode_their_own_images(micro, batch):
    """A cell beside them still gets the plain features: it equals itself alone."""
    towers = [plugin for path in PRUNERS if (plugin := as_plugin(path)).pruner.tower]
    assert towers
    found = {}
    for plugins in ([], towers[:1]):
        cells = [*(Cell("tower", 8, None, plugin) for plugin in plugins), Cell("x", 8, 0, Plugin(Random()))]
        comparison = Comparison(micro, Cell(FULL), cells, 4)
        comparison.update(batch)
        found[len(plugins)] = {cell.method: result for cell, result in comparison.results()}
    assert found[1]["x"]["w2_per_layer"] == found[0]["x"]["w2_per_layer"]
    tower = found[1]["tower"]
    assert tower["avg_visual_tokens"] == 8
    assert tower["flops_parts"]["projector"] < found[1]["x"]["flops_parts"]["projector"]
    assert tower["kappa"] != found[1]["x"]["kappa"] > 0


def test_a_cell_alone_equals_the_same_beside_others(micro, batch):
    def measure(*keeps: int) -> dict:
        comparison = Comparison(micro, Cell(FULL), [Cell("x", keep, 0, Plugin(Random())) for keep in keeps], 4)
        comparison.update(batch)
        results = {cell.keep: result for cell, result in comparison.results()}
        return {key: value for key, value in results[8].items() if key not in TIMES}

    assert measure(16, 8) == measure(8)


def test_kappa_is_that_of_the_projected_tokens_left_at_the_end(micro, batch):
    """Against the features themselves and the tokens that a second run keeps."""
    comparison = Comparison(micro, Cell(FULL), [Cell("x", 16, 0, Plugin(Random([0, 8], [3.0, 1.0])))], 4)
    comparison.update(batch)
    result = comparison.results()[1][1]
    with torch.no_grad():
        full = torch.stack(list(micro.model.get_image_features(**only_pixels(batch)).pooler_output))
    last = int(result["kept"]["8"])
    micro.attach(Random([0, 8], [3.0, 1.0]), keep=16)
    left = measuring.measure(micro, batch, measuring.Session(), 4).last
    micro.detach()
    assert left.sum(1).tolist() == [last] * 7
    assert result["kappa"] == pytest.approx(kappa(full, left).mean().item(), rel=1e-4)


def only_pixels(batch: dict) -> dict:
    return {"pixel_values": batch["inputs"]["pixel_values"], "return_dict": True}


def test_divergence_is_that_of_the_answer_tokens(micro, batch):
    """The same prefix on both sides: by hand from the models' own logits."""
    with torch.no_grad():
        full = micro.detach().model(**batch["inputs"]).logits
        micro.attach(Random([0]), keep=16)
        pruned = micro.model(**batch["inputs"]).logits
    teacher, found = (
        measuring.measure(micro, batch, session, 4, keep_logits=True)
        for session in (measuring.TEACHER, measuring.Session())
    )
    micro.detach()
    by_hand = []
    for row, labels in enumerate(batch["inputs"]["labels"]):
        places = [place - 1 for place, label in enumerate(labels.tolist()) if label != -100]
        p, q = (torch.softmax(logits[row, places].double(), -1) for logits in (full, pruned))
        by_hand.append((p * (p / q).log()).sum(-1).mean().item())
    assert max(by_hand) > 0.1
    assert measuring.divergences(found, teacher) == pytest.approx(by_hand, rel=1e-3, abs=1e-5)
    assert measuring.divergences(teacher, teacher) == [0.0] * len(by_hand)


# -- tables ---------------------------------------------------------------------------------------------------------
def result(accuracy: float, w2: float) -> dict:
    values = dict.fromkeys(("flops", "kv_bytes", "kappa", "avg_visual_tokens"), 4.0)
    return {"accuracy": accuracy, "w2": w2, **values, "per_skill": {"colour": accuracy}, "hits": "10", "seconds": 1.0}


def test_means_and_spread_over_seeds():
    full = result(0.8, 0.0)
    rows = [rows_module.row(Cell("a", 8, seed), result(value, 1.0), full) for seed, value in enumerate((0.2, 0.4, 0.6))]
    rows.append(rows_module.row(Cell("a", 8, 3, reason="lost", failed=True), None, full))
    rows.append(rows_module.row(Cell("a", 8, 4), None, full))
    assert [row["status"] for row in rows] == ["measured"] * 3 + ["failed", "pending"]
    (mean,) = rows_module.means(rows)
    assert (mean["accuracy"], mean["accuracy_std"], mean["runs"]) == pytest.approx((0.4, 0.2, 3))
    assert mean["retained"] == pytest.approx(0.5)
    assert (mean["keep"], mean["seed"]) == (8, None)
    assert "hits" not in mean
    assert tables.remarks(rows)[0] == "a: failed at 8 tokens, lost."


def test_rank_correlation_over_all_and_within_budgets():
    """Over all, more shift goes with less accuracy; within both budgets it goes with more."""
    points = {16: [(0.7, 1.0), (0.8, 2.0), (0.9, 3.0)], 8: [(0.1, 11.0), (0.2, 12.0), (0.3, 13.0)]}
    full = result(1.0, 0.0)
    rows = [
        rows_module.row(Cell(f"m{i}", keep), result(*point), full)
        for keep, at in points.items()
        for i, point in enumerate(at)
    ]
    everywhere, inside = rows_module.ranks_agree(rows, "w2")
    ranks = np.argsort(np.argsort([p[0] for at in points.values() for p in at]))
    shifts = np.argsort(np.argsort([p[1] for at in points.values() for p in at]))
    assert everywhere == pytest.approx(np.corrcoef(ranks, shifts)[0, 1], rel=1e-5)
    assert everywhere < 0
    assert inside == pytest.approx(1.0, rel=1e-5)
    assert np.isnan(rows_module.ranks_agree(rows[:2], "w2")[0])


def test_store_tells_cells_of_other_code(tmp_path):
    cell = Cell("x", 8, key="k")
    Store(tmp_path).write(cell, {"accuracy": 0.5})
    later = Store(tmp_path)
    assert (later.read(cell), later.other_code) == ({"accuracy": 0.5}, 0)
    later.code = "other"
    later.read(cell)
    later.read(cell)
    assert later.other_code == 1
    assert later.read(Cell("x", 8, key="other")) is None


def test_tables_say_where_a_price_is_unknown():
    known, unknown = result(0.5, 1.0), {**result(0.5, 1.0), "flops": None, "kv_bytes": None}
    rows = [rows_module.row(Cell("a", 8), each, each) for each in (known, unknown)]
    rows = [{**each, "questions": 2} for each in rows]
    assert (rows[0]["flops_reduction"], rows[1]["flops_reduction"]) == (0.0, None)
    line = tables.methods_table(rows_module.means(rows[1:]))[1]
    assert line == ["a", "50.0", "100.0", "4.0", "unknown", "unknown", "unknown", "1.00"]


def test_names_with_bars_keep_a_table_whole():
    rows = [{**rows_module.row(Cell("a|b", 8), result(0.5, 1.0), result(1.0, 0.0)), "questions": 2}]
    lines = tables.markdown(rows, 144).splitlines()
    assert lines[2].startswith("| a\\|b |")
