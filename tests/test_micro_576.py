"""The shipped model of 576 visual tokens: geometry, answers, laws of pruning, and its run."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from tiny import ROOT

import lit_prune
from lit_prune.cli import main
from lit_prune.evaluation.measuring import matches
from lit_prune.host import Record, Session
from lit_prune.micro.questions_576 import choose_questions
from lit_prune.micro.scenes_576 import SAMPLE_SEED, make_scene
from lit_prune.vlm import VLM

WEIGHTS = ROOT / "lit_prune" / "micro" / "weights_576"
PRUNERS = ROOT / "configs" / "pruners"
SCENES = range(SAMPLE_SEED, SAMPLE_SEED + 2)  # of neither validation nor test


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return lit_prune.load("micro-576")


def asked(vlm: VLM) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Two scenes with four questions each, and the right answers."""
    pairs = [(scene, question) for scene in map(make_scene, SCENES) for question in choose_questions(scene, 4)]
    inputs = vlm.encode([scene.image() for scene, _ in pairs], [question.text for _, question in pairs])
    return inputs, [question.answer for _, question in pairs]


def answers(vlm: VLM, inputs: dict[str, torch.Tensor]) -> list[str]:
    with torch.inference_mode():
        tokens = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return vlm.decode(tokens, inputs["input_ids"].shape[1])


def test_it_is_small_and_its_card_names_these_weights() -> None:
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"sha256.*`{digest}`", card)
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 16e6


def test_geometry_is_that_of_llava_1_5(vlm: VLM) -> None:
    config = vlm.model.config
    assert (config.image_seq_length, config.text_config.num_hidden_layers) == (576, 32)
    assert next(vlm.model.parameters()).dtype == torch.float32
    inputs, _ = asked(vlm)
    assert ((inputs["input_ids"] == config.image_token_id).sum(1) == 576).all()


def test_it_answers_and_pruning_that_keeps_all_changes_no_bit(vlm: VLM) -> None:
    """Right answers well above the 2 of 8 of a model that doesn't see; 64 tokens meet their budget."""
    inputs, right = asked(vlm)
    with torch.inference_mode():
        plain = vlm.model(**inputs).logits
    assert sum(matches(answers(vlm, inputs), right)) >= 5
    vlm.attach(PRUNERS / "fastv.yaml", keep=576)
    with torch.inference_mode():
        assert torch.equal(vlm.model(**inputs).logits, plain)
    record = Record()
    vlm.attach(PRUNERS / "rcp_published.yaml", keep=64)
    vlm.detach()
    vlm.attach(PRUNERS / "visionzip.yaml", keep=64)
    with vlm.using(Session(record=record)):
        assert all(answers(vlm, inputs))
    assert record.trace.average_visual().tolist() == [64] * len(right)
    vlm.detach()


RUNS = [
    pytest.param([], marks=pytest.mark.slow, id="topk"),
    pytest.param([PRUNERS / "rcp_published.yaml"], id="published"),
]


@pytest.mark.parametrize("overlay", RUNS)
def test_its_run_trains_and_leaves_a_plugin(tmp_path: Path, overlay: list[Path]) -> None:
    configs = [part for file in (ROOT / "configs" / "micro_576.yaml", *overlay) for part in ("-c", str(file))]
    few = {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1, "accelerator": "cpu"}
    options = [f"--trainer.{name}={value}" for name, value in {**few, "default_root_dir": tmp_path}.items()]
    data = [f"--data.{name}={value}" for name, value in {"batch_size": 2, "eval_batch_size": 2}.items()]
    main(["fit", *configs, *options, *data, f"--data.root={tmp_path / 'data'}"])
    assert (tmp_path / "plugin").is_dir()


def test_show_draws_its_world(tmp_path: Path) -> None:
    main(["show", "--model", "micro-576", "--pruner", "visionzip", "--keep", "64", "--out", str(tmp_path / "k.png")])
    assert (tmp_path / "k.png").stat().st_size > 10_000
