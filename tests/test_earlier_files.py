"""Files that version 0.1 wrote, and the names that it gave its users, still work.

`version_0_1` holds a run of two steps: `lightning fit -c configs/micro.yaml` with a small pruner and repair adapter.
"""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lit_prune
from lit_prune.commands.trainer import PruneCLI
from lit_prune.micro.world import make_scene

FILES = Path(__file__).parent / "version_0_1"
LOGITS = [13.151031, 7.421946, 4.403831, 21.821381]  # the three largest and their norm, as version 0.1 computed them
NAMES = [
    "lit_prune.VLM",
    "lit_prune.load",
    "lit_prune.LitPruneError",
    "lit_prune.callbacks.ExportPlugin",
    "lit_prune.callbacks.NanGuard",
    "lit_prune.callbacks.Progress",
    "lit_prune.callbacks.RunSummary",
    "lit_prune.callbacks.SamplePictures",
    "lit_prune.callbacks.SaveLast",
    "lit_prune.callbacks.StopOnSignal",
    "lit_prune.callbacks.Throughput",
    "lit_prune.callbacks.WandbRun",
    "lit_prune.callbacks.WriteAnswers",
    "lit_prune.data.InstructData",
    "lit_prune.data.MicroData",
    "lit_prune.data.StreamedData",
    "lit_prune.errors.LitPruneError",
    "lit_prune.loading.load_model",
    "lit_prune.plugin.Plugin",
    "lit_prune.pruners.Pruner",
    "lit_prune.pruners.base.Pruner",
    "lit_prune.pruners.rcp.RCP",
    "lit_prune.repair.RepairAdapter",
    "lit_prune.training.PruneModule",
    "lit_prune.vlm.VLM",
    "lit_prune.vlm.load",
]


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
    config = tmp_path / "config.yaml"
    config.write_text((FILES / "config_fit.yaml").read_text().replace("/tmp/bit/v01", str(tmp_path / "run")))
    begun = torch.load(FILES / "last.ckpt", weights_only=True)
    shutil.copy(FILES / "last.ckpt", tmp_path / "last.ckpt")
    PruneCLI("fit", [f"-c{config}", "--trainer.max_steps=3", f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    ended = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (begun["global_step"], ended["global_step"]) == (2, 3)
    assert begun["state_dict"].keys() == ended["state_dict"].keys()
