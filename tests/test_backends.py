"""Attention backends other than sdpa give the same numbers, and no stage holds a matrix of all tokens by all tokens.

Flex attention runs here by PyTorch's own operator without the compiler, since compiling for a CPU takes a minute; the
compiled prefill is a slow test. On a CPU its compiled decoding kernel does not build in PyTorch 2.13, for the plain
model neither, so decoding is compared without the compiler. Flash attention runs through all of the library's Python
code, with a reference in the place of its two CUDA kernels; tests marked `gpu` run the real ones where installed.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from lit_prune.host import Session
from lit_prune.pruners.base import Pruner
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM, plugin_from_yaml

METHODS = ["rcp", "fastv"]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def make(name: str) -> tuple[Pruner, RepairAdapter]:
    """RCP in three stages, or FastV, which reads the attention of the layer before; both with repair."""
    if name == "rcp":
        return tiny.small_rcp(), tiny.small_repair()
    pruner = plugin_from_yaml(tiny.ROOT / "configs" / "pruners" / f"{name}.yaml").pruner
    return pruner, RepairAdapter([6], [0], bottleneck=16, condition=8, code=4)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def flex() -> nn.Module:
    return tiny.build_model("flex_attention")


@pytest.fixture
def flash_model(monkeypatch) -> nn.Module:
    """The tiny model on flash attention, its kernels replaced by `dense` and `ragged`."""
    pieces = (dense, ragged, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: pieces)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = tiny.build_model()
    model.config._attn_implementation = "flash_attention_2"
    yield model
    flash._loaded_implementation = None  # else a later user would get these kernels


def dense(q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False) -> Tensor:
    """What `flash_attn_func` computes: (batch, seq, heads, head), causal from the lower right corner."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = mask.tril(k.shape[2] - q.shape[2]) if causal else mask
    return scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def ragged(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
) -> Tensor:
    """What `flash_attn_varlen_func` computes: samples one behind the other, without padding."""
    parts = []
    for row in range(len(cu_seqlens_q) - 1):
        asked, seen = slice(*cu_seqlens_q[row : row + 2].tolist()), slice(*cu_seqlens_k[row : row + 2].tolist())
        parts.append(dense(q[None, asked], k[None, seen], v[None, seen], **options)[0])
    return torch.cat(parts)


# -- the same numbers as sdpa ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
@pytest.mark.parametrize("method", METHODS)
def test_flex_attention_equals_sdpa(tiny_model, pruned, flex, uncompiled, method, soft):
    """A padded batch. Soft masks bring head dimensions that are no power of two."""
    inputs = tiny.batch(tiny.samples())
    text = tiny.real_text(inputs)
    pruner, repair = make(method)
    expected = tiny.forward(pruned(pruner, repair=repair), inputs, soft=soft)[0]
    vlm = pruned(pruner, repair=repair, model=flex, shaken=False)
    found = tiny.forward(vlm, inputs, soft=soft)[0]
    assert tiny.gap(found[text], expected[text]) <= tiny.TOLERANCE


def test_flex_attention_takes_its_own_mask_after_a_stage(flex, pruned, uncompiled, monkeypatch):
    """So that the test above is about flex attention."""
    kinds = Counter()
    real = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def spy(module, query, key, value, mask, **options):
        kinds[type(mask), query.shape[2]] += 1
        return real(module, query, key, value, mask, **options)

    vlm = pruned(tiny.small_rcp(), repair=tiny.small_repair(), model=flex)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", spy)
    tiny.forward(vlm, tiny.batch(tiny.samples()))
    decoder = {length for kind, length in kinds if kind is BlockMask}
    assert len(decoder) == 4, "the prompt's length, and one behind each stage"


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["dyn", "static"]
)
@pytest.mark.parametrize("method", METHODS)
def test_flex_attention_generates_the_same(pruned, flex, uncompiled, method, cache):
    inputs = tiny.batch(tiny.samples())
    try:
        flex.generate(**inputs, max_new_tokens=2, **cache)
    except AttributeError as error:
        pytest.skip(f"the plain model can't either, on transformers 5.23 and before: {error}")
    pruner, repair = make(method)
    expected = tiny.generate(pruned(pruner, repair=repair), inputs, 4)
    found = tiny.generate(pruned(pruner, repair=repair, model=flex, shaken=False), inputs, 4, **cache)
    assert torch.equal(found.sequences, expected.sequences)
    assert tiny.gap(found.logits, expected.logits) <= tiny.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
def test_compiled_flex_attention_prefill_equals_sdpa(pruned, flex, soft):
    inputs = tiny.batch(tiny.samples())
    text = tiny.real_text(inputs)
    pruner, repair = make("fastv")
    expected = tiny.forward(pruned(pruner, repair=repair), inputs, soft=soft)[0]
    found = tiny.forward(pruned(pruner, repair=repair, model=flex, shaken=False), inputs, soft=soft)[0]
    assert tiny.gap(found[text], expected[text]) <= tiny.TOLERANCE


@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_flash_attention_equals_sdpa(pruned, flash_model, method, side, soft):
    inputs = tiny.batch(tiny.samples(), side)
    text = tiny.real_text(inputs)
    pruner, repair = make(method)
    expected = tiny.forward(pruned(pruner, repair=repair), inputs, soft=soft)[0]
    found = tiny.forward(pruned(pruner, repair=repair, model=flash_model, shaken=False), inputs, soft=soft)[0]
    assert tiny.gap(found[text], expected[text]) <= tiny.TOLERANCE


