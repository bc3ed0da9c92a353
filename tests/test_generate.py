"""`lit-prune generate`: answers, costs and times, and clear errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_prune.cli import main
from lit_prune.commands._support.inputs import encode
from lit_prune.commands.generate import full_trace, pair
from lit_prune.cost.flops import decoder_total, price
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.measuring import TEACHER
from lit_prune.host import Record, Session
from lit_prune.micro.model import build
from lit_prune.micro.world import VALIDATION_SEED, make_scene
from lit_prune.vlm import load

PRUNERS = Path(__file__).parents[1] / "configs" / "pruners"
FASTV = ["--pruner", PRUNERS / "fastv.yaml", "--keep", 16]
PROMPTS = ["What colour is the tile?", "Where is the red circle relative to the blue tile?"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / "a.png", folder / "b.png"]
    for seed, path in enumerate(paths):
        make_scene(VALIDATION_SEED + seed).image().save(path)
    return paths


def generate(model: Path, images: list[Path], prompts: list[str], *options: Any) -> dict[str, Any]:
    """Run the verb and read its JSON."""
    report = images[0].parent / "report.json"
    args = ["--model", model, "--image", *images, "--prompt", *prompts, "--max-new-tokens", 3, "--json", report]
    main(["generate", *args, *options])
    return json.loads(report.read_text())


def failure(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """What stderr says when a command ends with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "Traceback" not in said
    return said[said.index("error: ") :]


def test_batch_equals_each_alone(micro_folder: Path, images: list[Path]) -> None:
    both = generate(micro_folder, images, PROMPTS, *FASTV)
    assert both["batch"] == 2
    for i in range(2):
        alone = generate(micro_folder, images[i : i + 1], PROMPTS[i : i + 1], *FASTV)
        assert alone["samples"] == both["samples"][i : i + 1]


def test_compare_shows_the_full_model_beside(
    micro_folder: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = generate(micro_folder, images, PROMPTS[:1], *FASTV, "--compare")
    printed = capsys.readouterr().out
    vlm = load(micro_folder)
    opened = [Image.open(path) for path in images]
    plain = vlm.answer(opened, PROMPTS[:1] * 2, max_new_tokens=3)
    pruned = vlm.attach(PRUNERS / "fastv.yaml", keep=16).answer(opened, PROMPTS[:1] * 2, max_new_tokens=3)
    for i, sample in enumerate(report["samples"]):
        fewer, full = sample["methods"]["FastV"], sample["methods"]["full model"]
        assert (fewer["answer"], full["answer"]) == (pruned[i], plain[i])
        assert (fewer["avg_visual_tokens"], full["avg_visual_tokens"]) == (16, 144)
        assert list(fewer["kept"]) == ["1", "8"]
        assert 0.7 < fewer["flops_reduction"] < 0.9
        assert full["flops_reduction"] == 0
        assert plain[i] in printed
    assert all(seconds > 0 for seconds in report["first_token_seconds"].values())
    assert "batch of 2" in printed


def test_plain_model_without_pruner(micro_folder: Path, images: list[Path]) -> None:
    report = generate(micro_folder, images[:1], PROMPTS, "--dtype", "bfloat16")
    assert report["dtype"] == "bfloat16"
    assert [list(sample["methods"]) for sample in report["samples"]] == [["full model"]] * 2


def test_full_trace_is_what_the_plain_model_runs(micro_folder: Path, images: list[Path]) -> None:
    vlm = load(micro_folder)
    inputs = encode(vlm, [Image.open(path) for path in images], PROMPTS)
    record = Record()
    vlm.attach(PRUNERS / "uniform.yaml", keep=16)
    with torch.no_grad(), vlm.using(Session(prune=TEACHER.prune, repair=TEACHER.repair, record=record)):
        vlm.model(**inputs)
    made = price(full_trace(inputs, vlm), vlm.size)
    assert torch.equal(decoder_total(made), decoder_total(price(record.trace, vlm.size)))
    assert (made["vision"] > 0).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image", "absent.png"], "absent.png"),
        (["--image", "broken.png"], "broken.png cannot be read"),
        (["--image", "bomb.png"], "bomb.png is a decompression bomb"),
        (["--image", "."], "is a folder"),
        (["--image", "a.png", "a.png", "--prompt", "a", "b", "c"], "2 images and 3 prompts"),
        (["--prompt", "red " * 1200], "context"),
        (["--prompt", "a <image> b"], "<image>"),
        (["--prompt", " "], "empty"),
        (["--max-new-tokens", 0], "at least 1"),
        (["--compare"], "--pruner"),
        (["--pruner", PRUNERS / "fastv.yaml"], "--keep N"),
        ([*FASTV[:2], "--keep", 145], "144"),
        ([*FASTV[:2], "--keep", 0], "keep=0"),
        (["--pruner", PRUNERS / "oracle.yaml", "--keep", 16], "boxes"),
        (["--pruner", "absent.yaml", "--keep", 16], "absent.yaml"),
        (["--model", "./absent"], "absent"),
        (["--device", "quantum"], "device quantum can't be used"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(str(v)[:20] for v in value),
)
def test_errors_are_one_message(
    options: list[Any],
    told: str,
    micro_folder: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").symlink_to(images[0])
    (tmp_path / "broken.png").write_bytes(b"no image")
    if "bomb.png" in options:
        Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    given = {"--model": micro_folder, "--image": "a.png", "--prompt": "What?"}
    defaults = [part for name, value in given.items() if name not in options for part in (name, value)]
    assert told in failure(capsys, "generate", *defaults, *options)


def test_plugin_of_another_base(
    micro_folder: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, processor = build(seed=1)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    load(micro_folder).attach(PRUNERS / "rcp.yaml", keep=16).save_pretrained(tmp_path / "plugin")
    report = generate(micro_folder, images[:1], ["What?"], "--pruner", tmp_path / "plugin")
    assert report["samples"][0]["methods"]["RCP"]["avg_visual_tokens"] == 16
    args = ["--model", tmp_path / "other", "--image", images[0], "--prompt", "What?", "--pruner", tmp_path / "plugin"]
    assert "trained for the weights of" in failure(capsys, "generate", *args)


def test_one_image_or_one_prompt_serves_all() -> None:
    assert pair(["a", "b"], ["x"]) == (["a", "b"], ["x", "x"])
    assert pair(["a"], ["x", "y"]) == (["a", "a"], ["x", "y"])
    with pytest.raises(LitPruneError):
        pair([], ["x"])


def test_help_explains_every_option_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for option in ("image a.png", "prompt", "model", "pruner", "keep 16", "max-new-tokens", "dtype", "device", "json"):
        assert f"--{option}" in said


def test_a_method_by_its_name(micro_folder: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The same as by its file; a name of a method with weights is as untrained as its file."""
    by_name = generate(micro_folder, images, PROMPTS, "--pruner", "fastv", "--keep", 16)
    assert by_name["samples"] == generate(micro_folder, images, PROMPTS, *FASTV)["samples"]
    untrained = generate(micro_folder, images[:1], ["What?"], "--pruner", "rcp", "--keep", 16)
    assert list(untrained["samples"][0]["methods"]) == ["RCP, untrained"]
    assert "note: rcp describes a method that has weights" in capsys.readouterr().err
    args = ["--model", micro_folder, "--image", images[0], "--prompt", "What?", "--pruner", "fastw", "--keep", 16]
    assert "no method `fastw`; did you mean `fastv`?" in failure(capsys, "generate", *args)
