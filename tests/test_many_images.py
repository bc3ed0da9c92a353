"""Prompts with more images than the budget has tokens: pruned as far as possible, reported once, never refused."""

import logging
from functools import partial

import pytest
import tiny
import torch
from families import FAMILIES, Picture, collate, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, PAD, PRUNERS, VISUAL
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.pictures import join_tiles
from lit_prune.host.zoo.inputs import Prompts, prompts
from lit_prune.host.zoo.shrink import tiny_model
from lit_prune.ops.budget import OutOfReach, average
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.pyramiddrop import PyramidDrop
from lit_prune.pruners.uniform import Uniform
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.step import StepKey, Teaching
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
MANY = pytest.mark.parametrize("images", [1, 2, 11, 20])
LLAVA = FAMILIES["llava-1.5"]
KEEP = 10
# The tower gives every image the budget.
EACH = {"downsample", "id_selection", "prumerge_plus", "scope", "tome", "visionzip"}
REGIONS = {"regions": (torch.rand(3, 2, 20 * VISUAL, generator=torch.Generator().manual_seed(5)) - 0.7).clamp(min=0)}


def inputs(images: int, side: str = "left", answers: int = 0) -> dict[str, Tensor]:
    """A prompt of so many images, one of a single image, one of text."""
    samples = [
        prompt(LLAVA, [Picture((24, 24), n) for n in range(images)], 4, images),
        prompt(LLAVA, [Picture((24, 24), 99)], 6, 3),
        prompt(LLAVA, [], 6, 3),
    ]
    return collate(LLAVA, samples, side, answers)


@EVERY
@MANY
def test_forward_and_generate(pruned, caplog, pruner, images):
    """Every image keeps a token, and what is above the budget is in the trace."""
    vlm, record = pruned(pruner, keep=KEEP), Record()
    with caplog.at_level(logging.WARNING, "lit_prune"), vlm.using(Session(hints=REGIONS, record=record)):
        with torch.no_grad():
            assert vlm.model(**inputs(images)).logits.isfinite().all()
        options = {"do_sample": False, "suppress_tokens": [IMAGE, PAD], "pad_token_id": PAD}
        vlm.model.generate(**inputs(images), max_new_tokens=2, **options)
    kept = record.stages[-1].kept[0, : images * VISUAL].view(images, VISUAL).sum(1)
    assert kept.min() > 0
    spent, excess = record.trace.average_visual(), record.trace.excess()
    assert excess[1:].tolist() == [0, 0]
    assert excess[0] == (spent[0] - KEEP if spent[0] > KEEP + 0.5 else 0)
    if pruner.stem in EACH:
        assert spent[0] == images * KEEP
    elif excess[0]:
        first = vlm.host.stages[0]
        assert spent[0] == (images * VISUAL * first + images * (tiny.DEPTH - first)) / tiny.DEPTH, "no fewer can be"
    assert len(caplog.messages) == (1 if excess[0] else 0)
    assert all(f"{images} images can't be pruned to keep={KEEP}" in message for message in caplog.messages)


@pytest.mark.parametrize("mode", ["soft", "drop"])
@pytest.mark.parametrize("images", [1, 3, 20])
@pytest.mark.parametrize("pruner", [path for path in PRUNERS if path.stem != "oracle"], ids=lambda path: path.stem)
def test_training_step(pruned, pruner, images, mode):
    """Teacher, student, losses, backward; without hints, which training has none of."""
    vlm = pruned(pruner, keep=KEEP)
    vlm.plugin.train()
    options = {"train_mode": mode, "contenders": 3.0, "gate_clip": 1.0, "checkpoint_activations": False, "watch": (4,)}
    teaching = Teaching(vlm, KEEP, LossWeights(attention=1.0, distill=1.0), Anneal(), **options)
    step = teaching.step({"inputs": inputs(images, "right", answers=2)}, StepKey(seed=1, done=0.5))
    step.total.backward()
    gradients = [p.grad for p in vlm.plugin.parameters() if p.grad is not None]
    assert step.total.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    vlm.plugin.eval()


