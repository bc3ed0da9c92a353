"""Videos: their frames share a budget or are pruned apart, alone and beside images and text."""

from functools import lru_cache

import pytest
import torch
from families import FAMILIES, Picture, collate, prompt
from test_cost import counter
from test_equality import keep_all_is_the_plain_model
from tiny import IMAGE, VIDEO, forward, gap, generate, small_rcp, small_repair
from torch import Tensor

from lit_prune.cost.flops import price
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.laws import measure
from lit_prune.host import Session
from lit_prune.host.options import HostOptions
from lit_prune.host.pictures import Sizes, split
from lit_prune.host.zoo.inputs import prompts
from lit_prune.host.zoo.shrink import listed, tiny_model
from lit_prune.host.zoo.videos import video_prompts
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Context
from lit_prune.pruners.random import Random
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.vlm import VLM

VIDEOS = [name for name in FAMILIES if FAMILIES[name].video is not None]
EACH = pytest.mark.parametrize("name", VIDEOS)
FRAMES = pytest.mark.parametrize("frames", ["together", "apart"])
TURNS = [("llava-onevision", "apart"), ("qwen2.5-vl", "apart"), ("qwen3-vl", "together")]  # the others are slow tests
CASES = [
    pytest.param(name, frames, marks=() if (name, frames) in TURNS else pytest.mark.slow)
    for name in VIDEOS
    for frames in ("together", "apart")
]
TOLERANCE = 5e-4  # as in test_families.py


@lru_cache
def built(name: str):
    """The family's model; read-only."""
    return FAMILIES[name].build()


def mixed(name: str) -> list:
    """A video, a video before an image, text alone, and an image before two videos."""
    family = FAMILIES[name]
    image, videos = Picture(family.sizes[0], 8), [Picture(family.video, seed, "video") for seed in (9, 10, 11, 12)]
    pictures = [[videos[0]], [videos[1], image], [], [image, *videos[2:]]]
    return [prompt(family, mine, 5 + row, row + 1) for row, mine in enumerate(pictures)]


