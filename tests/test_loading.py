"""Every way to come by a model: shipped shapes, random weights, objects, folders, and what is said without one."""

import json
import logging
import shutil
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import psutil
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig, PreTrainedConfig

import lit_prune
from lit_prune import loading
from lit_prune.cost.shapes import FOLDER, names
from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.loading import locations, shipped_config
from lit_prune.micro.model import build, build_config, build_processor
from lit_prune.plugin import fingerprint
from lit_prune.pruners.random import Random
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM

# Parameters of the published checkpoints, in billions.
PUBLISHED = {
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2.25,
    "OpenGVLab/InternVL3-8B-hf": 7.94,
    "OpenGVLab/InternVL3_5-8B-HF": 8.53,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3.5-9B": 9.41,  # and 0.24 for multi-token prediction, which the class leaves out
    "allenai/Molmo2-8B": 8.66,
    "google/gemma-3-4b-it": 4.30,
    "llava-hf/llava-1.5-13b-hf": 13.35,
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7.57,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7.06,
    "zai-org/GLM-4.6V-Flash": 10.29,
}
SHAPES = pytest.mark.parametrize("name", names())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- shipped shapes -------------------------------------------------------------------------------------------------
@SHAPES
def test_a_shipped_shape_has_the_size_of_its_checkpoint(name):
    config = shipped_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert type(model).__name__ == config.architectures[0]
    assert round(count(model) / 1e9, 2) == PUBLISHED[name]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "google/gemma-3-4b-it")


@SHAPES
def test_a_shipped_shape_says_what_it_means(name):
    """Whatever the file says is what the library reads; nothing is renamed or dropped on the way."""
    written, read = json.loads((FOLDER / f"{name}.json").read_text()), shipped_config(name).to_dict()

    def compare(part: dict, found: dict, where: str = "") -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                compare(value, found[key], f"{where}{key}.")
            else:
                given = list(found[key]) if isinstance(found[key], tuple) else found[key]
                assert given == value, f"{where}{key}"

    compare(written, read)


def test_every_family_is_shipped_once():
    assert set(names()) == set(PUBLISHED)
    assert len({shipped_config(name).model_type for name in names()}) == 11


def test_two_calls_share_no_configuration():
    shipped_config(names()[0]).text_config.num_hidden_layers = 1
    assert shipped_config(names()[0]).text_config.num_hidden_layers != 1


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(LitPruneError, match=r"someone/else is not shipped; shipped are: .*llava-hf/llava-1\.5-7b-hf"):
        shipped_config("someone/else")


