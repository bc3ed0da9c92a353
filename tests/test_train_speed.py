"""jobs/train_speed.py, whole, on a tiny model: every form runs, and those that compute the same find the same."""

import json
import runpy
import sys

import pytest
import yaml
from tiny import ROOT

HEAD = {"num_attention_heads": 2, "intermediate_size": 64}
MODEL = {
    "model_type": "llava",
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "image_size": 24,
        "patch_size": 4, **HEAD,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 6, "num_key_value_heads": 2, "vocab_size": 60,
        **HEAD,
    },
    "image_token_index": 59,
    "image_seq_length": 36,
    "vision_feature_layer": -1,
}  # fmt: skip


def test_every_form_of_a_step_runs_and_the_long_way_gives_the_same_losses(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": MODEL}))  # fmt: skip
    found = tmp_path / "found.json"
    words = f"--model {tmp_path}/tiny.yaml --overlay {ROOT}/configs/bench/pruners/rcp.yaml --json {found} --keep 18 "
    words += "--dtype float32 --batch 2 --text-tokens 24 --rounds 1 --clock cpu"
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *words.split()])
    runpy.run_path(str(ROOT / "jobs" / "train_speed.py"), run_name="__main__")
    rows = json.loads(found.read_text())
    assert list(rows) == ["naive", "apart", "soft", "kept", "cached", "checkpointed", "contenders", "drop"]
    assert rows["kept"]["losses"] == pytest.approx(rows["soft"]["losses"], rel=1e-4)
    assert rows["cached"]["losses"] == pytest.approx(rows["soft"]["losses"], rel=1e-4)
    assert rows["apart"]["losses"] == rows["soft"]["losses"] == rows["checkpointed"]["losses"]
    assert rows["naive"]["losses"] == pytest.approx(rows["soft"]["losses"], rel=1e-4)
    assert set(rows["naive"]["losses"]) == {"loss/total", "loss/task", "loss/repair"}
    assert all(row["median"] > 0 and row["peak"] > 0 for row in rows.values())
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops["checkpointed"] > flops["apart"] > flops["soft"] > flops["contenders"] > flops["drop"]
    assert flops["soft"] > flops["kept"] > flops["cached"]
    assert rows["naive"]["held"] > 1.5 * rows["soft"]["held"], "two models, one plug-in"
    assert "faster" in capsys.readouterr().out
