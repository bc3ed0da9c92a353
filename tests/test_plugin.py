"""Plug-in folders: what is saved comes back, what doesn't fit is refused, nothing is executed."""

import json
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import KEEP, PRUNERS, batch, forward, samples

from lit_prune import __version__
from lit_prune.errors import LitPruneError
from lit_prune.plugin import SETTINGS, WEIGHTS, Plugin, fingerprint
from lit_prune.pruners.base import Pruner
from lit_prune.pruners.random import Random
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)


@pytest.fixture
def folder(pruned, tmp_path):
    """A trained plug-in (its parameters moved) on disk."""
    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair())
    vlm.save_pretrained(tmp_path / "rcp")
    vlm.detach()
    return tmp_path / "rcp"


def edit(folder, **changes) -> None:
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@EVERY
def test_round_trip(pruned, tiny_model, tmp_path, pruner):
    """Same settings, same weights, same outputs; mode of use, not of training."""
    inputs = batch(samples())
    vlm = pruned(pruner)
    logits, _ = forward(vlm, inputs)
    vlm.save_pretrained(tmp_path)
    settings, weights = vlm.plugin.settings(), {n: p.clone() for n, p in vlm.plugin.state_dict().items()}
    vlm.detach()
    again = VLM(tiny_model, None, "tiny").attach(tmp_path)
    try:
        assert again.plugin.settings() == settings
        assert not any(module.training for module in again.plugin.modules())
        assert list(again.plugin.state_dict()) == list(weights)
        assert all(torch.equal(p, weights[n]) for n, p in again.plugin.state_dict().items())
        assert torch.equal(forward(again, inputs)[0], logits)
    finally:
        again.detach()


def test_folder_explains_itself_to_people(folder):
    card = (folder / "README.md").read_text()
    assert "[More Information Needed]" not in card
    assert "library_name: lit_prune" in card
    for line in ("# RCP", "- repair: RepairAdapter at layers", "- trains: ", 'lit_prune.load("tiny")'):
        assert line in card


def test_folder_says_what_it_is(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["lit_prune"] == __version__
    assert settings["base"] == "tiny"
    assert settings["keep"] == KEEP
    assert settings["dims"] == {"width": 64, "depth": 8, "visual": 36, "varies": False}
    assert settings["schedule"] == {"1": 16, "3": 8, "5": 4}
    assert settings["pruner"]["class_path"] == "lit_prune.pruners.rcp.RCP"
    assert settings["pruner"]["init_args"]["layers"] == [1, 3, 5]
    assert settings["repair"]["init_args"]["stages"] == [1, 2]
    assert {name.partition(".")[0] for name in load_file(folder / WEIGHTS)} == {"pruner", "repair"}


def test_budget_can_be_overridden(folder, tiny_model):
    vlm = VLM(tiny_model, None, "tiny").attach(folder, keep=20)
    try:
        _, record = forward(vlm, batch(samples()))
        assert record.trace.average_visual().tolist() == [20] * 3
    finally:
        vlm.detach()


# -- another base model ---------------------------------------------------------------------------------------------
def test_other_weights_are_refused(folder):
    with pytest.raises(LitPruneError, match="trained for the weights of tiny, which differ from the model's here"):
        VLM(tiny.build_model(seed=1), None, "other").attach(folder)


@pytest.mark.parametrize("sizes", [{"depth": 10}, {"width": 32}])
def test_other_sizes_are_refused(folder, sizes):
    with pytest.raises(LitPruneError, match="made for tiny with 8 decoder layers of width 64, the model here has"):
        VLM(tiny.build_model(**sizes), None, "other").attach(folder)


def test_other_number_of_visual_tokens_is_refused(folder):
    edit(folder, dims={"width": 64, "depth": 8, "visual": 144})
    with pytest.raises(LitPruneError):
        VLM(tiny.build_model(), None, "other").attach(folder)


def test_refusal_leaves_what_was_attached(folder, pruned):
    model = tiny.build_model(seed=1)
    vlm = pruned(Random([0]), model=model)
    host = vlm.host
    with pytest.raises(LitPruneError):
        vlm.attach(folder)
    assert vlm.host is host
    assert host.handles


def test_the_same_weights_in_half_precision_are_the_same_base(folder):
    VLM(tiny.build_model().bfloat16(), None, "tiny").attach(folder)


def test_methods_without_parameters_fit_any_weights(pruned, tmp_path):
    vlm = pruned(Random([0]), keep=9)
    vlm.plugin.repair = None
    vlm.save_pretrained(tmp_path)
    other = VLM(tiny.build_model(seed=1), None, "other").attach(tmp_path)
    assert other.plugin.keep == 9


def test_fingerprint_tells_weights_apart(tiny_model):
    assert fingerprint(tiny_model) == fingerprint(tiny.build_model())
    assert fingerprint(tiny_model) != fingerprint(tiny.build_model(seed=1))
    with torch.device("meta"):
        assert fingerprint(torch.nn.Linear(4, 4)) == []


# -- damaged folders ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_damaged_settings(folder, text):
    (folder / SETTINGS).write_text(text)
    with pytest.raises(LitPruneError, match="is not JSON"):
        Plugin.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{}", '{"pruner": {}}', "[]", "3", '"text"'])
def test_settings_of_something_else(folder, text):
    (folder / SETTINGS).write_text(text)
    with pytest.raises(LitPruneError, match="not a plug-in"):
        Plugin.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"pruner": None},
        {"pruner": {"class_path": "lit_prune.pruners.rcp.RCP"}},
        {"pruner": {"class_path": 7, "init_args": {}}},
        {"pruner": {"class_path": "lit_prune.pruners.rcp.RCP", "init_args": {"no_such_argument": 1}}},
        {"pruner": {"class_path": "lit_prune.pruners.rcp.RCP", "init_args": {"layers": "nonsense"}}},
        {"dims": {"width": 64}},
        {"dims": "wide"},
    ],
    ids=str,
)
def test_settings_with_wrong_parts(folder, changes):
    edit(folder, **changes)
    with pytest.raises(LitPruneError, match=SETTINGS):
        Plugin.from_pretrained(folder)


