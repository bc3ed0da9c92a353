"""Methods on a LLaVA of real parts: SmolLM2-135M and a DINOv2-shaped tower (jobs/mini_llava.sh)."""

import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lit_prune.cli import main
from lit_prune.host import Record, Session
from lit_prune.vlm import VLM, load

FOLDER = Path(os.environ.get("MINI_LLAVA", "runs/mini_llava")).resolve()
VISUAL, KEEP = 576, 64
METHODS = ["divprune", "cdpruner", "scope", "visionzip", "prumerge_plus", "dcp", "fastv", "sparsevlm", "rcp"]
pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="no model there: bash jobs/mini_llava.sh"),
]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load(FOLDER)


@pytest.fixture(scope="module")
def inputs(vlm) -> dict[str, torch.Tensor]:
    """A drawn picture and noise, with questions of different lengths."""
    drawn = Image.new("RGB", (336, 336), "white")
    ImageDraw.Draw(drawn).ellipse((40, 60, 200, 220), fill="red")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), np.uint8))
    return vlm.encode([drawn, noise], ["What is it?", "Which colour is the circle on the left?"])


@torch.inference_mode()
def logits(vlm: VLM, inputs: dict[str, torch.Tensor], record: Record | None = None) -> torch.Tensor:
    with vlm.using(Session(record=record)) if record else nullcontext():
        return vlm.model(**inputs, logits_to_keep=1).logits[:, -1]


def test_the_decoder_speaks(vlm):
    """Without an image: its weights and its tokenizer are those of SmolLM2-135M-Instruct."""
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = vlm.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = {name: torch.as_tensor(value).view(1, -1) for name, value in ids.items() if "pixel" not in name}
    said = vlm.model.generate(**ids, max_new_tokens=8, do_sample=False)[:, ids["input_ids"].shape[1] :]
    assert "Paris" in vlm.processor.batch_decode(said)[0]


@pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")
def test_the_tower_is_the_exported_one(vlm):
    """Equal features of a picture of 224 pixels, which the export has a graph for."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    from jobs.mini_llava.assemble import TOWER

    place = FOLDER.parent / "packages" / TOWER[1]
    if not place.is_file():
        pytest.skip(f"the package is not in {place.parents[2]}")
    graph = onnx.load(str(place))
    last = next(node.output[0] for node in graph.graph.node if node.name == "/backbone/layernorm/Add_1")
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(graph).run([last], {"input_image": pixels})
    with torch.inference_mode():
        found = vlm.model.model.vision_tower(torch.from_numpy(pixels)).last_hidden_state
    assert np.abs(found.numpy() - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["visionzip", "dcp", "fastv"])
def test_keeping_all_is_the_plain_model(vlm, inputs, method):
    plain = logits(vlm.detach(), inputs)
    found = logits(vlm.attach(method, keep=VISUAL), inputs)
    vlm.detach()
    assert torch.equal(found, plain)


@pytest.mark.parametrize("method", METHODS)
def test_methods_meet_their_budget(vlm, inputs, method):
    """In a batch of two; the decoder's layers see fewer tokens, and the logits change."""
    plain, record = logits(vlm.detach(), inputs), Record()
    found = logits(vlm.attach(method, keep=KEEP), inputs, record)
    vlm.detach()
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    assert record.trace.average_visual().tolist() == pytest.approx([KEEP] * 2, rel=0.02)


def test_it_is_priced(vlm, capsys):
    main(["cost", "--model", str(FOLDER), "--visual-tokens", "576", "--pruner", "fastv", "--keep", str(KEEP)])
    assert "576" in capsys.readouterr().out
