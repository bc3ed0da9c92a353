"""What the hooks rely on in transformers, and what is said of a library or a model that lacks it."""

import inspect
import time
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import transformers
from families import FAMILIES
from tiny import KEEP, batch, samples
from torch import nn
from transformers.models.llama import modeling_llama

from lit_prune.errors import LitPruneError
from lit_prune.host import checks, compat
from lit_prune.pruners.dart import DART
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.random import Random
from lit_prune.pruners.text_attention import TextAttention
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.vlm import VLM

INSTALLED = rf"transformers {transformers.__version__}: .*"
KNOWN = r"known to work: .* on transformers 5\.19 to 5\.24 \(pip install 'transformers>=5\.19,<5\.25'\)$"


@pytest.fixture(autouse=True)
def fresh():
    """Checks are remembered by class; a test's classes and libraries are its own."""
    remembered = {
        id(v): v for part in (checks, compat) for v in vars(part).values() if hasattr(v, "cache_clear")
    }.values()
    assert len(remembered) > 3
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def model() -> nn.Module:
    return tiny.build_model()


def refused(missing: str, model: nn.Module, pruner=None, **options) -> None:
    """Asserts that attaching says what is missing, in one line, and leaves no hook."""
    with pytest.raises(LitPruneError, match=INSTALLED + missing + ".*" + KNOWN) as error:
        VLM(model, None).attach(pruner or Random([1]), keep=KEEP, **options)
    assert "\n" not in str(error.value)
    assert not model.get_decoder().layers[0]._forward_pre_hooks


def recast(part: nn.Module, forward=None, name: str = "Recast") -> None:
    """Give a module a class of its own, with another forward."""
    part.__class__ = type(name, (type(part),), {} if forward is None else {"forward": forward})


# -- models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["model", "decoder", "layer"])
def test_a_third_name_of_the_cache(model, part):
    def forward(
        self, hidden_states=None, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None,
        position_embeddings=None, kv_store=None, **kwargs,
    ):  # fmt: skip
        raise AssertionError

    recast({"model": model, "decoder": model.get_decoder(), "layer": model.get_decoder().layers[3]}[part], forward)
    refused("Recast takes no KV cache as 'cache' or 'past_key_values'", model)


@pytest.mark.parametrize("part", ["model", "decoder", "layer"])
def test_keywords_that_go_nowhere(model, part):
    def forward(
        self, hidden_states=None, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None,
        position_embeddings=None, past_key_values=None,
    ):  # fmt: skip
        raise AssertionError

    recast({"model": model, "decoder": model.get_decoder(), "layer": model.get_decoder().layers[0]}[part], forward)
    refused(r"Recast takes no further keywords \(\*\*kwargs\)", model)


def test_a_keyword_that_a_layer_lacks(model):
    def forward(self, hidden_states, cache=None, **kwargs):
        raise AssertionError

    names = {"position_ids", "position_embeddings"}
    parameters = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in sorted(names)]
    known = list(inspect.signature(forward).parameters.values())
    forward.__signature__ = inspect.Signature([*known[:-1], *parameters, known[-1]])
    recast(model.get_decoder().layers[2], forward)
    refused("Recast takes no 'attention_mask'", model)


def test_a_wrapper_that_passes_everything_on(model):
    """Its signature says nothing; the first forward does."""
    inner = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        return inner(self, *args, **kwargs)

    recast(model.get_decoder().layers[2], forward)
    vlm = VLM(model, None, "tiny").attach(Random([0]), keep=KEEP)
    assert tiny.forward(vlm, batch(samples()))[1].trace.average_visual().tolist() == [KEEP] * 3


def test_a_norm_that_a_layer_lacks(model):
    del model.get_decoder().layers[5].input_layernorm
    refused("LlamaDecoderLayer has no input_layernorm", model)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "head_dim", "scaling"])
@pytest.mark.parametrize("pruner", [partial(TextAttention, [2]), partial(DART, [2])], ids=["attention", "keys"])
def test_projections_that_a_method_reads_itself(model, pruner, name):
    """Of its stage's own layer only: another method, or another layer, needs none."""
    delattr(model.get_decoder().layers[2].self_attn, name)
    refused(f"the self_attn of LlamaDecoderLayer has no {name}", model, pruner())
    VLM(model, None).attach(FastV([2]), keep=KEEP).attach(TextAttention([3]), keep=KEEP + 4).detach()


def test_a_layer_without_attention_of_that_name(model):
    del model.get_decoder().layers[2].self_attn
    refused("the self_attn of LlamaDecoderLayer has no q_proj and no k_proj", model, TextAttention([2]))


