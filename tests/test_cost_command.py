"""`lit-prune cost`: the table, the JSON and the plot, without weights."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from lit_prune.cli import main
from lit_prune.cost.shapes import shipped_fields

RCP = str(ROOT / "configs" / "pruners" / "rcp.yaml")
LLAVA = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching for the network is an error."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def report(tmp_path: Path, *options: str) -> Any:
    main(["cost", *options, "--json", str(tmp_path / "out" / "cost.json")])
    return json.loads((tmp_path / "out" / "cost.json").read_text())


def test_rcp_on_llava(tmp_path, capsys):
    found = report(tmp_path, "--model", LLAVA, "--pruner", RCP, "--keep", "64", "--text-tokens", "64")
    assert found["full_decoder_flops"] == pytest.approx(8.504e12, rel=1e-4)
    assert found["avg_visual_tokens"] == 64
    assert sum(found["visual_tokens_by_layer"]) == 64 * 32
    assert found["reduction"] == 1 - found["decoder_flops"] / found["full_decoder_flops"]
    pruning = ("decoder", "scoring", "pruner", "repair")
    assert found["decoder_flops"] == sum(found["parts"][part] for part in pruning)
    assert all(found["parts"][part] > 0 for part in pruning)
    assert all(sum(parts.values()) == 2 * parts["total"] for parts in (found["parts"], found["full_parts"]))
    assert found["kv_bytes"] == (64 + 64) * 32 * 2 * 4096 * 2
    assert found["full_kv_bytes"] == (576 + 64) * 32 * 2 * 4096 * 2
    assert found["kv_bytes_after_answer"] - found["kv_bytes"] == 31 * 32 * 2 * 4096 * 2
    steps = [found[key]["total"] for key in ("decode_parts", "full_decode_parts")]
    assert steps[0] > 31 * found["decode_flops_per_token"]
    assert steps[1] > steps[0] > 0.9 * steps[1]
    table = capsys.readouterr().out
    assert "8.504 T" in table
    assert f"{-found['reduction']:+.1%}" in table


def test_several_budgets_and_a_plot(tmp_path):
    options = ["--pruner", RCP, "--keep", "192", "2:64,10:32,18:16", "--dtype", "float32", "--answer-tokens", "1"]
    many = report(tmp_path, *options, "--plot", str(tmp_path / "plots" / "cost.png"))
    assert [one["keep"] for one in many] == ["192", "2:64,10:32,18:16"]
    assert many[1]["schedule"] == {"2": 64, "10": 32, "18": 16}
    assert many[1]["kv_bytes"] == sum(n + 64 for n in many[1]["visual_tokens_by_layer"]) * 2 * 4096 * 4
    assert many[1]["decode_parts"]["total"] == 0
    assert many[1]["kv_bytes_after_answer"] == many[1]["kv_bytes"]
    assert (tmp_path / "plots" / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_a_flag_of_a_group_needs_no_value(tmp_path):
    options = ["--pruner", RCP, "--keep", "64", "--train", "--train.batch-size", "4", "--train.checkpointing"]
    settings = report(tmp_path, *options)["training"]["settings"]
    assert (settings["batch_size"], settings["checkpointing"], settings["gpus"]) == (4, True, 8)


def test_full_model_alone(tmp_path):
    found = report(tmp_path, "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--image-size", "1008", "672")
    assert found["visual_tokens"] == 36 * 24
    assert found["decoder_flops"] == found["full_decoder_flops"]
    assert (found["reduction"], found["keep"], found["schedule"]) == (0, None, {})


def test_local_folder_and_micro_agree(tmp_path, micro_folder):
    options = ["--pruner", RCP, "--keep", "16", "--text-tokens", "12"]
    here, shipped = (
        report(tmp_path, "--model", str(micro_folder), *options),
        report(tmp_path, "--model", "micro", *options),
    )
    assert here["parts"] == shipped["parts"]
    assert shipped["visual_tokens"] == 144


def test_visual_tokens_scale_the_tower(tmp_path):
    one, five = (report(tmp_path, "--visual-tokens", str(576 * n)) for n in (1, 5))
    assert five["parts"]["vision"] == 5 * one["parts"]["vision"]


def test_a_pruned_decoder_behind_an_unknown_tower(tmp_path):
    """Which has no formula, so it is counted on its class, without weights."""
    fields = shipped_fields(LLAVA)
    fields["vision_config"]["model_type"] = "dinov2"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = report(tmp_path, "--model", str(tmp_path), "--pruner", RCP, "--keep", "64", "--visual-tokens", "576")
    known = report(tmp_path, "--model", LLAVA, "--pruner", RCP, "--keep", "64")
    both = known["parts"]["vision"] + known["parts"]["projector"]
    assert found["parts"]["vision"] == pytest.approx(both, rel=0.02), "a tower of the same sizes"
    assert found["parts"]["projector"] is None, "counted with the tower"
    assert (found["decoder_flops"], found["schedule"]) == (known["decoder_flops"], known["schedule"])


def test_a_method_inside_a_tower_without_a_price(tmp_path, capsys):
    """Its stages are found by structure; what the tower itself costs isn't known from the configuration."""
    visionzip = str(ROOT / "configs" / "pruners" / "visionzip.yaml")
    fields = shipped_fields(LLAVA)
    fields["vision_config"]["model_type"] = "dinov2"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = ("--model", str(tmp_path), "--pruner", visionzip, "--keep", "64", "--visual-tokens", "576")
    found = report(tmp_path, *options)
    assert found["avg_visual_tokens"] == 64
    assert found["parts"]["vision"] is None
    assert "unknown" in capsys.readouterr().out


def test_a_plugins_own_budget(tmp_path, micro_folder):
    from lit_prune.vlm import load

    load(micro_folder).attach(RCP, keep=24).save_pretrained(tmp_path / "plugin")
    assert report(tmp_path, "--model", "micro", "--pruner", str(tmp_path / "plugin"))["avg_visual_tokens"] == 24


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pruner", RCP, "--keep", "600"], "576 visual tokens"),
        (["--pruner", RCP, "--keep", "20"], "at least 36.9"),
        (["--pruner", RCP], "give budgets"),
        (["--pruner", RCP, "--keep", "many"], "write a number of visual tokens"),
        (["--keep", "64"], "needs a method"),
        (["--model", "some/model"], "llava-hf/llava-1.5-7b-hf"),
        (["--model", "./nowhere"], "no config.json"),
        (["--text-tokens", "0"], "must be at least 1"),
        (["--image-size", "672"], "height and width"),
        (["--image-size", "672", "672", "--visual-tokens", "9"], "leave --visual-tokens out"),
        (["--plot", "cost.seashell"], "seashell"),
    ],
)
def test_errors_are_one_message(options, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *options])
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_help_explains_the_conventions(capsys):
    with pytest.raises(SystemExit):
        main(["cost", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for part in ("multiply-add is two FLOPs", "attention is the full square", "--keep", "no network"):
        assert part in told


def test_the_figures_of_the_docs(capsys):
    """`docs/cost.md` shows what its code prints."""
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == shown