def test_truncated_weights(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LitPruneError, match=rf"{WEIGHTS} can't be read"):
        Plugin.from_pretrained(folder)


@pytest.mark.parametrize("missing", [SETTINGS, WEIGHTS])
def test_missing_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(LitPruneError, match=missing):
        Plugin.from_pretrained(folder)


def test_weights_of_another_plugin(folder, pruned, tmp_path):
    pruned(tiny.small_rcp(queries=8), repair=tiny.small_repair()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).rename(folder / WEIGHTS)
    with pytest.raises(LitPruneError, match=rf"(?s){WEIGHTS} doesn't fit {SETTINGS}.*queries"):
        Plugin.from_pretrained(folder)


def test_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LitPruneError, match="no such folder"):
        Plugin.from_pretrained(tmp_path / "nowhere")


def test_given_schedule_runs_and_comes_back(pruned, tiny_model, tmp_path):
    """A schedule in place of an average, also for a batch with a sample that has no image."""
    schedule = {1: 20, 3: 9, 5: 4}
    vlm = pruned(tiny.small_rcp(), keep=schedule, repair=tiny.small_repair())
    _, record = forward(vlm, batch(samples(pictured=(True, True, False))))
    assert [stage.kept.sum(1).tolist() for stage in record.stages] == [[n, n, 0] for n in schedule.values()]
    vlm.save_pretrained(tmp_path)
    vlm.detach()
    again = VLM(tiny_model, None, "tiny").attach(tmp_path)
    assert again.plugin.keep == again.host.schedule == schedule
    again.detach()


# -- nothing is executed --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    ["os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", "lit_prune.repair.RepairAdapter", "Random"],
)
def test_class_that_is_no_pruner(folder, path):
    edit(folder, pruner={"class_path": path, "init_args": {}})
    with pytest.raises(LitPruneError, match=rf"names {path}, which is no PruningMethod that is imported here"):
        Plugin.from_pretrained(folder)


def test_foreign_module_is_never_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "foreign_method.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, pruner={"class_path": "foreign_method.Mine", "init_args": {}})
    with pytest.raises(LitPruneError, match="import its module first, if you trust it"):
        Plugin.from_pretrained(folder)
    assert "foreign_method" not in sys.modules


def test_module_of_a_later_version(folder):
    edit(folder, pruner={"class_path": "lit_prune.pruners.future.Method", "init_args": {}})
    with pytest.raises(LitPruneError, match=r"this version has no lit_prune\.pruners\.future\.Method"):
        Plugin.from_pretrained(folder)


class Mine(Pruner):
    """A method of somebody else's, imported before its folder is read."""

    def score(self, context):
        return -context.ordinal.float()


def test_own_method_comes_back_when_its_module_is_imported(pruned, tmp_path):
    vlm = pruned(Mine([0]))
    vlm.save_pretrained(tmp_path)
    again = Plugin.from_pretrained(tmp_path)
    assert type(again.pruner).__name__ == "Mine"
