"""Stages inside the vision towers of all kinds: packed, windowed, merged, padded, masked by blocks, with deepstack.

Tiny models of the real classes. A kind has a class in the default suite, the others are marked slow.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from test_cost import counter
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.host.towers.find import vision_tower
from lit_prune.host.zoo.inputs import Prompts, prompts
from lit_prune.host.zoo.shrink import listed, tiny_model
from lit_prune.ops import selection
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.downsample import Downsample
from lit_prune.pruners.prumerge import PruMergePlus
from lit_prune.pruners.scope import Scope
from lit_prune.pruners.tome import ToMe
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.vlm import VLM

KINDS = {  # of each kind the first runs by default
    "packed": ["qwen2_vl", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "kimi_k25", "paddleocr_vl", "qwen3_5"],
    "packed, more": ["cosmos3_edge", "ernie4_5_vl_moe", "glm5_next", "minimax_m3_vl", "qwen3_5_moe", "qwen4_exp"],
    "packed, shuffled": ["muse_spark", "muse_glimmer", "dots3_note"],
    "windows": ["qwen2_5_vl", "qwen2_5_omni_thinker", "exaone4_5", "hyperclovax_vision_v2"],
    "deepstack": ["qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "cohere_compass"],
    "one patch, one token": ["deepseek_vl", "janus", "llava", "paligemma", "video_llava", "vipllava"],
    "crops": ["llava_onevision", "llava_next", "llava_next_video"],
    "merged": ["idefics3", "aya_vision", "cohere2_vision", "gemma3", "shieldgemma2", "smolvlm"],
    "without a mask": ["internvl", "qianfan_ocr"],
    "padded": ["lfm2_vl"],
    "masked by blocks": ["mistral3", "lighton_ocr", "mistral_large4"],
    "line breaks": ["hy_v4_vl", "hunyuan_vl"],
}
SLOW = {"packed, more", "packed, shuffled"}  # kinds of which another has the first
BREAKS = {"hunyuan_vl"}  # a batch of the plain model differs from its samples alone
CLASSES = [
    pytest.param(name, marks=[pytest.mark.slow] * (place > 0 or kind in SLOW))
    for kind, names in KINDS.items()
    for place, name in enumerate(names)
]


class Norms(VisionPruner):
    """Keeps the units with the largest states, and notes what it is shown."""

    needs_values = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[VisionContext] = []

    def prune_vision(self, context: VisionContext) -> Kept:
        self.seen.append(context)
        return Kept(selection.top_k(context.states.norm(dim=-1), context.alive, context.count))


@lru_cache(maxsize=2)
def made(kind: str) -> tuple[nn.Module, Prompts]:
    model = tiny_model(kind)
    for name, weights in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # zeros at first, which would look like dropped patches
            nn.init.normal_(weights, std=0.2)
    return model, prompts(kind, model)


def logits(vlm: VLM, inputs: dict[str, Tensor], **session: Any) -> Tensor:
    with torch.no_grad(), nullcontext() if vlm.host is None else vlm.using(Session(**session)):
        return vlm.model(**inputs).logits


@pytest.mark.parametrize("kind", CLASSES)
def test_laws(kind):
    """All kept is the plain model bit for bit; a batch equals its samples alone; tokens leave; nothing stays behind."""
    model, given = made(kind)
    vlm, batch = VLM(model, None), given.batch()
    text = given.text(batch)
    plain = logits(vlm, batch)
    vlm.attach(Norms([1, -1], [1.5, 1.0]), keep="100%")
    assert torch.equal(logits(vlm, batch), plain)
    vlm.attach(Norms([1, -1], [1.5, 1.0]), keep="50%")
    record = Record()
    pruned = logits(vlm, batch, record=record)
    assert (pruned - plain)[text].abs().max() > 1e-3
    ran = record.trace.tower
    assert sum(layer.sum() for layer in ran.tokens[1:]) < 0.85 * ran.tokens[0].sum() * (len(ran.tokens) - 1)
    assert (record.trace.average_visual() < record.trace.total_visual).all()
    for row in range(3 * (kind not in BREAKS)):
        alone = given.batch([row])
        real = given.text(alone)[0]
        assert (logits(vlm, alone)[0][real] - pruned[row][text[row]]).abs().max() < 1e-3
    vlm.detach()
    assert torch.equal(logits(vlm, batch), plain)


@pytest.mark.parametrize("kind", CLASSES)
def test_dropping_is_masking(kind, monkeypatch):
    """Rows that stay are what the plain tower makes of them if nobody attends to the others."""
    model, given = made(kind)
    vlm, batch, found = VLM(model, None), given.batch(), []
    _, layers = vision_tower(model, find(model).decoder)

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        state = None if vlm.host is None else vlm.host.tower.current
        found.append(
            (output[0] if isinstance(output, tuple) else output, state and (state.columns, state.there, state.extent))
        )

    handles = [layers[-1].register_forward_hook(note)]  # in front of the host's
    vlm.attach(Norms([1]), keep="50%")
    with torch.no_grad():
        model(**batch)
    vlm.detach()
    left, (columns, there, shape) = found.pop()
    hiding = Hiding(torch.ones(shape, dtype=torch.bool).scatter(1, columns, ~there))
    handles += [
        layer.register_forward_pre_hook(hiding.begin if index else hiding.end) for index, layer in enumerate(layers)
    ]
    handles += [layer.register_forward_hook(hiding.end) for layer in layers]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", hiding.attend)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    whole = found.pop()[0].reshape(*shape, -1)
    kept = whole.gather(1, columns[..., None].expand(-1, -1, whole.shape[-1]))
    assert (left.reshape(kept.shape) - kept)[there].abs().max() < 1e-4


class Hiding:
    """SDPA that hides keys (samples, rows) in some layers, chunk by chunk as a tower calls it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden, self.at, self.active = hidden, 0, False
        self.plain = nn.functional.scaled_dot_product_attention

    def begin(self, *_: Any) -> None:
        self.at, self.active = 0, True

    def end(self, *_: Any) -> None:
        self.active = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any):
        if not self.active:
            return self.plain(query, key, value, attn_mask=attn_mask, **options)
        keys = self.hidden[:, self.at : self.at + key.shape[2]]
        self.at += key.shape[2]
        bias = torch.zeros(len(keys), 1, query.shape[2], key.shape[2]).masked_fill(keys[:, None, None], -1e9)
        if attn_mask is not None:
            bias = bias + (torch.where(attn_mask, 0.0, -1e9) if attn_mask.dtype == torch.bool else attn_mask)
        return self.plain(query, key, value, attn_mask=bias, **{**options, "is_causal": False})


