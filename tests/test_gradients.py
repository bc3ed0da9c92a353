"""Gradients of soft masks: against finite differences of the multiplicative mask, and of an explicit additive one."""

import pytest
import tiny
import torch
from tiny import VISUAL, Chosen, batch, real_text, samples
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama import modeling_llama

from lit_prune.host import Session
from lit_prune.host.attention import REQUEST, Request, wrap_attention
from lit_prune.ops.selection import straight_through

LAYERS = [2, 4]


@pytest.fixture
def double(monkeypatch):
    """The tiny model in float64 throughout: Llama's norm computes in float32 whatever its input."""

    def norm(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    inputs = batch(samples((48,)))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    weights = torch.randn(1, 48, tiny.VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights *= real_text(inputs)[..., None]
    return inputs, weights


def choice() -> torch.Tensor:
    """Which tokens two stages keep: every second one, then every fourth."""
    places = torch.arange(VISUAL)
    return torch.stack([places % 2 == 0, places % 4 == 0])


def autograd(double, keep):
    """Loss of the hosted soft mask, and its gradient for every gate of both stages."""
    inputs, weights = double
    soft = torch.full(keep.shape, 0.4, requires_grad=True)
    vlm = tiny.attach(tiny.build_model().double(), Chosen(LAYERS, keep, straight_through(keep, soft)), shaken=False)
    with vlm.using(Session(soft=True, repair=False)):
        loss = (vlm.model(**inputs, use_cache=False).logits * weights).sum()
    return loss.item(), torch.autograd.grad(loss, soft)[0]


class Multiplied:
    """Reference: eager attention, its columns multiplied by the masks after the softmax, its rows renormalised."""

    def __init__(self, double, monkeypatch):
        self.inputs, self.weights = double
        self.model = tiny.build_model("eager").double()
        self.image = (self.inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", self.attention)

    def attention(self, module, query, key, value, attention_mask, scaling, **kwargs):
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = (query @ key.mT * scaling).masked_fill(~causal, float("-inf")).softmax(-1)
        for layer, mask in zip(LAYERS, self.masks, strict=True):
            if module.layer_idx >= layer:
                weights = weights * torch.ones(length, dtype=torch.float64).scatter(0, self.image, mask)
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def loss(self, masks: torch.Tensor) -> float:
        self.masks = masks
        with torch.no_grad():
            return (self.model(**self.inputs).logits * self.weights).sum().item()

    def slope(self, masks: torch.Tensor, stage: int, token: int, step: float = 1e-7) -> float:
        """Two-sided where a token is kept, one-sided where it is not: a mask can't be negative."""
        up, down = masks.clone(), masks.clone()
        up[stage, token] += step
        down[stage, token] -= step * masks[stage, token]
        return (self.loss(up) - self.loss(down)) / float(up[stage, token] - down[stage, token])


def test_soft_mask_has_the_gradient_of_the_multiplicative_mask(double, monkeypatch):
    """A later stage doesn't judge a token that is gone: its gradient is that of putting it back for good."""
    keep = choice()
    value, gradient = autograd(double, keep)
    reference = Multiplied(double, monkeypatch)
    masks = torch.stack([keep[0], keep[1] | ~keep[0]]).double()
    assert value == pytest.approx(reference.loss(masks), rel=1e-6)
    tokens = [0, 4, 20, 1, 2, 7, 18, 35]  # kept by both stages, dropped by the first, dropped by the second
    assert any(not keep[0, t] for t in tokens)
    assert any(keep[0, t] and not keep[1, t] for t in tokens)
    for stage, judged in enumerate((tokens, [t for t in tokens if keep[0, t]])):
        slopes = torch.tensor([reference.slope(masks, stage, t) for t in judged], dtype=torch.float64)
        torch.testing.assert_close(gradient[stage, judged].double(), slopes, rtol=1e-4, atol=1e-4)
        assert slopes.abs().min() > 1e-2


def test_a_token_dropped_before_has_no_gradient_at_a_later_stage(double):
    keep = choice()
    _, gradient = autograd(double, keep)
    assert gradient[0].abs().min() > 0, "kept and dropped tokens of the first stage all have one"
    assert (gradient[1, ~keep[0]] == 0).all()


@pytest.mark.parametrize("heads", [4, 2])
def test_extra_channel_carries_a_bias_as_an_additive_mask_does(heads):
    wrap_attention()
    attention = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = draw(2, 4, 9, 16), draw(2, heads, 9, 16), draw(2, heads, 9, 16)
    bias, weights = draw(2, 9), draw(2, 9, 4, 16).detach()
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, True

    carried, _ = attention(module, query, key, value, None, **{REQUEST: Request(bias)}, scaling=0.3)
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1) + bias[:, None, None]
    plain = scaled_dot_product_attention(
        query, key.repeat_interleave(4 // heads, 1), value.repeat_interleave(4 // heads, 1), mask, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(carried, plain, rtol=0, atol=1e-12)
    leaves = (query, key, value, bias)
    for one, other in zip(
        torch.autograd.grad((carried * weights).sum(), leaves),
        torch.autograd.grad((plain * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_dropping_passes_gradients_to_kept_tokens_only():
    """Cheaper than soft masks: what was dropped can't teach."""
    keep = choice()
    soft = torch.full(keep.shape, 0.4, requires_grad=True)
    vlm = tiny.attach(tiny.build_model(), Chosen(LAYERS, keep, straight_through(keep, soft)), shaken=False)
    logits = vlm.model(**batch(samples((48,))), use_cache=False).logits
    gradient = torch.autograd.grad(logits[0, -1].square().sum(), soft)[0]
    assert (gradient[keep] != 0).all()
    assert (gradient[~keep] == 0).all()


def test_gradients_survive_activation_checkpointing():
    """Layers are replayed in backward, after the session has ended."""
    keep = choice()

    def run(checkpointing: bool) -> torch.Tensor:
        model = tiny.build_model()
        soft = torch.full(keep.shape, 0.4, requires_grad=True)
        vlm = tiny.attach(model, Chosen(LAYERS, keep, straight_through(keep, soft)), shaken=False)
        if checkpointing:
            model.gradient_checkpointing_enable()
            for layer in model.get_decoder().layers:
                layer.train()
        with vlm.using(Session(soft=True)):
            logits = model(**batch(samples((48,))), use_cache=False).logits
        return torch.autograd.grad(logits[0, -1].square().sum(), soft)[0]

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("pruner", ["divprune", "visionzip", "dcp", "fastv", "sparsevlm"])
def test_stages_run_once_under_activation_checkpointing(pruner):
    """Also those in the tower, whose layers are run again in backward too, by the library's own switch."""

    def run(checkpointing: bool) -> torch.Tensor:
        vlm = tiny.attach(tiny.build_model(), tiny.ROOT / "configs" / "pruners" / f"{pruner}.yaml")
        inputs = batch(samples((48, 40)))
        inputs["pixel_values"].requires_grad_()
        if checkpointing:
            vlm.model.gradient_checkpointing_enable()
            vlm.model.train()
        logits = vlm.model(**inputs, use_cache=False).logits
        return torch.autograd.grad(logits.square().sum(), inputs["pixel_values"])[0]

    assert torch.equal(run(True), run(False))
    assert run(False).abs().sum() > 0
