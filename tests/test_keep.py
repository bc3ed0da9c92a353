"""`keep` in all its forms and from all sides: Python, YAML, command lines, saved plug-ins, training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, collate, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf.errors import OmegaConfBaseException
from tiny import DEPTH, ROOT, VISUAL

from lit_prune import cli
from lit_prune.commands._support import yaml_loader
from lit_prune.errors import LitPruneError
from lit_prune.ops.budget import Share, as_json, asked, parse_budget
from lit_prune.plugin import Plugin
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.uniform import Uniform
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.training.losses import Anneal, budget_share, tokens_asked
from lit_prune.training.module import PruneModule
from lit_prune.vlm import VLM, plugin_from_yaml

FASTV = ROOT / "configs" / "pruners" / "fastv.yaml"
STILL = Anneal(target_share=0.0)
WRONG = [True, 0, -3, float("nan"), "0%", "200%", "abc", [16], {}, {"a": 3}]


@pytest.mark.parametrize(
    ("keep", "schedule"),
    [
        (12, {2: 4}), ("12", {2: 4}), ("33.3%", {2: 4}), (12.0, {2: 4}), ({2: 7}, {2: 7}), ({"2": 7}, {2: 7}),
        ("2:7", {2: 7}),
    ],
    ids=repr,
)  # fmt: skip
def test_python_takes_every_form(tiny_model, keep, schedule):
    vlm = VLM(tiny_model, None, "tiny").attach(FastV([2]), keep=keep)
    try:
        assert vlm.host.schedule == schedule
        assert vlm.plugin.keep in (12, {2: 7}), "a share is a count where all images have as many tokens"
    finally:
        vlm.detach()


@pytest.mark.parametrize("keep", WRONG, ids=repr)
def test_python_refuses_the_rest_in_one_line(tiny_model, keep):
    with pytest.raises(
        LitPruneError, match=r"\Akeep[ =].*(: not a budget; write a number| must lie between 1 and) [^\n]*\Z"
    ):
        VLM(tiny_model, None, "tiny").attach(FastV([2]), keep=keep)


@pytest.mark.parametrize("keep", [1e9, 37, "0.1%"])
def test_budgets_that_the_model_does_not_have(tiny_model, keep):
    with pytest.raises(LitPruneError, match=r"keep.* must lie between 1 and .* 36"):
        VLM(tiny_model, None, "tiny").attach(FastV([2]), keep=keep)


# -- files ----------------------------------------------------------------------------------------------------------
def written(folder: Path, keep: str) -> Path:
    file = folder / "method.yaml"
    method = "class_path: lit_prune.pruners.fastv.FastV, init_args: {layers: [2]}"
    file.write_text(f"model:\n  keep: {keep}\n  pruner: {{{method}}}\n")
    return file


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("16", 16), ("'16'", 16), ("11.1%", Share(11.1)), ("2:30", {2: 30}), ("2:64", {2: 64}), ("{2: 64}", {2: 64}),
        ("null", None),
    ],
)  # fmt: skip
def test_yaml_takes_every_form(tmp_path, text, keep):
    assert plugin_from_yaml(written(tmp_path, text)).keep == keep


@pytest.mark.parametrize("text", ["true", "0", "-3", ".nan", "0%", "200%", "abc", "[16]", "{}", "{a: 1}"])
def test_yaml_refuses_the_rest_and_names_file_and_key(tmp_path, text):
    file = written(tmp_path, text)
    with pytest.raises(LitPruneError) as refused:
        plugin_from_yaml(file)
    assert str(refused.value).startswith((f"{file}: model.keep ", f"{file}: model.keep="))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("keep", [16, Share(11.1), {2: 64}])
def test_saved_plugins_keep_it(tmp_path, keep):
    Plugin(Uniform([2]), keep=keep).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "plugin.json").read_text())["keep"] in (as_json(keep), {"2": 64})
    assert Plugin.from_pretrained(tmp_path).keep == keep


# -- the command line -----------------------------------------------------------------------------------------------
class Given:
    def __init__(self, keep: Any = 16) -> None:
        self.keep = keep


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """The parser of `lightning fit`, for one option."""
    yaml_loader.install("omegaconf+")
    made = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    made.add_class_arguments(Given, "model")
    made.add_argument("--config", action="config")
    return made


@pytest.mark.parametrize(
    ("text", "keep"),
    [("16", 16), ("11.1%", Share(11.1)), ("2:30", {2: 30}), ("2:30,4:15", {2: 30, 4: 15}), ("{2: 30}", {2: 30})],
)
def test_options_take_every_form(parser, tmp_path, text, keep):
    """Also where YAML would read 2:30 as 150, on the command line and in a file."""
    assert parse_budget(parser.parse_args([f"--model.keep={text}"]).model.keep) == keep
    (tmp_path / "a.yaml").write_text(f"model:\n  keep: {text}\n")
    assert parse_budget(parser.parse_args([f"--config={tmp_path / 'a.yaml'}"]).model.keep) == keep


@settings(max_examples=1000, deadline=None)
@given(st.text(max_size=20) | st.text("0123456789:,.% -+e{}[]'\"", max_size=12))
def test_whatever_is_typed_is_a_budget_or_refused_in_one_line(text):
    yaml_loader.install("omegaconf+")
    made = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    made.add_argument("--keep", type=Any)
    try:
        budget, told = parse_budget(made.parse_args([f"--keep={text}"]).keep, "--keep"), None
    except (ArgumentError, OmegaConfBaseException):
        return  # a mapping that is no YAML, or `${`: the parser says so
    except LitPruneError as error:
        budget, told = None, str(error)
    if budget is None:
        assert told.startswith(("--keep ", "--keep="))
        assert "\n" not in told
    if re.fullmatch(r"\s*[1-9]\d{0,11}\s*", text, re.ASCII):
        assert budget == int(text)


@pytest.mark.parametrize("verb", ["generate", "show", "bench", "cost", "compare"])
def test_verbs_refuse_in_one_line_that_names_the_option(verb, tmp_path, capsys, micro_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = ROOT / "docs" / "images" / "kept.png"
    options = {
        "generate": ["--image", image, "--prompt", "What?", "--model", micro_folder, "--pruner", FASTV],
        "show": ["--pruner", FASTV, "--out", "a.png", "--model", micro_folder],
        "bench": ["--methods", FASTV, "--model", micro_folder],
        "cost": ["--model", "micro", "--pruner", FASTV],
        "compare": ["-c", ROOT / "configs" / "micro.yaml", "--methods", FASTV, "--out", "x"],
    }
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, *options[verb], "--keep=0"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code in (1, 2)
    assert told.startswith(("error: --keep ", "error: --keep="))
    assert "11.1%" in told


def test_a_share_is_priced_of_the_prompts_own_tokens(capsys, tmp_path):
    asked_for = ["--pruner", FASTV, "--keep", "11.1%", "400", "--visual-tokens", "2880", "--json", tmp_path / "a.json"]
    cli.main(["cost", *asked_for])
    share, count = json.loads((tmp_path / "a.json").read_text())
    assert (share["keep"], count["keep"]) == ("11.1%", "400")
    assert share["avg_visual_tokens"] == pytest.approx(320, abs=0.4)


# -- where images differ --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next-vicuna", "internvl"])
def test_a_share_is_of_each_samples_own_tokens(name):
    """In a batch whose samples differ, and after saving."""
    family, model = FAMILIES[name], FAMILIES[name].build()
    vlm = VLM(model, None, "tiny").attach(Uniform([2]), keep="40%")
    try:
        _, record = tiny.forward(vlm, collate(family, prompts(family)))
        assert vlm.plugin.settings()["keep"] == "40%"
    finally:
        vlm.detach()
    totals = record.trace.total_visual
    assert len(set(totals.tolist())) == 3
    assert record.trace.average_visual().tolist() == pytest.approx([0.4 * n for n in totals.tolist()], abs=0.6)


def test_a_share_inside_the_tower(tiny_model):
    vlm = VLM(tiny_model, None, "tiny").attach(VisionZip(), keep="25%")
    try:
        _, record = tiny.forward(vlm, tiny.batch(tiny.samples()))
    finally:
        vlm.detach()
    assert record.trace.average_visual().tolist() == [VISUAL / 4] * 3
    assert record.trace.tower.projected.tolist() == [VISUAL / 4] * 3


# -- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [16, Share(11.1), {1: 30, 8: 12}, {0: 20}, {7: 3}], ids=str)
def test_what_training_asks_is_what_the_budget_says(keep):
    """The vectorised figure and the target of the budget loss, for samples of 0 to 700 tokens."""
    total = torch.tensor([0, 3, 20, 144, 700])
    wanted = [asked(keep, n, 16) if n else 0.0 for n in total.tolist()]
    assert tokens_asked(keep, total, STILL, 0.5, 16).tolist() == pytest.approx(wanted)
    pictured = [w / n for w, n in zip(wanted[1:], total.tolist()[1:], strict=True)]
    assert budget_share(keep, total, 16) == pytest.approx(sum(pictured) / 4)


@pytest.mark.parametrize(("keep", "spent"), [("11.1%", 16), ("1:30,5:12,10:6", None), ({1: 30, 5: 12, 10: 6}, None)])
def test_a_share_or_a_schedule_trains(student, world, tmp_path, keep, spent):
    module = student(keep=keep)
    run = tiny.trainer(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=2)
    run.fit(module, world())
    spent = spent or asked({1: 30, 5: 12, 10: 6}, 144, 16)
    assert run.callback_metrics["budget/actual"] == pytest.approx(spent)
    assert run.callback_metrics["budget/target"] == pytest.approx(spent)
    assert run.callback_metrics["val/visual_tokens"] == pytest.approx(spent)


@pytest.mark.parametrize("keep", [*WRONG, None], ids=repr)
def test_training_refuses_the_rest_and_names_the_key(micro_folder, keep):
    with pytest.raises(LitPruneError, match=r"\Amodel.keep[ =].*: not a budget[^\n]*\Z"):
        PruneModule(str(micro_folder), Uniform([2]), keep=keep)


def test_depth_is_the_models(tiny_model):
    assert asked({2: 6}, VISUAL, DEPTH) == (2 * VISUAL + 6 * 6) / DEPTH
