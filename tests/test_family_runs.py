"""Whole runs on every family: fit, validate, test, predict, compare and bench, with the family's own processor.

Models are the tiny ones of `families.py`, cut to what the processors of `data/prompt_families.py` make of small images;
only loading is replaced, since there is nothing to load.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from families import FAMILIES
from PIL import Image
from prompt_families import PROCESSORS
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lit_prune import loading
from lit_prune.callbacks import PrintResults, RunSummary, SamplePictures
from lit_prune.commands import compare
from lit_prune.commands.generate import run_pruned
from lit_prune.cost.sizes import known_size, vision_trace
from lit_prune.data import InstructData
from lit_prune.evaluation import measuring
from lit_prune.evaluation.cells import FULL, Cell
from lit_prune.evaluation.comparison import Comparison
from lit_prune.evaluation.report.page import make
from lit_prune.evaluation.report.runs import read_run
from lit_prune.evaluation.timing import Benchmark, Method
from lit_prune.evaluation.timing.clocks import wall_clock
from lit_prune.evaluation.timing.prompts import random_prompt
from lit_prune.host import Session, structure
from lit_prune.host.parts import nominal_tokens
from lit_prune.ops.budget import asked, parse_budget
from lit_prune.plugin import Plugin
from lit_prune.pruners.oracle import Oracle
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.uniform import Uniform
from lit_prune.repair import RepairAdapter
from lit_prune.training import module as training
from lit_prune.training.module import PruneModule
from lit_prune.vlm import VLM

KEEP = "60%"
SIZES = [(32, 32), (48, 16), (16, 40), (24, 24)]
EVERY = pytest.mark.parametrize("family", PROCESSORS, indirect=True)
TOLERANCE = 1e-6


def fitted(name: str) -> tuple[Any, Any]:
    """A tiny model and the processor that it fits."""
    family, processor = FAMILIES[name], PROCESSORS[name]()
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "pad_token_id": tokenizer.pad_token_id}
    config = family.config(**{**family.options, **text})
    config.image_token_id = processor.image_token_id
    if isinstance(video := getattr(processor, "video_token_id", None), int):
        config.video_token_id = video
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    if name in ("llava-1.5", "internvl"):
        config.vision_config.image_size, config.image_seq_length = {"llava-1.5": (8, 4), "internvl": ([16, 16], 4)}[
            name
        ]
    config._attn_implementation = "sdpa"
    model = family.model(config).eval().requires_grad_(False)
    model.generation_config.update(eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    return model, processor


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records: images of several sizes, one without; some with a skill, some with boxes."""
    folder, draw, records = tmp_path_factory.mktemp("questions"), np.random.default_rng(0), []
    for i, (width, height) in enumerate(SIZES * 2):
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images = [] if i == 6 else [f"{i}.png"]
        text = "<image>\n" * len(images) + "What is " + "it " * (1 + i % 3) + "?"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a b"}]
        named = {"skill": ("colour", "all", 3)[i % 3]} if i % 4 else {}
        boxes = {"boxes": [[width // 4, height // 4, 3 * width // 4, 3 * height // 4]]} if i % 2 else {}
        records.append({"id": i, "image": images, "conversations": turns, **named, **boxes})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLM:
    """A family's model with its processor, which is what `load` gives, whatever it is asked for."""
    model, processor = fitted(request.param)
    monkeypatch.setattr(training, "load", lambda *args, **options: VLM(model, processor, "tiny"))
    monkeypatch.setattr(loading, "load_processor", lambda *args, **options: processor)
    return VLM(model, processor, "tiny")


def module(keep: Any = KEEP, **options: Any) -> PruneModule:
    rcp = RCP([2, 4], [2.0, 1.0], select="topk", inner=16)
    return PruneModule(
        "tiny", rcp, RepairAdapter([6], [1], bottleneck=16, condition=8, code=4), keep, max_new_tokens=2, **options
    )


def data_of(path: Path) -> InstructData:
    splits = dict.fromkeys(("train", "val", "test", "predict"), str(path))
    return InstructData("tiny", **splits, batch_size=4, eval_batch_size=3)


def visual_tokens(vlm: VLM, path: Path) -> list[int]:
    """Of every question."""
    data = data_of(path)
    data.setup("test")
    batches = [batch["prompts"]["input_ids"] for batch in data.test_dataloader()]
    return [int(n) for ids in batches for n in (ids == vlm.model.config.image_token_id).sum(1)]


# -- the runs -------------------------------------------------------------------------------------------------------
@EVERY
def test_fit_validate_test_and_predict(family, questions, tmp_path):
    """A fit of three steps with a validation; what was kept is what the budget asks of each sample."""
    trained, data = module(), data_of(questions)
    before = [p.detach().clone() for p in trained.plugin.parameters()]
    run = tiny.trainer(tmp_path, max_steps=3, limit_val_batches=2, val_check_interval=2)
    run.fit(trained, data)
    assert run.global_step == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.plugin.parameters(), strict=True))
    assert all(math.isfinite(value) for value in run.callback_metrics.values())
    assert run.callback_metrics["flops/sample"] > 0
    for verb, stage in (("validate", "val"), ("test", "test")):
        shown = [SamplePictures(folder=str(tmp_path / "samples")), PrintResults(), RunSummary()]
        run = tiny.trainer(tmp_path, shown, limit_val_batches=1.0)
        found = getattr(run, verb)(trained, data, verbose=False)[0]
        assert {f"{stage}/accuracy/all", f"{stage}/accuracy/colour", f"{stage}/accuracy/3"} <= found.keys()
        assert found[f"{stage}/flops"] > 0
        wanted = [asked(parse_budget(KEEP), n, tiny.DEPTH) for n in visual_tokens(family, questions)]
        assert found[f"{stage}/visual_tokens"] == pytest.approx(np.mean(wanted), abs=0.5)
    answers = [answer for batch in run.predict(trained, data) for answer in batch]
    assert [answer["id"] for answer in answers] == [str(i) for i in range(8)]


@EVERY
def test_steps_measure_what_runs_by_itself(family, questions):
    """Teacher and student, with the images encoded once for both; skills as the records have them."""
    tried, data = module().eval(), data_of(questions)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        found, again = tried.validation_step(batch, 0), tried.test_step(batch, 0)
        plain = measuring.measure(tried.vlm, batch, measuring.TEACHER, 2)
        pruned = measuring.measure(tried.vlm, batch, Session(hints=batch.get("hints", {})), 2)
    assert again["student"].texts == found["student"].texts == pruned.texts
    assert found["teacher"].texts == plain.texts
    for one, other in ((found["teacher"], plain), (found["student"], pruned)):
        for layer, states in one.hidden.items():
            torch.testing.assert_close(states, other.hidden[layer], rtol=0, atol=TOLERANCE)
        assert torch.equal(one.flops, other.flops) or one.parts["decoder"].equal(other.parts["decoder"])
    predicted = tried.predict_step(batch, 0)
    assert [answer["answer"] for answer in predicted] == found["student"].texts
    assert batch["skills"] == [None, "all", "3"]


@EVERY
def test_compare(family, questions, tmp_path, monkeypatch):
    """Through the command, with shares for budgets."""
    monkeypatch.chdir(tiny.ROOT)
    files = {"mine": {"base": "tiny", "keep": KEEP, "max_new_tokens": 2}, "even": {}, "seen": {}}
    for name, settings in files.items():
        kind = "fastv.FastV" if name == "seen" else "uniform.Uniform"
        settings["pruner"] = {"class_path": f"lit_prune.pruners.{kind}", "init_args": {"layers": [2]}}
        splits = {"val": str(questions), "test": str(questions), "eval_batch_size": 3}
        data = {"class_path": "lit_prune.data.InstructData", "init_args": splits}
        whole = {"model": settings, **({"data": data, "trainer": {"logger": False}} if name == "mine" else {})}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    overlay, methods = tmp_path / "mine.yaml", [f"{name}={tmp_path / name}.yaml" for name in ("even", "seen")]
    compare.run([str(overlay)], [FULL, *methods], [KEEP, "80%"], out=tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["status"] for row in rows] == ["measured"] * 5
    assert {row["questions"] for row in rows} == {8}
    assert rows[0]["flops"] > rows[1]["flops"] > 0
    assert rows[0]["kl"] == 0
    assert all(row["kl"] > 0 for row in rows[1:])
    assert "8 questions" in make([read_run(tmp_path / "out")], "Report")
    assert (tmp_path / "out" / "accuracy_tokens.png").is_file()
    wanted = np.mean([asked(parse_budget(KEEP), n, tiny.DEPTH) for n in visual_tokens(family, questions)])
    assert rows[1]["avg_visual_tokens"] == pytest.approx(wanted, abs=0.5)


@EVERY
def test_bench(family):
    """Noise for images; features given apart are those that the pixels give."""
    rcp = Plugin(RCP([2, 4], [2.0, 1.0], select="topk", inner=16), None).eval()
    made = Benchmark(family, [Method("full"), Method("RCP", rcp, KEEP)], [1, 2], 8, 3, wall_clock, (32, 48))
    assert made.run(repeats=1, warmup=0)
    full, pruned, *_ = made.rows()
    assert full["avg_visual_tokens"] == made.visual
    assert pruned["avg_visual_tokens"] == pytest.approx(0.6 * made.visual, abs=0.6)
    assert pruned["flops_ratio"] > 1
    assert full["kv_bytes"] > pruned["kv_bytes"]
    prompt = random_prompt(family, 2, 8, (32, 48))
    assert "pixel_values" not in prompt.features
    with torch.no_grad():
        logits = [family.model(**inputs).logits for inputs in (prompt.pixels, prompt.features)]
    torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE)


