"""The public face: load, attach, detach, answer, and configurations through the real parser."""

import gc
import weakref

import pytest
import tiny
import torch
import yaml
from PIL import Image
from tiny import KEEP, PRUNERS, ROOT, batch, forward, samples
from torch import nn
from transformers import LlavaForConditionalGeneration

import lit_prune
from lit_prune.commands.trainer import build
from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.host.compat import cache_of
from lit_prune.loading.locations import resolve
from lit_prune.micro.model import build_config, build_processor
from lit_prune.ops.budget import Share
from lit_prune.pruners.random import Random
from lit_prune.vlm import VLM, as_plugin, plugin_from_yaml

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def micro(micro_folder) -> VLM:
    """An untrained micro-LLaVA, loaded as any other model."""
    return lit_prune.load(micro_folder)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# -- attach and detach ----------------------------------------------------------------------------------------------
@EVERY
def test_detach_leaves_no_trace(tiny_model, pruner):
    """Outputs, weights, hooks and attributes are what they were."""
    inputs = batch(samples())
    with torch.no_grad():
        logits = tiny_model(**inputs).logits
    weights = {name: p.clone() for name, p in tiny_model.state_dict().items()}
    before, names = hooks(tiny_model), {id(m): set(vars(m)) for m in tiny_model.modules()}
    vlm = tiny.attach(tiny_model, pruner)
    assert hooks(tiny_model) > before
    assert not torch.equal(forward(vlm, inputs)[0], logits)
    vlm.detach()
    assert hooks(tiny_model) == before
    assert {id(m): set(vars(m)) for m in tiny_model.modules()} == names
    assert all(torch.equal(p, weights[name]) for name, p in tiny_model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(tiny_model(**inputs).logits, logits)
    assert (vlm.host, vlm.plugin) == (None, None)


def test_attaching_twice_replaces(tiny_model):
    vlm = VLM(tiny_model, None, "tiny")
    vlm.attach(Random([0]), keep=KEEP)
    once = hooks(tiny_model)
    vlm.attach(Random([0], seed=1), keep=20)
    assert hooks(tiny_model) == once
    _, record = forward(vlm, batch(samples()))
    assert record.trace.average_visual().tolist() == [20] * 3
    vlm.detach().detach()


def test_a_model_has_one_plugin_at_a_time(tiny_model):
    """Also where a second VLM is made of the same model, as a notebook does that runs a cell twice."""
    inputs, plain = batch(samples()), hooks(tiny_model)
    first = VLM(tiny_model, None, "tiny").attach(Random([0]), keep=KEEP)
    once = hooks(tiny_model)
    second = VLM(tiny_model, None, "tiny").attach(Random([0], seed=1), keep=20)
    assert hooks(tiny_model) == once
    assert forward(second, inputs)[1].trace.average_visual().tolist() == [20] * 3
    with pytest.raises(LitPruneError, match="attach a pruner first"):
        first.using(Session())
    first.detach()
    assert hooks(tiny_model) == plain


def test_fifty_cycles_leak_nothing(tiny_model):
    inputs, before = batch(samples((45,))), hooks(tiny_model)
    alive = []
    for cycle in range(50):
        vlm = tiny.attach(tiny_model, tiny.small_rcp(), repair=tiny.small_repair())
        if cycle % 10 == 0:
            forward(vlm, inputs)
        alive += [weakref.ref(vlm.host), weakref.ref(vlm.plugin)]
        vlm.detach()
        del vlm
    gc.collect()
    assert hooks(tiny_model) == before
    assert not any(ref() for ref in alive)


def test_attaching_freezes_the_model_and_trains_the_plugin(tiny_model):
    vlm = tiny.attach(tiny_model, tiny.small_rcp(), repair=tiny.small_repair())
    vlm.detach()
    assert not any(p.requires_grad for p in tiny_model.parameters())


def test_attach_needs_a_budget(tiny_model):
    with pytest.raises(LitPruneError, match="give a budget: keep=N"):
        VLM(tiny_model, None).attach(Random([0]))


def test_a_session_needs_something_attached(tiny_model):
    with pytest.raises(LitPruneError, match="attach a pruner first"):
        VLM(tiny_model, None).using(Session())


def test_saving_needs_something_attached(tiny_model, tmp_path):
    with pytest.raises(LitPruneError, match="nothing is attached"):
        VLM(tiny_model, None).save_pretrained(tmp_path)


def test_a_language_model_is_refused(tiny_model):
    with pytest.raises(LitPruneError, match="takes no pixels"):
        VLM(tiny_model.get_decoder(), None)


# -- loading --------------------------------------------------------------------------------------------------------
def test_load_answers_prompts(micro):
    """Three lines of Python; a batch of unlike prompts equals its samples."""
    images, prompts = [image(0), image(1)], ["what colour ?", "how many red circles are in the picture ?"]
    plain = micro.answer(images, prompts, max_new_tokens=4)
    micro.attach(PRUNERS[-1], keep=16)
    together = micro.answer(images, prompts, max_new_tokens=4)
    alone = [micro.answer([i], [p], max_new_tokens=4)[0] for i, p in zip(images, prompts, strict=True)]
    micro.detach()
    assert together == alone
    assert micro.answer(images, prompts, max_new_tokens=4) == plain


def test_readme_lines(micro):
    """The processor's own call and stock generate()."""
    micro.attach(pruner=str(ROOT / "configs" / "pruners" / "rcp.yaml"), keep=16)
    text = micro.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour ?"}]}],
        add_generation_prompt=True,
    )
    inputs = micro.processor(text=text, images=image(), return_tensors="pt")
    out = micro.model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    micro.detach()
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    full = out.sequences.shape[1] - 1
    assert lengths[0] == full
    assert sum(full - n for n in lengths) == 16 * (144 - 16)


