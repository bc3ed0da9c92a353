"""Methods before the decoder inside vLLM: what needs no vLLM here, its engine where there is one (jobs/vllm.sh)."""

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import qwen_vl
import torch
from PIL import Image
from tiny import ROOT

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.loading.locations import MICRO
from lit_prune.plugin.methods import plugin_of
from lit_prune.plugin.vllm.encoder import Encoder
from lit_prune.plugin.vllm.positions import outline, placed, with_indices, without_indices
from lit_prune.plugin.vllm.settings import MARK, prepare, settings_of
from lit_prune.vlm import VLM, load

METHODS = ["divprune", "visionzip", "scope"]
NAMES = METHODS


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("micro")


def configured(vlm: VLM, given: object):
    config = copy.deepcopy(vlm.model.config)
    config.lit_prune = given
    return config


def attached(vlm: VLM, pruner: str | dict, keep: int, positions: str = "original") -> VLM:
    plugin = plugin_of({"pruner": pruner}, "test") if isinstance(pruner, dict) else pruner
    return vlm.attach(plugin, keep=keep, positions=positions)


# -- what stays of an image, and where ------------------------------------------------------------------------------
@pytest.mark.parametrize("pruner", METHODS, ids=NAMES)
def test_an_image_keeps_what_it_keeps_in_transformers(vlm, pruner):
    pixels = torch.stack([torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    config = configured(vlm, {"pruner": pruner, "keep": 16})
    assert settings_of(config).positions == ("original" if isinstance(pruner, dict) else "renumbered"), "as shipped"
    encoder = Encoder(config, settings_of(config))
    loaded: set[str] = set()
    rest = list(encoder.load(vlm.model.state_dict().items(), loaded))
    assert loaded == set(encoder.names)
    assert all("language_model" in name or "lm_head" in name for name, _ in rest)
    found = encoder({"pixel_values": pixels})
    record = Record(keep_embeds=True)
    ids = torch.tensor([[1, *[vlm.model.config.image_token_id] * 144, 9]] * 3)
    with torch.inference_mode(), attached(vlm, pruner, 16).using(Session(record=record)):
        vlm.model(input_ids=ids, pixel_values=pixels)
    for image, (embeds, indices) in enumerate(found):
        kept = record.stages[0].kept[image].nonzero()[:, 0]
        assert indices.tolist() == kept.tolist()
        assert torch.equal(embeds, record.embeds[image, kept])
    vlm.detach()


def test_positions_of_a_pruned_prompt_are_those_of_the_whole_one():
    """Two images of 6 tokens, 2 and 1 of which stay, and a prompt that is read in chunks."""
    visual = torch.tensor([False, True, True, False, True, False, False])
    positions = outline(7, [(1, 2, 6), (4, 1, 6)])
    assert positions.tolist() == [[0, 1, 1, 7, 8, 14, 15]] * 3
    assert outline(4, [(0, 1, 6), (1, 2, 6)])[0].tolist() == [0, 6, 6, 12], "one image next to another"
    starts, indices = positions[0].clone(), [torch.tensor([[2], [4]]), torch.tensor([[4]])]
    assert placed(positions, visual, starts, 0, indices)[1].tolist() == [0, 3, 5, 7, 12, 14, 15]
    half = placed(positions, visual, starts, 0, [indices[0][:1]])
    half = placed(half, visual, starts, 2, [indices[0][1:], indices[1]])
    assert torch.equal(half, placed(positions, visual, starts, 0, indices))
    assert torch.equal(placed(half, visual, starts, 0, indices), half), "a prompt that is computed again"
    assert torch.equal(placed(half, visual, starts, 7, []), half)


def test_indices_survive_half_precision():
    embeds, indices = torch.randn(3, 8).bfloat16(), torch.tensor([[0, 5], [575, 128], [9999, 127]])
    carried = with_indices(embeds, indices)
    assert carried.dtype == torch.bfloat16
    back, found = without_indices(carried, 2)
    assert torch.equal(back, embeds)
    assert torch.equal(found, indices)


# -- settings -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pruner": "rcp", "keep": 16}, "prunes before decoder layers 1, 5, 9"),
        ({"pruner": "fastv", "keep": 16}, "use a method that acts before the decoder"),
        ({"pruner": "dcp", "keep": 16}, "DCPPrune reads the question"),
        ({"pruner": "cdpruner", "keep": 16}, "CDPruner reads the question"),
        ({"pruner": "divprune"}, "give keep"),
        ({"pruner": "divprune", "keep": {"2": 16}}, "decoder layer 0 only"),
        ({"pruner": "divprune", "keep": 16, "positions": "some"}, "positions"),
        ({"pruner": "divprune", "keep": "many"}, "lit_prune.keep"),
        ({"pruner": "divprune", "tokens": 16}, "unknown tokens"),
        ({"pruner": "divprun", "keep": 16}, "divprune"),
        ({"pruner": {"class_path": "nowhere.Method"}, "keep": 16}, "hf_overrides: lit_prune"),
        ({"keep": 16}, "give pruner"),
        ("divprune", "write"),
    ],
    ids=str,
)
def test_what_vllm_cannot_run_is_refused(vlm, given, says):
    config = configured(vlm, given)
    with pytest.raises(LitPruneError, match=says):
        Encoder(config, settings_of(config))