@pytest.mark.parametrize("kind", CLASSES)
def test_flops_that_are_counted_ran(kind):
    """Matrices and attention of every layer of the tower, by the lengths and pairs of the trace."""
    model, given = made(kind)
    vlm, record = VLM(model, None).attach(Norms([1]), keep="50%"), Record()
    batch = given.batch([0] if kind in KINDS["padded"] else [0, 1, 2])  # padding is not counted
    tower = vlm.host.tower.tower
    names = {module: name for name, module in model.named_modules()}
    with counter() as counts, torch.no_grad(), vlm.using(Session(record=record)):
        model(**batch)
    vlm.detach()
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.get_flop_counts().items()}
    ran = record.trace.tower
    pairs = [layer.square() for layer in ran.tokens] if ran.pairs is None else ran.pairs
    for index, layer in enumerate(tower.layers):
        inner = sum(flops.get(names[part], 0) for part in layer.children())
        linears = [part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear)]
        width = next(part.weight.shape[1] for part in layer.modules() if isinstance(part, nn.Linear))
        counted = 2 * int(ran.tokens[index].sum()) * sum(linears) + 4 * int(pairs[index].sum()) * width
        assert counted == inner, index


UNSUITED = {
    "gemma4": "the place of each patch",
    "granite_docling": "adds positions behind",
    "idefics2": "mixes patches behind .* Idefics2PerceiverLayer",
    "nemotron_h_omni": "class tokens between",
    "ovis2": "makes visual words",
    "step3p7": "windows overlap",
    "video_llama_3": "size that comes with each image",
}


@pytest.mark.parametrize("kind", UNSUITED)
def test_a_tower_that_cannot_be_pruned_is_refused_when_a_method_attaches(kind):
    if kind not in listed():
        pytest.skip(f"this version of transformers has no {kind}")
    with pytest.raises(LitPruneError, match=f"{UNSUITED[kind]}.*use a method of the decoder"):
        VLM(tiny_model(kind), None).attach(VisionZip(), keep="50%")


METHODS = {
    "visionzip": VisionZip,
    "scope": Scope,
    "prumerge": lambda: PruMergePlus(neighbours=2),
    "dcp": lambda: DCPPrune([1, -1], [1.5, 1.0], None),
    "tome": ToMe,
    "downsample": Downsample,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for names in KINDS.values() for name in names])
def test_every_method(kind):
    """Kept all: the plain model; half: another answer, alone as in a batch. Or one sentence when it attaches."""
    model, given = made(kind)
    vlm, batch = VLM(model, None), given.batch()
    plain, text, single = logits(vlm, batch), given.text(batch), given.batch([0, 2])
    whole = logits(vlm, single)
    for name, method in METHODS.items():
        try:
            vlm.attach(method(), keep="50%")
        except LitPruneError:
            assert name in ("tome", "downsample")
            continue
        pruned = logits(vlm, batch)
        assert pruned[text].isfinite().all(), name
        assert (pruned - plain)[text].abs().max() > 1e-4, name
        for row in range(3 * (kind not in BREAKS)):
            alone = given.batch([row])
            gap = logits(vlm, alone)[0][given.text(alone)[0]] - pruned[row][text[row]]
            assert gap.abs().max() < 1e-3, name
        vlm.attach(method(), keep="100%")  # where all images are alike, of one image
        assert torch.equal(logits(vlm, single), whole), name
    vlm.detach()
