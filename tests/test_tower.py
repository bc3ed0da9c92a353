"""Stages inside the vision tower: against a tower walked by hand, on LLaVA-1.5 and LLaVA-NeXT."""

import threading

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)

from lit_prune.errors import LitPruneError
from lit_prune.evaluation import measuring
from lit_prune.host import Record, Session
from lit_prune.host.towers.find import tower
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.vlm import VLM

SIDE, PATCHES = 6, tiny.VISUAL


class Norms(VisionPruner):
    """Keeps the patches with the largest states; `uneven` takes one away from every second tile."""

    needs_values = True

    def __init__(self, *args, uneven: bool = False, **options) -> None:
        super().__init__(*args, **options)
        self.uneven, self.seen = uneven, []

    def prune_vision(self, context: VisionContext) -> Kept:
        self.seen.append(context)
        order = context.states.norm(dim=-1).masked_fill(~context.alive, -1).argsort(dim=1, descending=True)
        count = context.count - (torch.arange(len(context.count)) % 2 if self.uneven else 0)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        return Kept((rank < count[:, None]) & context.alive)


def pixels(count: int = 3, size: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixel_values=images, return_dict=True).pooler_output))


def walked(model: nn.Module, image: torch.Tensor, cuts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One image through the tower by hand: which patches stay, and what the projector makes of them."""
    inside = model.model.vision_tower
    with torch.no_grad():
        states = inside.pre_layrnorm(inside.embeddings(image[None]))
        place = torch.arange(PATCHES)
        for index in range(len(inside.encoder.layers) + 1):
            if index in cuts:
                best = states[0, 1:].norm(dim=-1).argsort(descending=True)[: cuts[index]].sort().values
                states, place = torch.cat([states[:, :1], states[:, 1:][:, best]], 1), place[best]
            if index < len(inside.encoder.layers):
                states = inside.encoder.layers[index](states, None)
        return place, model.model.multi_modal_projector(states[:, 1:])[0]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("layers", "ratios"), [([1], [1.0]), ([-1], [1.0]), ([0, 1, -1], [2.0, 1.5, 1.0])])
def test_stages_equal_a_tower_walked_by_hand(tiny_model, pruned, layers, ratios, uneven):
    """Patches that left are rows of zeros; the others are as if the rest had never been there."""
    vlm = pruned(Norms(layers, ratios, uneven=uneven), keep=10)
    schedule = vlm.host.tower.schedule
    assert list(schedule.values()) == [round(10 * part) for part in ratios]
    found = features(tiny_model, pixels())
    for row, image in enumerate(pixels()):
        place, expected = walked(tiny_model, image, {at: n - row % 2 * uneven for at, n in schedule.items()})
        assert (found[row] != 0).any(-1).nonzero()[:, 0].tolist() == place.tolist()
        assert tiny.gap(found[row, place], expected) < 1e-5


def test_a_teachers_session_sees_every_patch(tiny_model, pruned):
    plain = features(tiny_model, pixels())
    vlm = pruned(Norms([1]), keep=10)
    with vlm.using(measuring.TEACHER):
        assert torch.equal(features(tiny_model, pixels()), plain)
    assert not torch.equal(features(tiny_model, pixels()), plain)


def test_context_holds_what_the_layer_before_computed(tiny_model, pruned):
    """Keys, values and class attention against the layer's own projections."""
    pruner = Norms([1, -1], [2.0, 1.0])
    pruned(pruner, keep=8)
    features(tiny_model, pixels(1))
    attention = tiny_model.model.vision_tower.encoder.layers
    first, last = pruner.seen
    with torch.no_grad():
        inside = tiny_model.model.vision_tower
        states = inside.pre_layrnorm(inside.embeddings(pixels(1)))
        for index, context in ((0, first), (1, last)):
            normed = attention[index].layer_norm1(states)
            own = attention[index].self_attn
            query, key, value = own.q_proj(normed), own.k_proj(normed), own.v_proj(normed)
            split = [part.view(1, -1, 2, 16).transpose(1, 2) for part in (query, key)]
            rows = (split[0] @ split[1].transpose(2, 3) * 0.25).softmax(-1).mean(1)
            assert tiny.gap(context.keys, key[:, 1:]) < 1e-5
            assert tiny.gap(context.values, value[:, 1:]) < 1e-5
            assert tiny.gap(context.attention, rows[:, 0, 1:]) < 1e-6
            states = attention[index](states, None)
            best = states[0, 1:].norm(dim=-1).argsort(descending=True)[:16].sort().values
            states = torch.cat([states[:, :1], states[:, 1:][:, best]], 1)


def test_record_has_the_lengths_that_ran(tiny_model, pruned):
    vlm = pruned(Norms([1, -1], [2.0, 1.0]), keep=8)
    record = Record()
    with torch.no_grad(), vlm.using(Session(record=record)):
        tiny_model(**tiny.batch(tiny.samples()))
    tower = record.trace.tower
    assert [layer.tolist() for layer in tower.tokens] == [[37] * 3, [17] * 3]
    assert tower.projected.tolist() == [8] * 3
    assert tower.scored.tolist() == [2 * (37 + 17)] * 3
    assert record.trace.average_visual().tolist() == [8] * 3
    assert record.stages[0].kept.sum(1).tolist() == [8] * 3


class Shrunk(VisionPruner):
    """Only scales the image down."""

    def vision_schedule(self, keep, visual, depth):
        return {}

    def image_side(self, keep, side):
        return int(keep**0.5)


def test_smaller_image(tiny_model, pruned):
    """A 4 x 4 grid on nearest places of the 6 x 6 one, as the tower sees a 16-pixel image."""
    vlm = pruned(Shrunk(), keep=16)
    found = features(tiny_model, pixels())
    places = (found != 0).any(-1)
    assert places.sum(1).tolist() == [16] * 3
    small = torch.nn.functional.interpolate(pixels(), (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad(), vlm.using(measuring.TEACHER):
        inside = tiny_model.model.vision_tower
        out = inside(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
        expected = tiny_model.model.multi_modal_projector(out[:, 1:])
    assert tiny.gap(found[places].view(3, 16, -1), expected) < 1e-5
    _, record = tiny.forward(vlm, tiny.batch(tiny.samples()))
    assert record.trace.average_visual().tolist() == [16] * 3


def next_model(vision) -> nn.Module:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tiny.VOCABULARY, initializer_range=0.2, pad_token_id=tiny.PAD, eos_token_id=None,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if isinstance(vision, CLIPVisionConfig) else "full",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    return LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
SIZES["patch_size"] = 4
TOWERS = {"clip": CLIPVisionConfig(**SIZES), "siglip": SiglipVisionConfig(**SIZES, vision_use_head=False)}


def next_inputs(model: nn.Module, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Crops, sizes and prompts as the processor makes them: an image token per feature, left padding."""
    crops = torch.randn(len(sizes), 5, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    image_sizes = torch.tensor(sizes)
    with torch.no_grad():
        packed = model.get_image_features(pixel_values=crops, image_sizes=image_sizes, return_dict=True).pooler_output
    rows = [[2, 3] + [tiny.IMAGE] * len(part) + [5, 6, 7 + row] for row, part in enumerate(packed)]
    width = max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != tiny.PAD).long(),
        "pixel_values": crops,
        "image_sizes": image_sizes,
    }


@pytest.mark.parametrize("kind", TOWERS)
def test_crops_of_llava_next_are_pruned_one_by_one(kind):
    """Each tile keeps its share, line breaks go, a batch of unlike images equals the images alone."""
    model = next_model(TOWERS[kind])
    inputs = next_inputs(model, [(48, 48), (20, 44), (48, 30)])
    with torch.no_grad():
        plain = model(**inputs).logits
    vlm = VLM(model, None, "next").attach(Norms([1]), keep=20)
    together, record = tiny.forward(vlm, inputs)
    kept = record.stages[0].kept.sum(1)
    assert 0 < kept.max() <= 20
    assert len(set(kept.tolist())) > 1
    assert tiny.gap(together[:, -1], plain[:, -1]) > 0.1
    for row in range(3):
        valid = inputs["attention_mask"][row].bool()
        single = {name: part[row : row + 1] for name, part in inputs.items() if name in ("pixel_values", "image_sizes")}
        single |= {name: inputs[name][row : row + 1, valid] for name in ("input_ids", "attention_mask")}
        alone, _ = tiny.forward(vlm, single)
        assert tiny.gap(alone[0, -3:], together[row, -3:]) < tiny.TOLERANCE
    vlm.detach()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
    assert not model.model.vision_tower._forward_pre_hooks


def test_keep_all_of_llava_next_is_the_plain_model():
    model = next_model(TOWERS["clip"])
    inputs = next_inputs(model, [(48, 48), (48, 47)])
    with torch.no_grad():
        plain = model(**inputs).logits
    vlm = VLM(model, None, "next").attach(Norms([1]), keep=176)  # 36 of 36 for each of five tiles
    assert torch.equal(tiny.forward(vlm, inputs)[0], plain)


def test_a_tower_without_attention_is_refused():
    model = tiny.build_model()
    model.model.vision_tower.encoder.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)) for _ in range(2)])
    with pytest.raises(LitPruneError, match="inside the tower"):
        tower(model, model.get_decoder())


def test_a_decision_of_the_decoder_is_not_ignored():
    """In version 0.1 a method of the tower could override `prune`; today that is its `arrival`."""
    with pytest.raises(LitPruneError, match=r"Old\.prune.*`arrival`"):
        type("Old", (VisionPruner,), {"prune": lambda self, context: Kept(context.alive)})()


def test_requests_in_several_threads_keep_their_own_pass(tiny_model, pruned):
    """Each request's features are those of it alone, also where another enters the tower in between."""
    vlm = pruned(VisionZip(), keep=9)
    images = [pixels(1, 24) * (number + 1) for number in range(2)]
    alone = [features(tiny_model, image) for image in images]
    turns, found = threading.Barrier(2, timeout=60), [None, None]
    inside = tiny_model.model.vision_tower.encoder.layers[0]

    def meet(*_) -> None:
        turns.wait()  # both are in the tower now

    handle = inside.register_forward_hook(meet)

    def ask(number: int) -> None:
        found[number] = features(tiny_model, images[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        handle.remove()
    assert vlm.host.tower is not None
    for number in range(2):
        assert found[number] is not None
        assert torch.equal(found[number], alone[number])