def test_a_plugin_folder_brings_its_budget_and_options(vlm, tmp_path):
    vlm.attach("divprune", keep=16, positions="original").save_pretrained(tmp_path / "a")
    vlm.attach("divprune", keep=16, proportional_attention="count").save_pretrained(tmp_path / "b")
    vlm.detach()
    found = settings_of(configured(vlm, {"pruner": str(tmp_path / "a")}))
    assert (found.planned(144), found.positions) == (16, "original")
    assert settings_of(configured(vlm, {"pruner": str(tmp_path / "a"), "positions": "renumbered"})).positions[0] == "r"
    with pytest.raises(LitPruneError, match="proportional attention"):
        settings_of(configured(vlm, {"pruner": str(tmp_path / "b")}))


def test_the_plain_model_needs_no_positions(vlm):
    assert settings_of(vlm.model.config) is None
    assert settings_of(configured(vlm, {"pruner": "full"})) is None


def test_rotary_embeddings_become_those_of_three_equal_rows(vlm):
    """The sections of M-RoPE add up to half a head; other kinds of embeddings are refused."""
    asked = {"pruner": "divprune", "keep": "11.1%", "positions": "original"}
    model_config = SimpleNamespace(hf_config=configured(vlm, asked), multimodal_config=SimpleNamespace())
    prepare(model_config)
    assert sum(model_config.hf_config.text_config.rope_parameters["mrope_section"]) == 16
    assert model_config.multimodal_config.video_pruning_rate == MARK
    model_config.hf_config.text_config.rope_parameters = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(LitPruneError, match="yarn"):
        prepare(model_config)


def test_the_entry_point_is_cheap():
    """It imports nothing: neither vLLM nor torch; vLLM loads it for every model."""
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "lit_prune"] or [None]
    assert found is None or found.value == "lit_prune.plugin.vllm:register"
    assert 'lit_prune = "lit_prune.plugin.vllm:register"' in (ROOT / "pyproject.toml").read_text()


# -- vLLM itself ----------------------------------------------------------------------------------------------------
engines = [
    pytest.mark.integrations,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
]
FULL = 144
LIMITS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[tuple[Image.Image, str]]:
    """84 questions about 12 micro pictures."""
    folder = tmp_path_factory.mktemp("sample") / "s"
    subprocess.run([sys.executable, "-m", "lit_prune", "sample", "--out", folder, "--count", "12"], check=True)
    records = json.loads((folder / "questions.json").read_text())
    return [
        (
            Image.open(folder / each["image"]).convert("RGB"),
            each["conversations"][0]["value"].removeprefix("<image>").strip(),
        )
        for each in records
    ]


@contextmanager
def engine(given: dict | None, model: str | Path, name: str, **options: object) -> Iterator[object]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    overrides = {"architectures": [name], **({} if given is None else {"lit_prune": given})}
    llm = LLM(str(model), hf_overrides=overrides, **{**LIMITS, **options})
    yield llm
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()


def generate(llm, vlm: VLM, questions: list[tuple[list[Image.Image], str]]) -> tuple[list[str], list[int]]:
    """Answers and lengths of prompts."""
    from vllm import SamplingParams

    prompts = []
    for images, question in questions:
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = vlm.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}})
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return [each.outputs[0].text.strip() for each in done], [len(each.prompt_token_ids) for each in done]


