"""configs/models/*.yaml: each stands alone and over another file, and suits the shape of its checkpoint."""

from functools import cache, partial
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

import lit_prune
from lit_prune.commands.trainer import build
from lit_prune.cost.shapes import names
from lit_prune.cost.sizes import USUAL, image_load
from lit_prune.loading import shipped_config
from lit_prune.ops.budget import average

EVERY = pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda p: p.stem)
# Visual tokens of an image of 672 x 672 pixels, as the models' processors have it.
VISUAL = {
    "gemma3-4b": 256,
    "glm-4.6v-flash": 576,
    "internvl3-8b": 1280,
    "internvl3.5-8b": 1280,
    "llava-1.5-13b": 576,
    "llava-1.5-7b": 576,
    "llava-next-mistral-7b": 2928,
    "llava-next-vicuna-7b": 2928,
    "llava-onevision-7b": 3699,
    "molmo2-8b": 725,
    "qwen2.5-vl-7b": 576,
    "qwen3-vl-8b": 441,
    "qwen3.5-9b": 441,
    "smolvlm2-2.2b": 1377,
}


@cache
def written(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["model"]


def test_every_shipped_shape_has_its_overlay():
    bases = [written(path)["base"] for path in (ROOT / "configs" / "models").glob("*.yaml")]
    assert sorted(bases) == list(names())


@EVERY
def test_overlay_suits_its_model(path):
    """Layers inside, repair behind the stage that feeds it, and a budget that is met exactly."""
    model = written(path)
    host = lit_prune.load(model["base"], random_weights=True, device="meta").attach(path)
    dims, pruner = host.plugin.dims, host.plugin.pruner
    assert host.plugin.keep == model["keep"]
    assert list(host.host.stages) == model["pruner"]["init_args"]["layers"]
    assert sorted(host.host.feeds) == model["repair"]["init_args"]["layers"]
    visual = VISUAL[path.stem]
    assert dims.varies or visual == dims.visual
    schedule = pruner.plan(model["keep"], visual, dims.depth)
    assert average(schedule, visual, dims.depth) == model["keep"]
    counts = list(schedule.values())
    assert visual > counts[0] > counts[1] > counts[2] > 0
    count = sum(p.numel() for p in host.plugin.parameters())
    assert count / sum(p.numel() for p in host.model.parameters()) < 0.006


@EVERY
def test_price_knows_the_usual_image(path):
    assert image_load(shipped_config(written(path)["base"]), *USUAL).visual == VISUAL[path.stem]


@EVERY
def test_overlay_goes_through_the_parser(path, monkeypatch, tmp_path):
    """Over another configuration, whose settings of the same model leave no trace, and alone."""
    monkeypatch.setattr("lit_prune.training.module.load", partial(lit_prune.load, device="meta"))
    fixed = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    fixed += ["--model.random_weights=true", "--model.dtype=bfloat16"]
    for files in ([ROOT / "configs" / "micro.yaml", path], [path]):
        module = build([str(file) for file in files], fixed).model
        model = written(path)
        assert module.plugin.base == model["base"]
        assert module.host.keep == model["keep"]
        assert module.plugin.pruner.config() == model["pruner"]["init_args"]
        assert module.plugin.repair.config() == model["repair"]["init_args"]
