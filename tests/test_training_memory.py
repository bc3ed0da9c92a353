"""What a training step keeps: activation checkpointing, and no mask of seq x seq in any layer."""

from contextlib import nullcontext
from functools import partial

import pytest
import tiny
import torch
from tiny import batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.timing import peak_bytes
from lit_prune.host import Prefix, Record, Session
from lit_prune.host.checkpointing import checkpointed, prepare
from lit_prune.host.state import FORWARD

GRID = 12
LENGTHS = (160, 150)
KEPT = {"soft": True, "backward": "kept"}
MODES = [{"soft": True}, KEPT, {"soft": True, "contenders": 2.0}, {"soft": False}]
CPU = torch.device("cpu")


class Squares(TorchDispatchMode):
    """Notes every operator that makes a float tensor of (batch, 1 or heads, n, n), whatever n then is, above 20."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.is_floating_point() and made.ndim == 4:
                self.found += [str(func)] * (made.shape[-1] == made.shape[-2] > 20)
        return out


def inputs() -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, padded on the left, with images of 144 tokens and answers of 3."""
    draw, prompts = torch.Generator().manual_seed(1), []
    for length in LENGTHS:
        ids = torch.randint(2, 50, (length,), generator=draw)
        ids[2 : 2 + GRID**2] = tiny.IMAGE
        prompts.append((ids, torch.randn(3, 4 * GRID, 4 * GRID, generator=draw)))
    return batch(prompts, answers=3)


def attach(model=None):
    vlm = tiny.attach(model or tiny.build_model(grid=GRID), tiny.small_rcp(), 48, tiny.small_repair())
    vlm.plugin.train()
    return vlm


def teach(vlm) -> tuple[dict, Prefix]:
    """A batch with its images encoded, and what the teacher leaves."""
    encoded, prefix = vlm.encode_images(inputs()), Prefix(vlm.host.shared)
    with torch.no_grad(), vlm.using(Session(False, False, prefix=prefix)):
        vlm.model(**encoded, use_cache=False)
    return encoded, prefix


def gradients(vlm, encoded: dict, prefix: Prefix, again: bool = False, **mode) -> list[torch.Tensor]:
    """The student's loss with respect to the plug-in; backward runs behind the session. `again`: checkpointed."""
    torch.manual_seed(1)
    session = Session(record=Record(), prefix=prefix, answers_only=True, **mode)
    with vlm.using(session), checkpointed(vlm.model, 1) if again else nullcontext():
        logits = vlm.model(**encoded, use_cache=False).logits
    return torch.autograd.grad(logits.square().sum(), list(vlm.plugin.parameters()))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_layer_of_the_student_holds_a_square(mode):
    """Padding, masks and their gradients travel as a bias per key."""
    vlm = attach()
    taught = teach(vlm)
    with Squares() as squares:
        found = gradients(vlm, *taught, **mode)
    names = [name for name, _ in vlm.plugin.named_parameters()]  # `unused` has no effect: the paper's count
    assert all(g.abs().max() > 0 for name, g in zip(names, found, strict=True) if ".unused" not in name)
    assert squares.found == []


def test_squares_are_seen():
    """The model's own boolean mask of a padded batch becomes one in every layer."""
    vlm = attach()
    encoded, _ = teach(vlm)
    with Squares() as squares, torch.no_grad(), vlm.using(Session(False, False)):
        vlm.model(**encoded, use_cache=False)
    assert len(squares.found) >= tiny.DEPTH


def test_a_square_costs_memory():
    """Peak memory beyond what is held: a tensor, and one that comes and goes."""

    def work() -> torch.Tensor:
        kept = torch.zeros(1000)
        return kept + torch.ones(500).sum()

    assert 4000 + 2000 <= peak_bytes(work, CPU) <= 4000 + 4000 + 100