@EVERY
def test_answers_are_priced(family, questions):
    family.attach(Uniform([2]), keep=KEEP)
    try:
        images = [Image.open(questions.parent / f"{i}.png").convert("RGB") for i in (0, 1)]
        ran = run_pruned(family, family.encode(images, ["What is it?", "And that?"]), 2)
    finally:
        family.detach()
    assert all(flops > 0 for flops in ran.flops)


# -- hints ----------------------------------------------------------------------------------------------------------
@EVERY
def test_hints_come_with_the_batch_where_the_grid_is_known(family, questions, request):
    data = data_of(questions)
    data.setup("test")
    batches = list(data.test_dataloader())
    known = [batch["hints"]["regions"] for batch in batches if "hints" in batch]
    if (
        request.node.callspec.params["family"] != "llava-1.5"
    ):  # the others cut images up, or take them in their own size
        assert known == []
        return
    assert len(known) == len(batches)
    for batch, regions in zip(batches, known, strict=True):
        ids = batch["inputs"]["input_ids"]
        assert regions.shape == (len(ids), 1, int((ids == family.model.config.image_token_id).sum(1).max()))
        assert [bool(row.any()) for row in regions] == [bool(boxes) for boxes in batch["boxes"]]
    comparison = Comparison(family, Cell(FULL), [Cell("oracle", KEEP, None, Plugin(Oracle([2])).eval())], 2)
    for batch in batches[:2]:
        comparison.update(batch)
    assert [tally.cell.failed for tally in comparison.tallies] == [False, False]


