"""What training adds to the paper: watched attention of the teacher, and bounded gradients of the gates."""

import tiny
import torch
from tiny import batch, samples

from lit_prune.host import Record, Session, StageRecord
from lit_prune.ops.selection import clip_gradient
from lit_prune.training.losses import attention_loss


def test_watched_attention_equals_eager(tiny_model, tiny_eager):
    inputs = batch(samples(), "left", answers=3)
    vlm = tiny.attach(tiny_model, tiny.small_rcp(), keep=20, shaken=False)
    record = Record()
    with torch.no_grad(), vlm.using(Session(prune=False, repair=False, record=record, watch=(2, 5))):
        tiny_model(**inputs, use_cache=False)
    vlm.detach()
    visual = inputs["input_ids"] == tiny_model.config.image_token_id
    after = visual.flip(1).long().cumsum(1).flip(1) == 0
    prompt = inputs["attention_mask"].bool() & ((inputs["labels"] != -100).long().cumsum(1) == 0)
    with torch.no_grad():
        matrices = tiny_eager(**inputs, output_attentions=True).attentions
    for layer, watched in record.attention.items():
        for b in range(len(visual)):
            rows = matrices[layer][b].mean(0)[prompt[b] & after[b]].mean(0)
            torch.testing.assert_close(watched[b], rows[visual[b]], atol=1e-6, rtol=1e-4)
    assert sorted(record.attention) == [2, 5]


def test_attention_loss_is_the_closed_form_and_ignores_pruned_tokens():
    watched = torch.tensor([[0.4, 0.2, 0.1, 0.3]])
    scores = torch.tensor([[1.0, 0.0, float("-inf"), -1.0]], requires_grad=True)
    stage = StageRecord(1, scores.isfinite(), scores.isfinite().float(), scores)
    fixed = StageRecord(0, scores.isfinite(), scores.isfinite().float(), scores.detach() * 3)
    student, teacher = Record(stages=[fixed, stage]), Record(attention={6: watched, 7: watched})
    target = torch.tensor([0.4, 0.2, 0.3]).double() ** 2
    target = target / target.sum()
    expected = (target * (target.log() - torch.tensor([1.0, 0.0, -1.0]).double().log_softmax(0))).sum()
    assert abs(attention_loss(student, teacher, 2.0).item() - expected.item()) < 1e-6
    assert attention_loss(Record(stages=[fixed]), teacher, 2.0) == 0, "nothing to train"


def test_clip_gradient_bounds_each_sample_and_keeps_values_and_direction():
    gate = torch.rand(3, 5, requires_grad=True)
    pull = torch.randn(3, 5) * torch.tensor([[1e6], [1.0], [1e-4]])
    clipped = clip_gradient(gate, 0.5)
    assert torch.equal(clipped, gate)
    (clipped * pull).sum().backward()
    norms = gate.grad.norm(dim=1)
    assert (norms <= 0.5 + 1e-6).all()
    assert torch.allclose(gate.grad[2], pull[2])
    assert torch.allclose(torch.nn.functional.cosine_similarity(gate.grad, pull), torch.ones(3))