def text(inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    return inputs["attention_mask"].bool() & (ids != IMAGE) & (ids != VIDEO)


class Early(Random):
    """Prefers early tokens."""

    def score(self, context: Context) -> Tensor:
        return -context.ordinal.float()


@pytest.mark.parametrize(("name", "frames"), CASES)
def test_laws(pruned, name, frames):
    """Keep-all, drop = mask, batch = alone, cached = recomputed, several answers; a budget that is spent exactly."""
    family, samples, options = FAMILIES[name], mixed(name), {"model": built(name), "frames": frames}
    inputs = collate(family, samples)
    keep_all_is_the_plain_model(
        built(name), lambda: pruned(small_rcp(), 1000, small_repair(), **options), inputs, tokens=4
    )
    vlm = pruned(small_rcp(), 28, small_repair(), **options)
    dropped, record = forward(vlm, inputs)
    masked, _ = forward(vlm, inputs, soft=True)
    assert gap(dropped[text(inputs)], masked[text(inputs)]) <= TOLERANCE
    totals = [sum(family.length(picture) for picture in sample.pictures) for sample in samples]
    assert record.trace.total_visual.tolist() == totals
    assert record.trace.average_visual().tolist() == pytest.approx([28, 28, 0, 28], abs=0.4)
    together = generate(vlm, inputs, 4)
    last = collate(family, samples[-1:])
    for row, mine in ((0, collate(family, samples[:1])), (3, last)):
        alone = generate(vlm, mine, 4)
        assert gap(alone.logits[0], together.logits[row]) <= TOLERANCE
    assert gap(generate(vlm, last, 4, use_cache=False).logits, alone.logits) <= TOLERANCE
    beams = {"num_beams": 2, "num_return_sequences": 2}
    both = generate(vlm, collate(family, samples[1::2]), 2, **beams).sequences
    assert torch.equal(both[2:, -2:], generate(vlm, last, 2, **beams).sequences[:, -2:])


@EACH
@pytest.mark.parametrize("ahead", [False, True], ids=["in the forward", "encoded before"])
def test_frames_compete_or_have_a_share_each(pruned, name, ahead):
    family = FAMILIES[name]
    video, count = Picture(family.video, 9, "video"), family.video[0]
    inputs, each = collate(family, [prompt(family, [video], 5, 1)]), family.length(video) // count
    first = [min(each, max(0, 2 * count - each * frame)) for frame in range(count)]
    for frames, expected in (("together", first), ("apart", [2] * count)):
        vlm = pruned(Early([2]), {2: 2 * count}, model=built(name), frames=frames)
        _, record = forward(vlm, vlm.encode_images(inputs) if ahead else inputs)
        kept = record.stages[0].kept[0]
        assert [int(kept[frame * each : (frame + 1) * each].sum()) for frame in range(count)] == expected


@EACH
@FRAMES
def test_generate_keeps_what_a_forward_keeps(pruned, name, frames):
    """`generate()` encodes videos itself, and drops what tells their sizes."""
    inputs = collate(FAMILIES[name], mixed(name))
    vlm = pruned(Early([2]), 24, model=built(name), frames=frames)
    _, record = forward(vlm, inputs)
    with torch.no_grad(), vlm.using(Session(record=(again := type(record)()))):
        vlm.model.generate(**inputs, max_new_tokens=1, pad_token_id=0)
    assert torch.equal(record.stages[0].kept, again.stages[0].kept)


@EACH
def test_the_tower_is_priced_frame_by_frame(pruned, name):
    inputs = collate(FAMILIES[name], mixed(name))
    vlm = pruned(Early([2]), 24, model=built(name))
    _, record = forward(vlm, inputs)
    pixels = {key: value for key, value in inputs.items() if "pixel" in key or "grid" in key or "sizes" in key}
    with counter() as counts, torch.no_grad():
        for modality in ("image", "video"):
            names = (f"pixel_values{'_videos' * (modality == 'video')}", f"{modality}_grid_thw", f"{modality}_sizes")
            getattr(vlm.model.model, f"get_{modality}_features")(**{key: pixels[key] for key in names if key in pixels})
    parts = price(record.trace, vlm.size)
    assert record.trace.vision is not None
    assert parts["vision"].sum() + parts["projector"].sum() == pytest.approx(counts.get_total_flops(), rel=0.01)


def test_frames_are_an_option_of_a_plugin(tmp_path, pruned):
    pruned(Early([2]), 24, model=built("qwen3-vl"), frames="apart").save_pretrained(tmp_path)
    assert Plugin.from_pretrained(tmp_path).options == HostOptions(frames="apart")
    with pytest.raises(LitPruneError, match="frames"):
        HostOptions(frames="each")


# -- inside the tower -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_frames_have_even_shares_inside_the_tower(pruned, name):
    family = FAMILIES[name]
    inputs = collate(family, [prompt(family, [Picture(family.video, 9, "video")], 5, 1)])
    vlm, each = pruned(VisionZip(), "50%", model=built(name)), family.length(Picture(family.video, 9, "video")) // 3
    _, record = forward(vlm, inputs)
    assert record.trace.average_visual().tolist() == [3 * each / 2]


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video", "video_llava"])
def test_towers_that_videos_are_not_pruned_in_refuse_them(kind):
    """Pooled behind the tower, or a tower of their own: images are pruned there, and videos in the decoder."""
    model = tiny_model(kind)
    images, videos = prompts(kind, model).batch(), video_prompts(kind, model).batch()
    vlm = VLM(model, None).attach(VisionZip(), keep="50%")
    with torch.no_grad():
        model(**images)
        with pytest.raises(LitPruneError, match=r"its videos .* use a method of the decoder"):
            model(**videos)
        vlm.attach(Early([2]), keep="50%")
        model(**videos)


# -- what belongs together ------------------------------------------------------------------------------------------


def begun(runs: list[str], sizes: Sizes | None, **options) -> tuple[list[list[int]], list[int]]:
    """First columns and numbers of images in rows of `x` (visual) and `.` (text)."""
    starts, number = split(torch.tensor([[mark == "x" for mark in row] for row in runs]), sizes, **options)
    return [row.nonzero()[:, 0].tolist() for row in starts], number.tolist()


def test_sizes_that_are_not_the_tokens_leave_runs():
    rows = ["xx.xx.xx", ".xx.xx.."]
    frames = torch.tensor([3, 2])
    assert begun(rows, Sizes(torch.tensor([24, 16]), frames, 2), video=True) == ([[0], [1]], [1, 1])
    assert begun(rows, Sizes(torch.tensor([24, 16]), frames, 2), video=True, apart=True) == (
        [[0, 3, 6], [1, 4]],
        [1, 1],
    )
    assert begun(rows, Sizes(None, frames, 2), video=True) == ([[0], [1]], [1, 1])
    for wrong in (Sizes(torch.tensor([16, 24]), frames, 2), Sizes(torch.tensor([23, 16]), frames, 2), None):
        assert begun(rows, wrong, video=True) == ([[0, 3, 6], [1, 4]], [1, 1])
    doubled = [row for row in rows for _ in range(2)]
    assert begun(doubled, Sizes(torch.tensor([24, 16]), frames, 2), video=True)[1] == [1] * 4


def test_videos_without_a_separator_are_told_apart():
    sizes = Sizes(torch.ones(2, dtype=torch.long), torch.tensor([2, 2]), 1)
    assert begun(["xxxxxxxxxx"], sizes, video=True) == ([[0, 5]], [2])
    assert begun(["xxxxxxxxxx"], sizes, video=True, apart=True) == ([[0, 2, 5, 7]], [2])  # a line break at each end


# -- every class ----------------------------------------------------------------------------------------------------


def test_laws_hold_on_videos_under_the_images_token():
    found = measure("glm4v", videos=True)
    assert (found.verdict, found.error, found.broken) == ("works", None, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_class_prunes_videos_or_is_refused(kind):
    found = measure(kind, videos=True)
    assert found.verdict in ("works", "refused", "library"), (found.error, found.broken)


def test_pixels_without_tokens_are_refused(pruned):
    """Nothing would be pruned, and nobody would know."""
    family = FAMILIES["qwen3-vl"]
    inputs = collate(family, [prompt(family, [Picture(family.video, 9, "video")], 5, 1)])
    vlm = pruned(Early([2]), 24, model=built("qwen3-vl"))
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, 7)
    with pytest.raises(LitPruneError, match="handed videos, and no token"):
        vlm.model(**{**inputs, "input_ids": ids})