@pytest.mark.parametrize("padding", [0, 7], ids=["", "every row padded"])
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "left-padded"])
@pytest.mark.parametrize("method", METHODS)
def test_flash_attention_generates_the_same(pruned, flash_model, method, count, padding):
    inputs = tiny.padded(tiny.batch(tiny.samples()[:count]), padding)
    pruner, repair = make(method)
    expected = tiny.generate(pruned(pruner, repair=repair), inputs)
    found = tiny.generate(pruned(pruner, repair=repair, model=flash_model, shaken=False), inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert tiny.gap(found.logits, expected.logits) <= tiny.TOLERANCE


@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
def test_flash_attention_trains_without_a_cache(pruned, flash_model, soft):
    """The position ids that training passes have gaps behind a stage, and must not be read as packed sequences."""
    inputs = tiny.batch(tiny.samples((50,)), answers=4)
    pruner, repair = tiny.small_rcp(), tiny.small_repair()
    expected = gradient(pruned(pruner, repair=repair), inputs, soft)
    found = gradient(pruned(pruner, repair=repair, model=flash_model, shaken=False), inputs, soft)
    assert expected.abs().max() > 0
    assert tiny.gap(found, expected) <= 1e-3 * expected.abs().max()


def gradient(vlm: VLM, inputs: dict[str, Tensor], soft: bool) -> Tensor:
    """Of the plug-in, by the answers' cross entropy."""
    vlm.plugin.zero_grad()
    with vlm.using(Session(soft=soft)):
        vlm.model(**inputs, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in vlm.plugin.parameters() if p.grad is not None])


@pytest.mark.parametrize("padding", [0, 7], ids=["", "every row padded"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_prompts_of_one_length_behind_padding(pruned, flex, uncompiled, backend, padding):
    """Nothing is padded after the first stage, so its layers need no mask in decoding; those before it do."""
    model = flex if backend == "flex_attention" else tiny.build_model(backend)
    pruner = tiny.small_rcp() if backend != "eager" else tiny.Chosen([2, 4], torch.arange(72).view(2, 36) % 3 == 0)
    inputs = tiny.batch(tiny.samples((47, 47)))
    vlm = pruned(pruner, repair=tiny.small_repair() if backend != "eager" else None, model=model)
    expected = tiny.generate(vlm, inputs, 4)
    found = tiny.generate(vlm, tiny.padded(inputs, padding), 4)
    assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
    assert tiny.gap(found.logits, expected.logits) <= tiny.TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_real_kernels_agree_with_sdpa(backend, soft):
    """In bfloat16 at an ordinary head size of 32."""
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash_attn is not installed")
    inputs = {name: part.cuda() for name, part in tiny.batch(tiny.samples()).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    text, logits, plugin = tiny.real_text(inputs), [], None
    for attention in ("sdpa", backend):
        model = tiny.build_model(width=128).bfloat16().cuda()
        model.config._attn_implementation = attention
        keep = torch.rand(1, 3, tiny.VISUAL, generator=torch.Generator().manual_seed(1)).cuda() > 0.6
        vlm = tiny.attach(model, tiny.Chosen([3], keep), repair=plugin and plugin.repair, shaken=plugin is None)
        plugin = plugin or vlm.plugin
        logits.append(tiny.forward(vlm, inputs, soft=soft)[0].float())
        vlm.detach()
    assert (logits[0] - logits[1])[text].abs().mean() < 0.05 * logits[0][text].std()


# -- no matrix of all tokens by all tokens --------------------------------------------------------------------------
class Sizes(TorchDispatchMode):
    """Operators whose result has at least `least` elements of its own, views left out."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for part in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(part, Tensor) and part.untyped_storage().nbytes() // part.element_size() >= self.least:
                self.found[func.overloadpacket.__name__, tuple(part.shape)] += 1
        return output


# The method itself compares every visual token with every other, once, without heads.
PAIRWISE = {"scope"}
GRID = 24  # patches a side: 576 visual tokens, as LLaVA-1.5 has


@pytest.fixture(scope="module")
def long_model() -> nn.Module:
    return tiny.build_model(grid=GRID)


@pytest.mark.parametrize("soft", [False, True], ids=["drop", "soft"])
@pytest.mark.parametrize("path", tiny.PRUNERS, ids=lambda path: path.stem)
def test_no_stage_holds_a_matrix_of_all_tokens_by_all_tokens(pruned, long_model, path, soft):
    visual = GRID**2
    ids = torch.randint(2, 50, (1, visual + 16))
    ids[:, 2 : 2 + visual] = tiny.IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 4 * GRID, 4 * GRID)}
    vlm = pruned(path, keep=192, model=long_model)
    hints = {"regions": torch.rand(1, 2, visual)}
    with Sizes(visual**2) as sizes:
        tiny.forward(vlm, inputs, soft=soft, hints=hints)
    assert all(path.stem in PAIRWISE and sorted(shape) == [1, visual, visual] for _, shape in sizes.found)


def test_eager_attention_does_hold_one():
    """So that the test above could fail."""
    with torch.no_grad(), Sizes(tiny.VISUAL**2) as sizes:
        tiny.build_model("eager")(**tiny.batch(tiny.samples((45,))))
    assert any(shape[-2:] == (45, 45) for _, shape in sizes.found)
