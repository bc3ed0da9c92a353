"""`jobs/alternatives.py`: the public way to prune, restated, does what ours does."""

import importlib.util
import sys

import torch
from tiny import ROOT

import lit_prune
from lit_prune.commands._support.inputs import load_model
from lit_prune.evaluation.timing.prompts import random_prompt
from lit_prune.loading import config_of

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
MODEL = {
    "model_type": "llava",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **SMALL},
    "text_config": {"model_type": "llama", "vocab_size": 100, "num_key_value_heads": 2, **SMALL},
    "image_token_index": 99,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
}


def test_the_public_way_prunes_as_ours_does(monkeypatch):
    spec = importlib.util.spec_from_file_location("alternatives", ROOT / "jobs/alternatives.py")
    alternatives = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alternatives", alternatives)
    spec.loader.exec_module(alternatives)
    vlm: lit_prune.VLM = load_model(config_of(MODEL, "model"), "float32", "cpu", True)
    prompt, keys = random_prompt(vlm, 2, 16), {}
    with torch.inference_mode():
        for variant in alternatives.variants(vlm, 592)[:5]:
            with variant.inside():
                _, cache = variant.prefill(variant.encode(prompt.pixels))
            keys[variant.name] = cache.layers[-1].keys
    assert keys["full model"].shape[2] == 592
    torch.testing.assert_close(keys["FastV, public way"], keys["FastV, lit_prune"])
    # VisionZip's contextual tokens stand last in the public form, in their own places in ours.
    assert keys["VisionZip, public way"].shape == keys["VisionZip, lit_prune"].shape
    assert vlm.plugin is None