def test_plugin_folder_finds_its_base(micro, micro_folder, tmp_path):
    micro.attach(PRUNERS[-1], keep=16)
    micro.save_pretrained(tmp_path)
    micro.detach()
    with pytest.raises(LitPruneError, match="was a folder where it was made"):
        VLM.from_pretrained(tmp_path)
    vlm = VLM.from_pretrained(tmp_path, base=micro_folder)
    assert vlm.name == str(micro_folder)
    assert vlm.plugin.keep == 16


def test_load_of_nothing(tmp_path):
    with pytest.raises(LitPruneError, match=r"no config\.json"):
        lit_prune.load(tmp_path)
    with pytest.raises(LitPruneError, match=r"no config\.json"):
        resolve("./nowhere")


# -- configurations -------------------------------------------------------------------------------------------------
def parsed(micro_folder, files: list, tmp_path, *overrides: str):
    """Model, data and trainer of configuration files on an untrained micro-LLaVA."""
    fixed = [f"--model.base={micro_folder}", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    return build([str(file) for file in files], [*fixed, *overrides])


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """An untrained micro-LLaVA as deep as LLaVA-1.5-7B."""
    folder = tmp_path_factory.mktemp("base") / "deep"
    config = build_config()
    config.text_config.num_hidden_layers = 32
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


WHOLE = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "model" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_configuration_goes_through_the_parser(deep_folder, tmp_path, path):
    """On one CPU, with a budget that any layers can meet."""
    alone = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.num_nodes=1")
    cli = parsed(deep_folder, [path], tmp_path, *alone, "--model.keep=64")
    written = yaml.safe_load(path.read_text())["model"]["pruner"]["init_args"]
    found = cli.model.plugin.pruner.config()
    assert {name: found[name] for name in written} == written


@EVERY
def test_overlay_is_what_attach_makes(micro_folder, tmp_path, pruner):
    """Nothing of the file below it shines through."""
    cli = parsed(micro_folder, [ROOT / "configs" / "micro.yaml", pruner], tmp_path, "--model.keep=48")
    attached = plugin_from_yaml(pruner)
    found = cli.model.plugin
    assert type(found.pruner) is type(attached.pruner)
    assert found.pruner.config() == attached.pruner.config()
    assert (found.repair is None) == (attached.repair is None)
    if found.repair is not None:
        assert found.repair.config() == attached.repair.config()
    assert cli.model.host.keep == 48


def test_file_without_a_method(tmp_path):
    path = tmp_path / "empty.yaml"
    for text in ("", "model: {}", "- 1", "model: {pruner: null}"):
        path.write_text(text)
        with pytest.raises(LitPruneError, match="names no method"):
            plugin_from_yaml(path)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(LitPruneError, match="No such file"):
        plugin_from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(LitPruneError, match="not valid YAML"):
        plugin_from_yaml(tmp_path / "bad.yaml")


def test_file_with_a_misspelt_argument(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {pruner: {class_path: lit_prune.pruners.random.Random, init_args: {sed: 1}}}")
    with pytest.raises(LitPruneError, match="sed"):
        plugin_from_yaml(path)


def test_file_may_carry_a_budget(tiny_model, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {keep: 9, pruner: {class_path: lit_prune.pruners.random.Random}}")
    vlm = VLM(tiny_model, None, "tiny").attach(path)
    _, record = forward(vlm, batch(samples()))
    vlm.detach()
    assert record.trace.average_visual().tolist() == [9] * 3


@pytest.mark.parametrize(
    ("text", "keep", "repair"),
    [
        ("rcp@16", 16, True),
        ("rcp!@16", 16, False),
        ("rcp@11.1%", Share(11.1), True),
        ("rcp!@1:64,8:16,12:4", {1: 64, 8: 16, 12: 4}, False),
        ("pruners/rcp", None, True),
        ("configs/pruners/rcp.yaml!", None, False),
    ],
)
def test_a_method_in_one_line(text, keep, repair, monkeypatch):
    """Path, repair, budget: the grammar of commands, files and Python alike."""
    monkeypatch.chdir(ROOT)
    plugin = as_plugin(text)
    assert type(plugin.pruner).__name__ == "RCP"
    assert (plugin.keep, plugin.repair is not None) == (keep, repair)


def test_the_full_model_is_a_method(tiny_model):
    inputs = tiny.batch(tiny.samples())
    with torch.no_grad():
        plain = tiny_model(**inputs).logits
    vlm = VLM(tiny_model, None).attach("full")
    logits, record = tiny.forward(vlm, inputs)
    assert torch.equal(logits, plain)
    assert record.trace.average_visual().tolist() == [tiny.VISUAL] * 3
    assert vlm.host.schedule == {}
    vlm.detach()


@pytest.mark.parametrize(
    ("text", "words"), [("@16", "no method; write"), ("!", "no method; write"), ("rcp@x", "rcp@x")]
)
def test_a_line_that_is_no_method(text, words):
    with pytest.raises(LitPruneError, match=words):
        as_plugin(text)


def test_a_folder_whose_name_has_the_signs_of_the_grammar(tmp_path):
    folder = tmp_path / "a!@9"
    as_plugin("fastv@8").save_pretrained(folder)
    assert as_plugin(folder).keep == 8