# -- random weights -------------------------------------------------------------------------------------------------
def shrunk(name: str) -> PreTrainedConfig:
    """A shipped shape with its family's structure and a fraction of its width and depth."""
    config = shipped_config(name)
    text, vision = config.text_config, config.vision_config
    text.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4})
    text.update({"num_key_value_heads": 2, "head_dim": 16})
    vision.update({"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2})
    vision.num_hidden_layers = 2
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = 64
        pairs = int(8 * text.rope_parameters.get("partial_rotary_factor", 1))
        text.rope_parameters["mrope_section"] = [pairs - 2 * (3 * pairs // 8)] + [3 * pairs // 8] * 2
    if hasattr(config, "adapter_config"):
        config.adapter_config.update({"hidden_size": 32, "intermediate_size": 48, "text_hidden_size": 64})
        config.adapter_config.vision_feature_layer = [1, 0]
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [1]
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    return config


@SHAPES
def test_random_weights_of_every_family(name):
    """Finite logits; drawn by the seed alone, and no other generator is moved."""
    state = torch.random.get_rng_state()
    model, again, other = (loading.random_model(shrunk(name), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in weights.items())
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(2, 12)[None]).logits
    assert bool(logits.isfinite().all())
    assert logits.std() > 0


@SHAPES
def test_real_shapes_without_memory(name):
    """On `meta` the real shape is there at once, in the dtype that its weights would have, and takes a pruner."""
    vlm = lit_prune.load(name, random_weights=True, device="meta")
    assert vlm.model.dtype == torch.bfloat16
    assert vlm.name == name
    depth = vlm.model.config.get_text_config().num_hidden_layers
    vlm.attach(RCP([8, 14, 24], depth=32), keep=find(vlm.model).dims.visual // 2)
    assert next(vlm.plugin.parameters()).is_meta
    assert vlm.plugin.dims.depth == depth
    vlm.detach()


def test_small_random_weights_are_float32_unless_told():
    config = shrunk("llava-hf/llava-1.5-7b-hf")
    assert lit_prune.load(config, random_weights=True).model.dtype == torch.float32
    assert lit_prune.load(config, torch.bfloat16, random_weights=True).model.dtype == torch.bfloat16
    assert config.text_config.dtype is None  # the caller's stays as it was


def test_random_weights_of_a_folder(tmp_path):
    """A folder with nothing but config.json will do; one with a processor brings it."""
    shrunk("llava-hf/llava-1.5-7b-hf").save_pretrained(tmp_path)
    vlm = lit_prune.load(tmp_path, random_weights=True, attn_implementation="eager")
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert vlm.model.config._attn_implementation == "eager"
    assert vlm.name == str(tmp_path)
    assert vlm.processor is None
    build_processor().save_pretrained(tmp_path)
    assert lit_prune.load(tmp_path, random_weights=True).processor is not None


def test_random_micro_brings_its_processor():
    vlm = lit_prune.load("micro", random_weights=True)
    assert len(vlm.answer([picture()], ["what colour ?"], max_new_tokens=2)) == 1


def test_text_needs_a_processor():
    vlm = lit_prune.load(shrunk("llava-hf/llava-1.5-7b-hf"), random_weights=True)
    with pytest.raises(LitPruneError, match="random weights come without a tokenizer"):
        vlm.answer([picture()], ["what colour ?"])
    with pytest.raises(LitPruneError, match="llava has no processor"):
        vlm.decode(torch.ones(1, 4, dtype=torch.long), 2)


def test_random_weights_take_one_device():
    with pytest.raises(LitPruneError, match="give device=, not device_map"):
        lit_prune.load("llava-hf/llava-1.5-7b-hf", random_weights=True, device_map="auto")


def test_random_weights_of_an_unknown_shape():
    with pytest.raises(LitPruneError, match="someone/else is no folder and not in the hub's cache"):
        lit_prune.load("someone/else", random_weights=True)


def test_a_configuration_has_no_weights():
    with pytest.raises(LitPruneError, match="random_weights=True"):
        lit_prune.load(shipped_config("llava-hf/llava-1.5-7b-hf"))


def test_random_weights_of_a_language_model():
    with pytest.raises(LitPruneError, match="can't be built"):
        lit_prune.load(LlamaConfig(), random_weights=True)


@pytest.mark.slow
def test_seven_billion_random_weights():
    """The real 7B in 14 GB of bfloat16: made in minutes, finite."""
    if psutil.virtual_memory().available < 18e9:
        pytest.skip("needs 18 GB of free memory")
    vlm = lit_prune.load("llava-hf/llava-1.5-7b-hf", random_weights=True)
    with torch.inference_mode():
        logits = vlm.model(input_ids=torch.arange(2, 6)[None]).logits
    assert bool(logits.isfinite().all())
    assert 0.1 < logits.float().std() < 10


# -- models that are there ------------------------------------------------------------------------------------------
def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def works(vlm: VLM, tmp_path: Path) -> list[str]:
    """Attach, generate, save, detach, load, generate: the plain answers, for a look at the model beneath."""
    ask = partial(vlm.answer, [picture(0), picture(1)], ["what colour ?", "how many ?"], max_new_tokens=4)
    plain, hooks = ask(), count_hooks(vlm.model)
    vlm.attach(
        RCP([1, 5], inner=16, select="topk", stage_ratios=[2.0, 1.0]), RepairAdapter([11], [1], bottleneck=8), keep=24
    )
    tiny.shake(vlm.plugin, 0.05)
    pruned, weights = ask(), {name: p.clone() for name, p in vlm.plugin.named_parameters()}
    vlm.save_pretrained(tmp_path / "plugin")
    vlm.detach()
    assert count_hooks(vlm.model) == hooks
    assert ask() == plain
    vlm.attach(tmp_path / "plugin")
    assert all(torch.equal(p, weights[name]) for name, p in vlm.plugin.named_parameters())
    assert ask() == pruned
    record = Record()
    with vlm.using(Session(record=record)), torch.inference_mode():
        vlm.model(**vlm.encode([picture(0)], ["what colour ?"]))
    assert record.trace.average_visual().tolist() == [24]
    vlm.detach()
    return plain


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def plain(micro_folder) -> list[str]:
    """Answers of the model in `micro_folder` as it is."""
    return lit_prune.load(micro_folder).answer([picture(0), picture(1)], ["what colour ?", "how many ?"], 4)


def test_a_model_object(micro_folder, plain, tmp_path):
    """Used as it is, not copied; its processor comes from where it came from."""
    model = AutoModelForImageTextToText.from_pretrained(micro_folder)
    vlm = lit_prune.load(model)
    assert vlm.model is model
    assert works(vlm, tmp_path) == plain


def test_a_model_object_with_a_processor(tmp_path):
    model, processor = build()
    assert lit_prune.load(model).processor is None
    assert lit_prune.load(model, processor=processor).processor is processor
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    works(lit_prune.load(model, processor=tmp_path), tmp_path)


def test_a_model_object_is_taken_as_it_is(tiny_model):
    with pytest.raises(LitPruneError, match="taken as it is"):
        lit_prune.load(tiny_model, torch.bfloat16)


def test_bfloat16(micro_folder, tmp_path):
    vlm = lit_prune.load(micro_folder, torch.bfloat16, device="cpu")
    assert vlm.model.dtype == torch.bfloat16
    works(vlm, tmp_path)


def spread(first: str, second: str) -> dict[str, str]:
    """A device map with the decoder's layers in two places by turns."""
    parts = ["vision_tower", "multi_modal_projector", *(f"language_model.{n}" for n in ("embed_tokens", "norm"))]
    places = {f"model.{part}": first for part in [*parts, "language_model.rotary_emb"]} | {"lm_head": first}
    return places | {f"model.language_model.layers.{i}": (first, second)[i % 2] for i in range(16)}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, spread("cpu", "disk")], ids=lambda m: str(m)[:9])
def test_device_map(micro_folder, plain, tmp_path, device_map):
    pytest.importorskip("accelerate")
    vlm = lit_prune.load(micro_folder, device_map=device_map, offload_folder=tmp_path / "weights")
    offloaded = [p for p in vlm.model.parameters() if p.is_meta]
    assert bool(offloaded) == ("disk" in str(device_map))
    assert works(vlm, tmp_path) == plain


def test_a_device_and_a_map_are_too_much(micro_folder):
    with pytest.raises(LitPruneError, match="either device or device_map"):
        lit_prune.load(micro_folder, device="cpu", device_map="cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(micro_folder, tmp_path, bits):
    """bitsandbytes on the CPU; a plug-in of quantized weights has no fingerprint, so it is not refused elsewhere."""
    kinds = pytest.importorskip("bitsandbytes").nn
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each call
    vlm = lit_prune.load(micro_folder, quantization_config=config, device="cpu")
    projection = vlm.model.get_decoder().layers[0].self_attn.q_proj
    assert isinstance(projection, kinds.Linear4bit if bits == 4 else kinds.Linear8bitLt)
    works(vlm, tmp_path)
    assert fingerprint(vlm.model) == []


# -- weights that are not the model's -------------------------------------------------------------------------------
@pytest.fixture
def changed(micro_folder, tmp_path):
    """Makes a copy of the folder whose weights a function has changed."""

    def make(change, **saving) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(micro_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


TOWER = "encoder.layers.0.mlp.fc1.weight"


def named(tensors: dict, end: str = TOWER) -> str:
    """The one weight whose name ends so; files name modules otherwise than the library does."""
    (name,) = (name for name in tensors if name.endswith(end))
    return name


def rename(tensors: dict) -> None:
    """As a version of the library does that names modules otherwise."""
    for name in [name for name in tensors if "vision_tower" in name]:
        tensors[name.replace("vision_tower", "vision_tower.vision_model_of_old")] = tensors.pop(name)


WRONG = {
    "missing": (lambda t: t.pop(named(t)), rf"lacks 1 \(\S*{TOWER}\)"),
    "left over": (lambda t: t.update(extra=torch.ones(2)), r"holds besides 1 \(extra\)"),
    "another size": (lambda t: t.update({named(t): torch.ones(3, 3)}), rf"holds in other sizes 1 \(\S*{TOWER}\)"),
    "renamed": (
        rename,
        r"lacks \d+ \(model\.vision_tower[^)]*, \.\.\.\); holds besides \d+ \(.*_of_old[^)]*, \.\.\.\)",
    ),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t) if "vision_tower" in name],
        r"lacks \d+ \(model\.vision_tower\.",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_weights_of_another_model_are_refused(changed, capfd, change, said):
    """Nothing is initialised at random: one line names the first of them, the folder and the library's version."""
    folder = changed(change)
    capfd.readouterr()
    with pytest.raises(LitPruneError, match=said) as error:
        lit_prune.load(folder)
    text = str(error.value)
    assert text.startswith(
        f"the weights of {folder} are not those of its model in transformers {transformers.__version__}"
    )
    assert "5.19 to 5.24" in text
    assert "\n" not in text
    assert len(text) < 800
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["missing", "left over"])
def test_weights_of_another_model_may_be_meant(changed, name):
    """A new head, for one."""
    folder = changed(WRONG[name][0])
    vlm = lit_prune.load(folder, strict=False)
    assert len(vlm.answer([picture()], ["what colour ?"], max_new_tokens=2)) == 1


def test_other_sizes_may_be_meant(changed):
    assert lit_prune.load(changed(WRONG["another size"][0]), ignore_mismatched_sizes=True).processor is not None


def test_other_sizes_are_refused_without_strictness_too(changed):
    """The library refuses them by itself."""
    with pytest.raises(LitPruneError, match="can't be loaded"):
        lit_prune.load(changed(WRONG["another size"][0]), strict=False)


def test_tied_sharded_and_offloaded_weights_are_complete(micro_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(micro_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    for folder in ("sharded", "tied"):
        loading.load_model(tmp_path / folder)
        loading.load_model(tmp_path / folder, torch.bfloat16)
    if find_spec("accelerate") is not None:
        loading.load_model(tmp_path / "tied", device_map="auto", offload_folder=tmp_path / "weights")


def test_a_missing_shard(micro_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(micro_folder)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(LitPruneError, match="can't be loaded"):
        lit_prune.load(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_that_were_saved_are_complete(micro_folder, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = loading.load_model(micro_folder, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path)
    loading.load_model(tmp_path, device_map={"": "cpu"})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(named(tensors, "encoder.layers.0.layer_norm1.weight"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LitPruneError, match="lacks"):
        loading.load_model(tmp_path, device_map={"": "cpu"})


# -- adapters of peft -----------------------------------------------------------------------------------------------
@pytest.fixture
def adapted(micro_folder):
    """A model in a `PeftModel` whose adapter is not at its start."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(micro_folder)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data *= 3.0  # the untrained model's answers are hard to move
    return model


def test_a_peft_model(adapted, micro_folder, plain, tmp_path):
    """Wrapped, switched off, saved, and loaded through the adapter's folder."""
    vlm = lit_prune.load(adapted)
    assert find(adapted).decoder is adapted.get_base_model().get_decoder()
    answers = works(vlm, tmp_path)
    assert answers != plain
    with adapted.disable_adapter():
        assert vlm.answer([picture(0), picture(1)], ["what colour ?", "how many ?"], 4) == plain
    adapted.save_pretrained(tmp_path / "adapter")
    again = lit_prune.load(tmp_path / "adapter")
    assert again.name == str(tmp_path / "adapter")
    assert works(again, tmp_path / "again") == answers


def test_forward_of_a_peft_model_is_pruned(adapted):
    vlm = lit_prune.load(adapted).attach(Random([1]), keep=24)
    inputs, record = vlm.encode([picture()], ["what colour ?"]), Record()
    with vlm.using(Session(record=record)), torch.no_grad():
        adapted(**inputs)
    assert record.trace.average_visual().tolist() == [24]


def test_a_plugin_of_the_plain_base_is_refused(adapted, micro_folder, tmp_path):
    lit_prune.load(micro_folder).attach(RCP([1], [1.0], inner=16), keep=24).save_pretrained(tmp_path)
    with pytest.raises(LitPruneError, match="trained for the weights of"):
        lit_prune.load(adapted).attach(tmp_path)


def test_an_adapter_of_a_base_that_lacks_weights(adapted, changed, tmp_path):
    """The library says of an adapter alone whether it is complete."""
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(changed(rename))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LitPruneError, match=rf"the weights of {tmp_path / 'changed'} are not"):
        lit_prune.load(tmp_path / "adapter")
    assert lit_prune.load(tmp_path / "adapter", strict=False).model is not None


@pytest.mark.parametrize("change", ["missing", "left over", "another size"])
def test_an_adapter_with_other_weights(adapted, tmp_path, change):
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    if change == "missing":
        tensors.pop(name)
    else:
        tensors[name if change == "another size" else name.replace("layers.0", "layers.77")] = torch.ones(5, 5)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LitPruneError, match=rf"the weights of {tmp_path} are not those of its model"):
        lit_prune.load(tmp_path)


def test_an_adapter_without_a_base(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(LitPruneError, match="adapter"):
        lit_prune.load(tmp_path)


# -- no model there -------------------------------------------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub: connections are refused at once, and the cache is empty."""
    monkeypatch.setattr(locations.constants, "HF_HUB_OFFLINE", False)  # so that the hub is asked
    monkeypatch.setattr(locations.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(locations.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_no_weights_and_no_network(offline):
    """The error names the commands that help, and comes at once."""
    start = time.monotonic()
    with pytest.raises(LitPruneError) as error:
        lit_prune.load("llava-hf/llava-1.5-7b-hf")
    assert time.monotonic() - start < 30, "the library's own retries take most of a minute"
    for words in ("the hub can't be reached", "hf download llava-hf/llava-1.5-7b-hf", "random_weights=True"):
        assert words in str(error.value)
    with pytest.raises(LitPruneError) as error:
        lit_prune.load("someone/else")
    assert "random_weights" not in str(error.value)


def test_a_hub_that_answers(offline, monkeypatch):
    """Any answer will do, and the user's word that the machine is offline is taken."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which answers 501 to everything
        monkeypatch.setattr(BaseHTTPRequestHandler, "log_message", lambda *_: None)
        Thread(target=server.serve_forever, daemon=True).start()
        assert not locations.hub_answers()
        monkeypatch.setattr(locations.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert locations.hub_answers()
        monkeypatch.setattr(locations.constants, "HF_HUB_OFFLINE", True)
        assert not locations.hub_answers()
        server.shutdown()


def test_the_cache_is_used_without_network(offline, micro_folder, tmp_path, plain):
    """A snapshot as the hub's client leaves it, found by its id."""
    repository = tmp_path / "cache" / "models--someone--micro"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(micro_folder, repository / "snapshots" / ("0" * 40))
    vlm = lit_prune.load("someone/micro")
    assert vlm.name == "someone/micro"
    assert vlm.answer([picture(0), picture(1)], ["what colour ?", "how many ?"], 4) == plain


def test_a_folder_without_weights(tmp_path):
    build_config().save_pretrained(tmp_path)
    with pytest.raises(LitPruneError, match=r"no file named model.safetensors.*random_weights=True"):
        lit_prune.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("config.json", "{", "JSON"),
        ("config.json", '{"model_type": "nonsense"}', "nonsense"),
        ("config.json", '{"model_type": "llama"}', "can't be loaded"),
        ("model.safetensors", "no weights", "can't be loaded"),
    ],
)
def test_damaged_folders(micro_folder, tmp_path, file, content, match):
    shutil.copytree(micro_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(content)
    with pytest.raises(LitPruneError, match=match):
        lit_prune.load(tmp_path / "damaged")


def test_code_of_a_checkpoint_is_not_run(micro_folder, tmp_path):
    folder = tmp_path / "clever"
    shutil.copytree(micro_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "clever", "auto_map": {"AutoConfig": "clever.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "clever.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LitPruneError, match="can't be loaded"):
        lit_prune.load(folder)
    assert not (tmp_path / "ran").exists()