class TestEngine:
    """Answers of vLLM, one by one and batched by its scheduler, equal `vlm.answer` with original positions."""

    pytestmark = engines

    @pytest.mark.parametrize(
        ("pruner", "keep", "positions"),
        [
            (None, FULL, "original"),
            ("divprune", 16, "original"),
            ("divprune", 8, "original"),
            ("divprune", 16, "renumbered"),
            ("visionzip", 16, "original"),
            ("scope", 16, "original"),
        ],
        ids=["full", "divprune-16", "divprune-8", "divprune-renumbered", "visionzip-16", "scope-16"],
    )
    def test_answers_are_ours(self, vlm, questions, pruner, keep, positions):
        if pruner is None:
            vlm.detach()
        else:
            attached(vlm, pruner, keep, positions)
        images, texts = map(list, zip(*questions, strict=True))
        expected = vlm.answer(images, texts, 8)
        whole = vlm.encode(images, texts)["attention_mask"].sum(1)
        given = None if pruner is None else {"pruner": pruner, "keep": keep, "positions": positions}
        with engine(given, MICRO, "LitPruneLlava") as llm:
            answers, lengths = generate(llm, vlm, [([image], text) for image, text in questions])
        assert answers == expected
        assert lengths == (whole - FULL + keep).tolist()

    def test_prompts_in_chunks_and_of_several_images(self, vlm, questions):
        """A budget is that of each image here, and of a prompt in `attach`: equal images get equal shares of it."""
        pairs = [([questions[i][0], questions[i + 7][0]], questions[i][1]) for i in range(0, 42, 3)]
        prompts = [([image], text) for image, text in questions[:21]]
        expected = [
            attached(vlm, "divprune", 16 * len(images)) and self.several(vlm, images, text)
            for images, text in prompts + pairs
        ]
        limits = {"max_num_batched_tokens": 24, "enable_chunked_prefill": True, "limit_mm_per_prompt": {"image": 2}}
        with engine(
            {"pruner": "divprune", "keep": 16, "positions": "original"}, MICRO, "LitPruneLlava", **limits
        ) as llm:
            answers, _ = generate(llm, vlm, prompts + pairs)
            again, _ = generate(llm, vlm, prompts + pairs)
        assert answers == expected
        assert again == expected, "from the caches"

    @staticmethod
    @torch.inference_mode()
    def several(vlm: VLM, images: list[Image.Image], question: str) -> str:
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = vlm.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = vlm.processor(text=text, images=images, return_tensors="pt")
        tokens = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return vlm.decode(tokens, inputs["input_ids"].shape[1])[0]

    @pytest.mark.parametrize(("pruner", "keep"), [(None, "100%"), ("divprune", "50%"), ("scope", 6)], ids=str)
    def test_images_of_any_size(self, tmp_path_factory, pruner, keep):
        """Qwen2.5-VL with random weights: tokens have a row and a column, and images differ in their number."""
        folder = qwen_vl.write(tmp_path_factory.mktemp("qwen") / "model")
        model = load(folder)
        noise = np.random.default_rng(0)
        shapes = [(4, 4), (6, 3), (8, 8), (2, 7)]
        images = [Image.fromarray(noise.integers(0, 255, (28 * h, 28 * w, 3), np.uint8)) for h, w in shapes]
        texts = ["What colour is the circle", "Is there a red tile", "Where is the blue tile", "How many are red"]
        if pruner is not None:
            model.attach(pruner, keep=keep, positions="original")
        expected = model.answer(images, texts, 8)
        given = None if pruner is None else {"pruner": pruner, "keep": keep, "positions": "original"}
        with engine(given, folder, "LitPruneQwen2_5_VL") as llm:
            answers, lengths = generate(
                llm, model, [([image], text) for image, text in zip(images, texts, strict=True)]
            )
        assert answers == expected
        count = {"100%": lambda n: n, "50%": lambda n: n // 2}.get(keep, lambda n: keep)
        assert [n - len(text.split()) - 2 for n, text in zip(lengths, texts, strict=True)] == [
            count(h * w) for h, w in shapes
        ]
