"""Laws of pruning on tiny random models of the classes in transformers' image-text-to-text list."""

import pytest
import torch
from test_cost import counter

from lit_prune.commands._support.class_runs import run_all
from lit_prune.cost.flops import price
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.laws import measure
from lit_prune.host import Record, Session
from lit_prune.host.zoo.exceptions import FIELDS
from lit_prune.host.zoo.inputs import prompts
from lit_prune.host.zoo.shrink import listed, tiny_model
from lit_prune.pruners.uniform import Uniform
from lit_prune.vlm import VLM

# One class for each thing that a decoder may do with its tokens.
SAMPLE = {
    "aria": "experts, and attention that is read through the layer",
    "cohere2_vision": "windows, and layers without positions",
    "ernie4_5_vl_moe": "types of tokens beside the states, M-RoPE",
    "exaone4_5": "no norm at a layer's input",
    "gemma3": "images whose tokens see each other both ways, beside windows",
    "gemma4": "inputs of each layer, given by place",
    "kimi_k25": "latent attention",
    "lfm2_vl": "convolutions",
    "molmo2": "masks of its own, norms of another place",
    "muse_glimmer": "gates on queries, layers without rotary embeddings",
    "nemotron_h_omni": "recurrences and layers that mix nothing",
    "qwen3_5": "linear attention",
    "unlimited_ocr": "a window over the answer alone",
    "video_llava": "pixels under another name",
    "mistral_large4": "layers that choose their keys",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_laws_hold(kind):
    found = measure(kind)
    assert (found.verdict, found.error, found.refused, found.broken) == ("works", None, None, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_class_works_or_is_refused_in_a_sentence(kind):
    found = measure(kind)
    assert found.verdict in ("works", "refused", "library"), (found.error, found.broken)
    if found.refused is not None:
        assert "\n" not in found.refused


def test_soft_masks_are_refused_where_layers_choose_fewer_keys_than_a_prompt_has(monkeypatch):
    """What chooses them doesn't see the mask; dropping is as exact as ever."""
    kind = "mistral_large4"
    if kind not in listed():
        pytest.skip(f"this version of transformers has no {kind}")
    monkeypatch.setitem(FIELDS, kind, {**FIELDS.get(kind, {}), "text_config.index_topk": 6})
    found = measure(kind)
    assert (found.verdict, found.error, found.laws["train, drop"]) == ("works", None, True)
    for law in ("soft", "train, soft"):
        assert "choose the 6 keys of each token" in found.laws[law]


# -- every verb -----------------------------------------------------------------------------------------------------

VERBS_ON = {  # class: what was trained
    "chameleon": "RCP and repair, soft",  # embeds its tokens itself, and names its image token nowhere
    "ernie4_5_vl_moe": "RCP and repair, soft",  # experts of images
    "lfm2_vl": "RCP and repair, drop",  # convolutions
    "molmo2": "RCP and repair, soft",  # numbers of patches that are counted through a batch
}


def ran(kind):
    runs = run_all(kind)
    assert runs.errors == {}
    if runs.trained:
        assert set(runs.refused) <= {"fit, soft"}
        for row in runs.outcomes["compare"]:
            assert row["avg_visual_tokens"] > 0
        full, pruned = runs.outcomes["bench"]
        assert full["flops"] is None or full["flops"] > pruned["flops"]
        assert pruned["avg_visual_tokens"] < full["avg_visual_tokens"]
        assert runs.outcomes["generate"][0].visual[0] < runs.outcomes["generate"][1].visual[0]
    return runs


@pytest.mark.parametrize("kind", VERBS_ON)
def test_every_verb_runs_on_classes_of_all_kinds(kind):
    assert ran(kind).trained == VERBS_ON[kind]


@pytest.mark.parametrize("kind", ["minicpmv4_6", "gemma4"])
def test_samples_are_joined_as_their_processor_joins_them(kind):
    """Patches of all images in one strip; in rows that are padded."""
    assert run_all(kind, ("data",)).errors == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_verb_runs_on_every_class(kind):
    found = measure(kind, laws=False)
    if found.verdict == "library":
        pytest.skip("this library can't build it")
    runs = run_all(kind)
    if "library" in runs.errors:
        pytest.skip(runs.errors["library"])
    if found.refused is not None:
        assert runs.refused == {"attach": found.refused}
    else:
        assert ran(kind).trained


# -- towers without a known price -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted():
    """A class whose decoder has a price and whose tower has none, and its prompts."""
    model = tiny_model("qwen2_vl")
    vlm = VLM(model, None).attach(Uniform([2]), keep="50%")
    assert vlm.size is not None
    assert not vlm.size.tower_known
    yield vlm, prompts("qwen2_vl", model)
    vlm.detach()


@pytest.mark.parametrize("ahead", [False, True], ids=["in the forward", "encoded before"])
def test_what_a_tower_takes_is_counted_where_it_runs(counted, ahead):
    vlm, given = counted
    batch, record = given.batch(), Record()
    with counter() as counts, torch.no_grad():
        vlm.model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    inputs = vlm.encode_images(batch) if ahead else batch
    with torch.no_grad(), vlm.using(Session(record=record)):
        vlm.model(**inputs)
    parts = price(record.trace, vlm.size, vlm.plugin.pruner)
    assert parts["vision"].sum().item() == pytest.approx(counts.get_total_flops())
    share = record.trace.total_visual / record.trace.total_visual.sum()
    assert torch.allclose(parts["vision"] / parts["vision"].sum(), share.double())


def test_nothing_is_counted_on_after_a_tower_that_fails(counted):
    vlm, given = counted
    batch = given.batch()
    with vlm.using(Session(record=Record())), pytest.raises(RuntimeError):
        vlm.model(**{**batch, "pixel_values": batch["pixel_values"][:, :-1]})
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_lists_classes_and_writes_the_table(tmp_path, capsys):
    from lit_prune.commands import models

    page = tmp_path / "page.md"
    row = "| qwen2_vl | `Q` | yes | soft | yes | RCP | a remark |"
    page.write_text(f"before\n<!-- classes -->\nold\n{row}\n<!-- end of classes -->\nafter\n", encoding="utf-8")
    models.run(["llava", "mistral4"], verbs=True, out=page)
    shown = capsys.readouterr().out
    assert "llava" in shown
    assert "takes no pixels" in shown
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| mistral4 | `Mistral4ForCausalLM` | no |" in text
    assert row in text, "as it was"
    assert "| RCP and repair, soft |" in text.partition("| llava | ")[2].partition("\n")[0]
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(LitPruneError, match="has no marks"):
        models.run(["llava"], out=page)
    with pytest.raises(LitPruneError, match="seashell is not in"):
        models.run(["seashell"])