@pytest.mark.parametrize("family", ["qwen2.5-vl"], indirect=True)
def test_an_oracle_without_hints_fails_alone_and_says_why(family, questions):
    data = data_of(questions)
    data.setup("test")
    cells = [
        Cell("oracle", KEEP, None, Plugin(Oracle([2])).eval()),
        Cell("even", KEEP, None, Plugin(Uniform([2])).eval()),
    ]
    comparison = Comparison(family, Cell(FULL), cells, 2)
    comparison.update(next(iter(data.test_dataloader())))
    assert "from data with `boxes`" in cells[0].reason
    assert not cells[1].failed


# -- towers and decoders without a price ----------------------------------------------------------------------------
@pytest.fixture
def unknown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLM:
    """A model whose tower, or decoder, has no known price: of types of their own, the layers' attention unknown."""
    model, processor = fitted("qwen2.5-vl")
    if request.param == "tower":
        model.config.vision_config.model_type = "seashell"
    else:
        monkeypatch.setattr(model.config.get_text_config(), "model_type", "seashell")
        monkeypatch.setattr(structure, "OUTPUT", re.compile("nothing"))  # by which attention is recognised
    monkeypatch.setattr(training, "load", lambda *args, **options: VLM(model, processor, "tiny"))
    monkeypatch.setattr(loading, "load_processor", lambda *args, **options: processor)
    return VLM(model, processor, "tiny")


@pytest.mark.parametrize("unknown", ["tower", "decoder"], indirect=True)
def test_a_price_stops_nothing(unknown, questions, tmp_path, request):
    """Known figures are logged, unknown ones are left out."""
    tower = request.node.callspec.params["unknown"] == "tower"
    trained, data = module(), data_of(questions)
    run = tiny.trainer(tmp_path, max_steps=1, limit_val_batches=1, val_check_interval=1)
    run.fit(trained, data)
    assert ("flops/sample" in run.callback_metrics) == tower
    assert run.callback_metrics["val/visual_tokens"] > 0
    assert ("val/flops" in run.callback_metrics) == ("val/kv_bytes" in run.callback_metrics) == tower
    assert math.isnan(trained.work.totals[-1].item()) != tower
    run = tiny.trainer(tmp_path)
    assert ("test/flops" in run.test(trained, data, verbose=False)[0]) == tower
    trained.vlm.detach()
    cells = [Cell("even", KEEP, None, Plugin(Uniform([2])).eval())]
    comparison = Comparison(unknown, Cell(FULL), cells, 2)
    data.setup("test")
    comparison.update(next(iter(data.test_dataloader())))
    (_, full), (_, even) = comparison.results()
    assert ("vision" in full["flops_parts"]) == tower, "counted while it runs"
    assert (full["flops"] is not None) == (even["kv_bytes"] is not None) == tower
    unknown.attach(Uniform([2]), keep=KEEP)
    image = Image.open(questions.parent / "0.png").convert("RGB")
    ran = run_pruned(unknown, unknown.encode([image], ["What is it?"]), 2)
    unknown.detach()
    assert (ran.flops[0] is not None) == tower


def test_no_configuration_of_transformers_stops_a_figure():
    """Every image-text-to-text model's default one: a price, or none, and a nominal number of tokens."""
    kinds = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert len(kinds) > 50
    for kind in kinds:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # some have no default
            continue
        size = known_size(config)
        assert size is None or size.width > 0, kind
        assert nominal_tokens(config) > 0, kind
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "image_sizes": torch.tensor([[32, 32]])}
        assert known_trace(config, grid) is None or size is not None, kind


def known_trace(config: Any, inputs: dict[str, Tensor]) -> Any:
    return vision_trace(config, inputs, torch.tensor([4]))