def test_a_module_without_a_rotation(model, monkeypatch):
    monkeypatch.delattr(modeling_llama, "apply_rotary_pos_emb")
    refused("the module of LlamaAttention has no apply_rotary_pos_emb", model, TextAttention([2]))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_tower_whose_attention_lacks_something(model, name):
    delattr(model.get_submodule("model.vision_tower.encoder.layers.1.self_attn"), name)
    with pytest.raises(LitPruneError, match="no vision tower whose layers are attention"):
        VLM(model, None).attach(VisionZip(), keep=KEEP)


def test_a_tower_in_another_place_is_found(model):
    model.model.vision_model = model.model.vision_tower
    del model.model.vision_tower
    vlm = VLM(model, None).attach(VisionZip(), keep=KEEP)
    assert vlm.host.tower.tower.module is model.model.vision_model
    vlm.detach()


# -- libraries ------------------------------------------------------------------------------------------------------
def test_mask_functions_of_another_kind(model, monkeypatch):
    from transformers import masking_utils

    def create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids=None):
        raise AssertionError

    monkeypatch.setattr(masking_utils, "create_causal_mask", create_causal_mask)
    refused("create_causal_mask takes no 'layer_idx' and no 'allow_is_causal_skip'", model)


def test_a_mask_function_with_a_third_name_of_the_cache(model, monkeypatch):
    from transformers import masking_utils

    def create_causal_mask(
        config, inputs_embeds, attention_mask, kv_store, position_ids=None, layer_idx=None, allow_is_causal_skip=True
    ):
        raise AssertionError

    monkeypatch.setattr(masking_utils, "create_causal_mask", create_causal_mask)
    refused("create_causal_mask takes no KV cache as", model)


def test_a_mask_function_of_encoders(model, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "create_bidirectional_mask", lambda config, embeds, mask: None)
    refused("create_bidirectional_mask takes no 'inputs_embeds' and no 'attention_mask'", model, VisionZip())
    VLM(model, None).attach(Random([1]), keep=KEEP).detach()


def test_a_cache_without_lengths(model, monkeypatch):
    monkeypatch.delattr(transformers.Cache, "get_seq_length")
    refused("Cache.get_seq_length takes no 'layer_idx'", model)


def test_a_cache_that_takes_no_configuration(model, monkeypatch):
    monkeypatch.setattr(transformers.DynamicCache, "__init__", lambda self, layers=None: None)
    refused("DynamicCache takes no 'config'", model)


def test_a_prefill_that_cannot_be_seen(model, monkeypatch):
    """Else chunks of a prompt would be pruned one by one, without a word."""
    monkeypatch.delattr(transformers.GenerationMixin, "_prefill")
    refused("GenerationMixin._prefill takes no 'generation_config'", model)


def test_encoded_images_under_another_name(model, monkeypatch):
    """Else prompts would not be pruned in generate(), without a word."""
    from transformers.generation import utils

    monkeypatch.setattr(utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ("encoded", "pixel_values"))
    refused("generate.. doesn't pass encoded images as 'mm_encoder_outputs'", model)


def test_attention_that_is_registered_elsewhere(model):
    """Such as a kernel of the hub: it can't be read, nor biased, and would be neither without a word."""
    model.config._attn_implementation = model.get_decoder().config._attn_implementation = "paged|sdpa"
    for options in ({"pruner": FastV([2])}, {"pruner": Random([1]), "proportional_attention": "count"}):
        with pytest.raises(LitPruneError, match=r"paged\|sdpa attention .* with attn_implementation='sdpa'"):
            VLM(model, None).attach(**options, keep=KEEP)


# -- what only a forward shows --------------------------------------------------------------------------------------
def fails(missing: str, model: nn.Module, **inputs) -> None:
    """Asserts that the first forward says it, before anything is pruned, and detached the model has no such trouble."""
    vlm = VLM(model, None, "tiny").attach(Random([1]), keep=KEEP)
    prompts = {**batch(samples()), **inputs}
    with pytest.raises(LitPruneError, match=INSTALLED + missing + ".*" + KNOWN):
        tiny.forward(vlm, prompts)
    with pytest.raises(LitPruneError, match=missing):
        tiny.generate(vlm, prompts, 2)
    vlm.detach()


