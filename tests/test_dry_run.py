"""Towers counted without weights, against PyTorch's counter on the same towers with weights."""

import json

import pytest
import torch
from test_cost import counter

from lit_prune.commands._support import pricing
from lit_prune.errors import LitPruneError
from lit_prune.host import dry_run, structure
from lit_prune.host.dry_run import DryRun, tower_flops
from lit_prune.host.noise import one_image
from lit_prune.host.parts import find
from lit_prune.host.zoo.inputs import visual_tokens
from lit_prune.host.zoo.shrink import listed, tiny_config, tiny_model

IMAGE = (32, 32)
UNCOUNTED = ("step3p7",)  # whose tower splits by what only its pixels tell
KINDS = {  # of each thing that a tower may compute from its inputs
    "chameleon": "codes of a tokenizer",
    "idefics3": "which images are blank",
    "kimi_k25": "grids",
    "mistral3": "a mask of blocks",
}


def counted(kind):
    """FLOPs and visual tokens of an image, with weights."""
    model = tiny_model(kind)
    find(model)
    with counter() as counts, torch.no_grad():
        visual = visual_tokens(model.config.model_type, model, one_image(model, IMAGE))
    return model, (counts.get_total_flops(), visual)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_without_weights_takes_what_one_with_weights_takes(kind):
    model, expected = counted(kind)
    assert tower_flops(model.to("meta"), IMAGE) == expected
    assert expected[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_tower_is_counted_or_fails_before_it_is_wrong(kind):
    try:
        model, expected = counted(kind)
    except Exception:
        pytest.skip("what the library can't build, or has no visual tokens")
    if kind in UNCOUNTED:
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            tower_flops(model.to("meta"), IMAGE)
        return
    assert tower_flops(model.to("meta"), IMAGE) == expected


def test_whole_numbers_are_computed_and_others_are_not():
    weights, rows = torch.empty(6, 4, device="meta"), torch.tensor([True, False, True, False, False, True])
    with DryRun():
        assert (rows.long() + 1).tolist() == [2, 1, 2, 1, 1, 2]
        chosen = weights[rows]
        ids = (chosen > 0).sum(1)
        made = torch.arange(3, device=chosen.device)
    assert (chosen.shape, chosen.device.type) == ((3, 4), "meta")
    assert ids.tolist() == [0, 0, 0], "nobody knows them"
    assert made.tolist() == [0, 1, 2]


def folder(tmp_path, kind):
    config = tiny_config(kind)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return str(tmp_path)


def test_the_command_prices_a_tower_without_a_formula(tmp_path):
    """For as many images as give a prompt's visual tokens."""
    where = folder(tmp_path, "kimi_k25")
    one = pricing.describe(where, None, None, list(IMAGE), 10, 4, "float32")
    _, (flops, visual) = counted("kimi_k25")
    assert (one.prompt.visual, one.bill().prefill["vision"]) == (visual, flops)
    three = pricing.describe(where, None, 3 * visual, None, 10, 4, "float32")
    assert three.bill().prefill["vision"] == pytest.approx(3 * visual * three.size.counted[0] / three.size.counted[1])
    assert three.bill().step.get("vision", 0) == 0


def test_a_tower_that_can_not_be_run_is_unknown(tmp_path, monkeypatch):
    def failing(*_):
        raise NotImplementedError

    monkeypatch.setattr(dry_run, "tower_flops", failing)
    where = folder(tmp_path, "kimi_k25")
    assert "vision" not in pricing.describe(where, None, 20, None, 10, 4, "float32").bill().prefill
    with pytest.raises(LitPruneError, match="how many visual tokens an image has isn't known; give --visual-tokens"):
        pricing.describe(where, None, None, None, 10, 4, "float32")
    assert structure.meta_size(tiny_config("kimi_k25")).counted is None


@pytest.mark.parametrize("kind", ["aya_vision", pytest.param("granite4_vision", marks=pytest.mark.slow)])
def test_a_known_tower_with_a_projector_of_its_own_has_no_formula(kind):
    """SigLIP's under other projectors: their formula would be another."""
    size = structure.meta_size(tiny_config(kind), IMAGE)
    assert not size.tower_known
    assert size.counted == counted(kind)[1]


def test_tiles_are_the_processors():
    """Aya's image of two tiles, and the thumbnail."""
    with torch.device("meta"):
        model = tiny_model("aya_vision")
    one, three = tower_flops(model, IMAGE), tower_flops(model, (IMAGE[0], 2 * IMAGE[1]))
    assert three == (3 * one[0], 3 * one[1])