def test_the_states_of_dropped_tokens_pass_on_no_gradient_to_speak_of():
    """Soft masks: what teaches a dropped token is its gate; its states have weights of 1e-8 in all that follows.

    So backward through their rows of every later layer, most of the sequence, is work that changes nothing.
    """
    vlm = attach()
    taught, cut = teach(vlm), []
    plain = gradients(vlm, *taught, soft=True)

    def without(rows: str) -> list[torch.Tensor]:
        def detach(module, args: tuple, kwargs: dict):
            forward = kwargs[FORWARD]
            if forward.packed.gone is None:
                return None
            gone = forward.packed.gone if rows == "dropped" else forward.packed.visual & ~forward.packed.gone
            cut.append(float(gone.sum() / forward.packed.valid.sum()))
            return (torch.where(gone[..., None], args[0].detach(), args[0]), *args[1:]), kwargs

        handles = [layer.register_forward_pre_hook(detach, with_kwargs=True) for layer in vlm.host.parts.layers]
        found = gradients(vlm, *taught, soft=True)
        for handle in handles:
            handle.remove()
        return found

    def close(found: list[torch.Tensor]) -> bool:
        pairs = zip(plain, found, strict=True)
        return all((one - other).norm() <= 1e-5 * one.norm() + 1e-6 for one, other in pairs)

    assert close(without("dropped"))
    assert max(cut) > 0.7, "most of the sequence"
    assert not close(without("kept"))


@pytest.mark.parametrize("mode", [{}, {"contenders": 4.0}], ids=str)
def test_backward_over_kept_rows_gives_the_same_gradients_in_less_memory(mode):
    vlm = attach()
    taught, peaks, found = teach(vlm), [], []
    for backward in ("all", "kept"):
        step = partial(gradients, vlm, *taught, soft=True, backward=backward, **mode)
        peaks.append(peak_bytes(lambda step=step: found.append(step()), CPU))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 5e-5 * one.norm() + 1e-6
    assert not all(torch.equal(one, other) for one, other in zip(*found, strict=True)), "the other way"
    assert peaks[1] < 0.85 * peaks[0], peaks


def test_a_split_that_can_t_be_is_refused():
    vlm = attach()
    taught = teach(vlm)
    with pytest.raises(LitPruneError, match=r"data\.pack: false"):
        gradients(vlm, *taught, pack=True, **KEPT)
    vlm.compile(backend="eager")
    with pytest.raises(LitPruneError, match="compiled"):
        gradients(vlm, *taught, **KEPT)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_checkpointed_layers_give_the_same_gradients(mode):
    vlm = attach()
    taught = teach(vlm)
    plain = gradients(vlm, *taught, **mode)
    prepare(vlm.model)
    again = gradients(vlm, *taught, again=True, **mode)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_checkpointing_keeps_less_and_leaves_no_gradient_behind():
    vlm = attach()
    taught = teach(vlm)
    step = partial(gradients, vlm, *taught, soft=True)
    before = peak_bytes(step, CPU)
    prepare(vlm.model)
    assert peak_bytes(step, CPU) == pytest.approx(before, rel=0.05), "nothing changes by itself"
    assert peak_bytes(partial(step, again=True), CPU) < 0.5 * before
    layers = vlm.host.parts.layers
    with checkpointed(vlm.model, 3):
        assert [layer.training for layer in layers] == [False] * 3 + [True] * 5
        assert not any(part.training for layer in layers for part in layer.children())
    assert not any(part.training for part in vlm.model.modules())
    layers[5].train()
    with checkpointed(vlm.model, 3):
        pass
    assert [layer.training for layer in layers] == [False] * 5 + [True] + [False] * 2, "as it was"
    embeddings = vlm.model.get_input_embeddings()
    assert not embeddings(torch.tensor([[1]])).requires_grad


def test_a_model_without_checkpointing_is_refused():
    model = tiny.build_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(LitPruneError, match="checkpoint_activations"):
        prepare(model)
