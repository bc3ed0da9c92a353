"""Files that version 0.1 wrote, and the names that it gave its users, still work.

`version_0_1` holds a run of two steps: `lightning fit -c configs/micro.yaml` with a small pruner and repair adapter.
"""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lit_prune
from lit_prune.commands.trainer import PruneCLI
from lit_prune.errors import LitPruneError, UsageError
from lit_prune.files.renamed import RENAMED, new_names, translated
from lit_prune.host.options import HostOptions
from lit_prune.micro.world import make_scene
from lit_prune.plugin import Plugin
from lit_prune.plugin.methods import as_plugin, plugin_from_yaml
from lit_prune.pruners.base import Pruner, VisionPruner
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.rcp import RCP
from lit_prune.training import PruneModule
from lit_prune.training.replay import HEADER, SavedStep, load_step, save_step
from lit_prune.training.step import StepKey

FILES = Path(__file__).parent / "version_0_1"
LOGITS = [13.151031, 7.421946, 4.403831, 21.821381]  # the three largest and their norm, as version 0.1 computed them
NAMES = [
    "lit_prune.VLM", "lit_prune.load", "lit_prune.LitPruneError", "lit_prune.callbacks.ExportPlugin",
    "lit_prune.callbacks.NanGuard", "lit_prune.callbacks.Progress", "lit_prune.callbacks.RunSummary",
    "lit_prune.callbacks.SamplePictures", "lit_prune.callbacks.SaveLast", "lit_prune.callbacks.StopOnSignal",
    "lit_prune.callbacks.Throughput", "lit_prune.callbacks.WandbRun", "lit_prune.callbacks.WriteAnswers",
    "lit_prune.data.InstructData", "lit_prune.data.MicroData", "lit_prune.data.StreamedData",
    "lit_prune.errors.LitPruneError", "lit_prune.loading.load_model", "lit_prune.plugin.Plugin",
    "lit_prune.pruners.Pruner", "lit_prune.pruners.base.Pruner", "lit_prune.pruners.rcp.RCP",
    "lit_prune.repair.RepairAdapter", "lit_prune.training.PruneModule", "lit_prune.vlm.VLM", "lit_prune.vlm.load",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_where_users_have_it(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_a_plugin_folder_loads_and_computes_what_it_did() -> None:
    vlm = lit_prune.load("micro").attach(str(FILES / "plugin"))
    with torch.no_grad():
        logits = vlm.model(**vlm.encode([make_scene(0).image()], ["What colour is the circle?"])).logits[0, -1]
    assert vlm.plugin is not None
    assert vlm.host is not None
    assert (vlm.plugin.keep, vlm.host.schedule) == (16, {1: 15, 5: 6, 9: 4})
    found = [*logits.topk(3).values.tolist(), logits.norm().item()]
    assert found == pytest.approx(LOGITS, abs=1e-3)


def test_a_run_resumes_from_its_checkpoint_and_configuration(tmp_path: Path) -> None:
    """The configuration under today's names; as it was it is refused, with all of them at once."""
    config = tmp_path / "config.yaml"
    old = (FILES / "config_fit.yaml").read_text().replace("/tmp/bit/v01", str(tmp_path / "run"))
    config.write_text(old)
    begun = torch.load(FILES / "last.ckpt", weights_only=True)
    shutil.copy(FILES / "last.ckpt", tmp_path / "last.ckpt")
    line = [f"-c{config}", "--trainer.max_steps=3", f"--ckpt_path={tmp_path / 'last.ckpt'}"]
    with pytest.raises(UsageError) as refused:
        PruneCLI("fit", line)
    now = {"model": RENAMED["PruneModule"], "model.pruner.init_args": RENAMED["Pruner"] | RENAMED["RCP"]}
    named = [f"`{place}.{before}` is now `{name}`" for place, names in now.items() for before, name in names.items()]
    assert str(refused.value) == f"{config}: renamed since version 0.1: {', '.join(named)}"

    for margin, names in (("  ", now["model"]), ("      ", now["model.pruner.init_args"])):
        for before, name in names.items():
            old = re.sub(rf"^{margin}{before}:", f"{margin}{name}:", old, flags=re.MULTILINE)
    config.write_text(old)
    PruneCLI("fit", line)
    ended = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (begun["global_step"], ended["global_step"]) == (2, 3)
    assert begun["state_dict"].keys() == ended["state_dict"].keys()


# -- names that changed ---------------------------------------------------------------------------------------------


CHANGED = {kind.__name__: kind for kind in (PruneModule, HostOptions, Pruner, VisionPruner, RCP, SavedStep)}


def test_every_old_name_has_a_new_one_that_the_class_takes() -> None:
    assert RENAMED.keys() == CHANGED.keys()
    for name, names in RENAMED.items():
        assert names.items() <= new_names(CHANGED[name]).items()


def written_by_0_1(folder: Path, plugin: Plugin) -> Path:
    """A plug-in's folder with each key renamed back, at any depth."""
    before = {"proportional_attention": "mass", "keep_mass": "mass", "attention_floor": "floor"}
    before |= {"stage_ratios": "shape", "vision_stage_ratios": "vision_shape"}
    plugin.save_pretrained(folder)

    def renamed(node: Any) -> Any:
        return {before.get(k, k): renamed(v) for k, v in node.items()} if isinstance(node, dict) else node

    file = folder / "plugin.json"
    settings = renamed(json.loads(file.read_text()))
    assert "proportional_attention" not in settings
    file.write_text(json.dumps(settings))
    return folder


def test_saved_settings_of_every_kind_are_translated(tmp_path: Path, tiny_model: torch.nn.Module) -> None:
    rcp = RCP([2, 4], [3.0, 1.0], select="mass", inner=16, attention_floor=1e-3, keep_mass=0.7)
    tower = DCPPrune((1, -1), (4.0, 1.0), vision_depth=2)
    for number, pruner in enumerate((rcp, tower, Chain(tower, rcp, middle=2.0), FastV([2], [1.0]))):
        vlm = tiny.attach(tiny_model, pruner, proportional_attention="similarity")
        assert vlm.plugin is not None
        settings = vlm.plugin.settings()
        assert Plugin.from_pretrained(written_by_0_1(tmp_path / str(number), vlm.plugin)).settings() == settings
        vlm.detach()


def test_an_argument_under_both_names_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FILES / "plugin", tmp_path / "plugin")
    file = tmp_path / "plugin" / "plugin.json"
    settings = json.loads(file.read_text())
    settings["pruner"]["init_args"]["stage_ratios"] = [1.0, 1.0, 1.0]
    file.write_text(json.dumps(settings))
    with pytest.raises(LitPruneError, match=r"plugin\.json can't be used: .*'shape'"):
        Plugin.from_pretrained(tmp_path / "plugin")


class Shaped(Pruner):
    """A method of somebody else, whose own argument is called `shape`."""

    def __init__(self, layers: list[int], shape: str = "round") -> None:
        super().__init__(layers)
        self.shape = shape


def test_an_argument_that_a_class_still_has_keeps_its_name(tmp_path: Path) -> None:
    assert translated(Shaped, {"layers": [1], "shape": "flat"}) == {"layers": [1], "shape": "flat"}
    Plugin(Shaped([1], "flat"), keep=8).save_pretrained(tmp_path / "plugin")
    assert Plugin.from_pretrained(tmp_path / "plugin").pruner.shape == "flat"
    file = tmp_path / "shaped.yaml"
    file.write_text(f"model: {{pruner: {{class_path: {__name__}.Shaped, init_args: {{layers: [1], shape: flat}}}}}}")
    assert plugin_from_yaml(file).pruner.shape == "flat"


def test_a_saved_step_is_read_under_its_old_name(tmp_path: Path) -> None:
    step = SavedStep({"input_ids": torch.ones(1, 2)}, {"w": torch.ones(2)}, ["a"], StepKey(3, 0.5), 7, 0, 1.5, None)
    save_step(tmp_path / "step.safetensors", step)
    with safe_open(tmp_path / "step.safetensors", "pt") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    header["moment"] = header.pop("key")
    save_file(tensors, tmp_path / "step.safetensors", {HEADER: json.dumps(header)})
    assert load_step(tmp_path / "step.safetensors").key == StepKey(3, 0.5)


METHOD = "{class_path: lit_prune.pruners.%s, init_args: {%s}}"
WRITTEN = {  # a configuration's `model`, and what is said of it
    "option": ("floor: 0.5", "`model.floor` is now `final_lr`"),
    "option of the host": ("mass: count", "`model.mass` is now `proportional_attention`"),
    "base class": (
        f"pruner: {METHOD % ('fastv.FastV', 'shape: [1]')}",
        "`model.pruner.init_args.shape` is now `stage_ratios`",
    ),
    "class": (f"pruner: {METHOD % ('rcp.RCP', 'mass: 0.5')}", "`model.pruner.init_args.mass` is now `keep_mass`"),
    "inside another": (
        "pruner: "
        + METHOD
        % ("chain.Chain", f"first: {METHOD % ('dcp.DCPPrune', 'vision_shape: [1]')}, then: {METHOD % ('rcp.RCP', '')}"),
        "`model.pruner.init_args.first.init_args.vision_shape` is now `vision_stage_ratios`",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_with_old_keys_are_refused(tmp_path: Path, name: str) -> None:
    text, said = WRITTEN[name]
    method = "" if "pruner" in text else f", pruner: {METHOD % ('fastv.FastV', '')}"
    file = tmp_path / "old.yaml"
    file.write_text(f"model: {{keep: 16, {text}{method}}}")
    message = f"^{re.escape(f'{file}: renamed since version 0.1: {said}')}$"
    for use in (lambda: PruneCLI("fit", ["-c", str(file)]), lambda: plugin_from_yaml(file)):
        with pytest.raises((LitPruneError, UsageError), match=message):
            use()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.floor=0.5"], "unknown option `--model.floor`; it is `--model.final_lr` now"),
        (["--model.spare", "2"], "unknown option `--model.spare`; it is `--model.contenders` now"),
        (["--model.pruner.shape=[1]"], "it is `stage_ratios` now"),
        (["--model.pruner.init_args.mass=0.5"], "of lit_prune.pruners.rcp.RCP; it is `keep_mass` now"),
        (["--model.lr=${model.floor}"], "nothing is at `${model.floor}`; it is `model.final_lr` now"),
        (["--config={model: {floor: 0.5}}"], "--config: renamed since version 0.1: `model.floor` is now `final_lr`"),
        (["-c", "pruners/dcp_mass.yaml"], "did you mean `pruners/dcp_proportional.yaml`?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_options_under_old_names_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        PruneCLI("fit", ["-c", "micro.yaml", *options])


def test_a_shipped_method_under_its_old_name_names_the_new_one() -> None:
    with pytest.raises(LitPruneError, match="no method `dcp_mass`; did you mean `dcp_proportional`"):
        as_plugin("dcp_mass")