def called(change):
    """A layer that changes its arguments before it, and its hooks, see them."""

    def __call__(self, *args, **kwargs):
        args, kwargs = change(args, kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    return __call__


def without(kwargs: dict, name: str) -> dict:
    return {key: value for key, value in kwargs.items() if key != name}


ROPE = "isn't given position_embeddings, a pair"
CALLS = {
    "no rope": (lambda a, k: (a, without(k, "position_embeddings")), ROPE),
    "rope of one tensor": (lambda a, k: (a, {**k, "position_embeddings": k["position_embeddings"][0]}), ROPE),
    "rope per layer": (lambda a, k: (a, {**k, "position_embeddings": {"full": k["position_embeddings"]}}), ROPE),
    "rope of three": (lambda a, k: (a, {**k, "position_embeddings": (*k["position_embeddings"], None)}), ROPE),
    "rope of one column": (
        lambda a, k: (a, {**k, "position_embeddings": tuple(part[:, :1] for part in k["position_embeddings"])}),
        ROPE,
    ),
    "rope by head": (
        lambda a, k: (a, {**k, "position_embeddings": tuple(part[:, None] for part in k["position_embeddings"])}),
        ROPE,
    ),
    "states by name": (lambda a, k: ((), {**k, "hidden_states": a[0]}), "isn't given hidden states"),
    "a mask by position": (
        lambda a, k: ((*a, k["attention_mask"]), without(k, "attention_mask")),
        "isn't given hidden",
    ),
    "packed states": (lambda a, k: ((a[0].flatten(0, 1),), k), "isn't given hidden states"),
    "other columns": (lambda a, k: ((a[0][:, 1:],), k), r"is given \d+ columns of hidden states in place of \d+"),
}


# After a stage a layer gets other rotary embeddings than the decoder's, whatever those are.
@pytest.mark.parametrize(
    ("name", "at"),
    [
        *((name, 0) for name in CALLS),
        *((name, 3) for name in list(CALLS)[:1]),
        *((name, 3) for name in list(CALLS)[6:]),
    ],
)
def test_calls_of_a_layer(model, name, at):
    change, missing = CALLS[name]
    layer = model.get_decoder().layers[at]
    layer.__class__ = type("Recast", (type(layer),), {"__call__": called(change)})
    fails(f"Recast {missing}", model)


def test_a_layer_that_returns_more_than_states(model):
    inner = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        return (inner(self, hidden_states, **kwargs),)

    forward.__signature__ = inspect.signature(inner)
    recast(model.get_decoder().layers[0], forward)
    fails("Recast returns tuple in place of a tensor", model)


@pytest.mark.parametrize("part", ["inside", "decoder"])
def test_keywords_that_do_not_come_down(model, part):
    """They are taken, and dropped: nothing would be pruned, without a word."""
    owner = model.model if part == "inside" else model.get_decoder()
    inner = type(owner).forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("lit_prune")}
        names = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return inner(self, **names, inputs_embeds=inputs_embeds, **kwargs)

    names = list(inspect.signature(inner).parameters.values())
    forward.__signature__ = inspect.Signature(names)
    recast(owner, forward)
    fails("LlavaForConditionalGeneration doesn't hand its keywords down to its decoder's layers", model)


def test_a_decoder_without_last_hidden_state(model):
    decoder = model.get_decoder()
    inner = type(decoder).forward

    def forward(self, **kwargs):
        return SimpleNamespace(states=inner(self, **kwargs).last_hidden_state)

    forward.__signature__ = inspect.signature(inner)
    recast(decoder, forward)
    fails("the output of Recast has no last_hidden_state", model)


# -- what is there --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name):
    model = FAMILIES[name].build()
    decoder = model.get_decoder()
    checks.check_decoder(model, decoder, decoder.layers, range(len(decoder.layers)))


def test_the_check_takes_microseconds(model):
    """After the first of its classes; an attach takes milliseconds."""
    decoder = model.get_decoder()
    layers = list(decoder.layers) * 4  # as many as LLaVA-1.5-7B has
    checks.check_decoder(model, decoder, layers, [1, 13, 25])
    took = []
    for _ in range(50):
        start = time.perf_counter()
        checks.check_decoder(model, decoder, layers, [1, 13, 25])
        took.append(time.perf_counter() - start)
    assert min(took) < 1e-3
    print(f"{min(took) * 1e6:.0f} microseconds")


def test_activation_checkpointing_under_both_names():
    asked = []

    class New(nn.Module):
        def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None):
            asked.append(("new", activation_checkpointing_kwargs))

    class Old(nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            asked.append(("old", gradient_checkpointing_kwargs))

    for kind in (New, Old):
        compat.enable_checkpointing(kind(), {"use_reentrant": False})
    assert asked == [("new", {"use_reentrant": False}), ("old", {"use_reentrant": False})]


def test_names_that_differ_stand_in_one_file():
    """Those that differ between the versions that are supported."""
    names = ("past_key_values", "activation_checkpointing", "gradient_checkpointing")
    sources = [path for path in (tiny.ROOT / "lit_prune").rglob("*.py") if path.name != "compat.py"]
    assert [path.name for path in sources for name in names if name in path.read_text(encoding="utf-8")] == []