def test_a_schedule_of_fewer_tokens_than_images(pruned, caplog):
    vlm, record = pruned(FastV([1, 4]), keep={1: 4, 4: 2}), Record()
    with caplog.at_level(logging.WARNING, "lit_prune"), torch.no_grad(), vlm.using(Session(record=record)):
        vlm.model(**inputs(3))
    assert [stage.kept.sum(1).tolist() for stage in record.stages] == [[4, 4, 0], [3, 2, 0]]
    assert record.trace.excess()[0] == 0, "half a token on average"
    assert caplog.messages == []


def test_the_frames_of_a_video_may_go_empty(pruned):
    """They are one image: else a long video would have no budget."""
    family = FAMILIES["qwen3-vl"]
    video = Picture((12, 4, 4), 3, "video")
    vlm, record = pruned(FastV([3]), keep={3: 5}, model=family.build()), Record()
    with torch.no_grad(), vlm.using(Session(record=record)):
        vlm.model(**collate(family, [prompt(family, [video], 5, 1)]))
    assert record.stages[0].kept.sum(1).tolist() == [5]


# -- images in pieces -----------------------------------------------------------------------------------------------

FAKE, WHOLE, ROW = 90, 91, 92  # of Idefics 3 and SmolVLM: around each tile, the whole image's name, the first tile's


def tiled(tiles: int, each: int, image: int) -> list[int]:
    """An image as SmolVLM's processor writes it: tiles in rows of two, then the whole image."""
    found = []
    for tile in range(tiles):
        found += [FAKE, ROW + tile, *[image] * each, *[80] * (tile % 2)]
    return [*found, *[80] * (tiles > 0), FAKE, WHOLE, *[image] * each, FAKE]


def test_tiles_of_one_image_belong_together():
    rows = [
        [5, *tiled(4, 3, IMAGE), 6, *tiled(0, 3, IMAGE), 7],
        [5, *tiled(0, 3, IMAGE), *tiled(0, 3, IMAGE), *tiled(2, 3, IMAGE), 7],
        [5, 6, IMAGE, IMAGE, 7, IMAGE, 8, IMAGE],  # tiles without names
        [5, IMAGE, IMAGE],
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mine = ids == IMAGE
    starts = join_tiles(ids, mine & ~torch.nn.functional.pad(mine[:, :-1], (1, 0)))
    assert starts.sum(1).tolist() == [2, 3, 3, 1]
    runs = [(mine[row] & starts[row]).nonzero()[:, 0].tolist() for row in range(2)]
    visual = [mine[row].cumsum(0)[runs[row]].tolist() for row in range(2)]
    assert visual == [[1, 16], [1, 4, 7]]


ROWS = ("mistral3", "lighton_ocr")  # with Pixtral's tower: a text token behind each row of an image


def rows_of(image: int, given: Prompts, model) -> list[int]:
    """An image as Pixtral's processor writes it: [IMG_BREAK] after each row but the last, then [IMG_END]."""
    patch = model.config.vision_config.patch_size * model.config.spatial_merge_size
    rows, columns = (int(side) // patch for side in given.pixels([image], [1])["image_sizes"][0])
    return [*([*[given.image_token] * columns, 80] * rows)[:-1], 81]


def pieces(kind: str, given: Prompts, model) -> dict[str, Tensor]:
    """A prompt of two images that text cuts into pieces, as the class's processor does."""
    token, each = given.image_token, int((given.ids[1] == given.image_token).sum()) // 2
    if kind in ROWS:
        ids, images = [5, *rows_of(1, given, model), 6, *rows_of(3, given, model), 7, 8], [1, 3]
    elif kind == "smolvlm":
        ids, images = [5, *tiled(2, each, token), 6, *tiled(0, each, token), 7, 8], [0, 1, 2, 3]
    else:
        row = [*[token] * (each // 2), 80]  # Molmo 2's <im_col>
        ids, images = [5, *row * 2, 6, *row * 2, 7, 8], [1, 2]
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given.pixels(images, [len(images)])}
    return inputs | given.extra(ids, inputs["attention_mask"])


@pytest.mark.parametrize("kind", ["molmo2", "smolvlm", *ROWS])
def test_an_image_in_pieces_has_one_budget(kind):
    """Each image keeps a token, not each of its pieces; so in `generate()`, which drops what tells sizes."""
    model = tiny_model(kind)
    given = prompts(kind, model)
    inputs, vlm = pieces(kind, given, model), VLM(model, None).attach(Uniform([2]), keep={2: 2})
    for call in (model, partial(model.generate, max_new_tokens=1, do_sample=False, pad_token_id=PAD)):
        record = Record()
        with torch.no_grad(), vlm.using(Session(record=record)):
            call(**inputs)
        assert record.stages[0].kept.sum().item() == 2
    assert record.trace.excess().tolist() == [0]


@pytest.mark.parametrize("kind", ROWS)
def test_images_in_rows_have_shares_of_their_sizes(kind):
    """Alone and beside another prompt; ends of rows are no visual tokens."""
    model = tiny_model(kind)
    given = prompts(kind, model)
    inputs, vlm = pieces(kind, given, model), VLM(model, None).attach(Uniform([0]), keep="50%")
    sizes = [sum(token == given.image_token for token in rows_of(image, given, model)) for image in (1, 3)]
    assert sizes[0] != sizes[1]
    alone, batched = Record(), Record()
    with torch.no_grad(), vlm.using(Session(record=alone)):
        expected = model(**inputs).logits[0, -1]
    kept = alone.stages[0].kept[0].split(sizes)
    assert [int(part.sum()) for part in kept] == [size // 2 for size in sizes]
    other = given.batch([1])
    longest, both = max(one["input_ids"].shape[1] for one in (inputs, other)), {}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in (inputs, other)]
        both[name] = torch.cat(rows)
    both |= given.pixels([1, 3, 1, 2], [2, 2])
    with torch.no_grad(), vlm.using(Session(record=batched)):
        found = model(**both).logits[0, -1]
    assert (batched.stages[0].kept[0, : sum(sizes)] == alone.stages[0].kept[0]).all()
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)


# -- schedules ------------------------------------------------------------------------------------------------------

METHODS = {
    "uniform": Uniform([0]),
    "fastv": FastV([1, 4], [3.0, 1.0]),
    "pyramiddrop": PyramidDrop([2, 4, 6]),
    "chain": Chain(DCPPrune(), FastV([1, 5], [2.0, 1.0]), middle=3.0),
}


@given(
    name=st.sampled_from(sorted(METHODS)),
    images=st.integers(1, 50),
    each=st.integers(1, 60),
    keep=st.integers(1, 200),
)
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_plans_of_any_prompt(name, images, each, keep):
    """Never refused: falling counts, a token of each image, the budget where the method can meet it."""
    method, visual = METHODS[name], images * each
    plan = method.plan(keep, visual, 8, images)
    counts = list(plan.values())
    assert tuple(plan) == method.stages(8)
    assert counts == sorted(counts, reverse=True)
    assert images <= counts[-1]
    assert counts[0] <= visual
    lowest = average(dict.fromkeys(plan, images), visual, 8)
    spent, asked = average(plan, visual, 8), min(keep, visual)
    assert abs(spent - max(asked, lowest)) <= 0.5 or (name == "chain" and spent >= asked - 0.5)
    if images == 1:
        try:
            assert plan == method.schedule(asked, visual, 8)
        except OutOfReach:
            assert counts == [1] * len(counts)


@pytest.mark.parametrize("keep", [0, -3, {2: 5}, {2: 0, 5: 0}])
def test_budgets_that_no_image_can_have_are_refused_when_attached(keep):
    """Also where images differ, and nothing is known of the first."""
    vlm = VLM(FAMILIES["llava-next-vicuna"].build(), None)
    with pytest.raises(LitPruneError):
        vlm.attach(FastV([2, 5]), keep=keep)
    assert vlm.host is None
