"""Moments and the repair loss: a float64 closed form, and two processes against one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from lit_prune.evaluation.metrics import Consistency, Shift, SkillAccuracy
from lit_prune.ops.moments import kappa, mean_over_ranks, moment_loss, moments, w2_squared

WIDTH = 8


def tokens(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return 2 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + shift


def closed_form(student: Tensor, teacher: Tensor, a: float) -> float:
    s, t = (np.asarray(x, dtype=np.float64) for x in (student, teacher))
    mean = ((s.mean(0) - t.mean(0)) ** 2).sum() / WIDTH
    return mean + a * ((s.var(0) - t.var(0)) ** 2).sum() / WIDTH


@pytest.mark.parametrize("a", [0.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_loss_equals_its_closed_form(a, shift):
    """Also far from zero, where one-pass variances in fp32 cancel."""
    student, teacher = tokens(40, 0, shift), tokens(40, 1, shift)
    loss = moment_loss(moments(student), moments(teacher), a)
    assert loss.item() == pytest.approx(closed_form(student, teacher, a), rel=1e-4 if shift else 1e-6)


def test_gradient_equals_the_closed_forms():
    student = tokens(12, 0).requires_grad_()
    target = moments(tokens(9, 1))
    gradient = torch.autograd.grad(moment_loss(moments(student), target, 3.0), student)[0]
    s, t_mean, t_var = student.detach().double(), target.mean.double(), target.var.double()
    mean, var = s.mean(0), s.var(0, correction=0)
    expected = 2 * (mean - t_mean) / 12 + 3.0 * 2 * (var - t_var) * 2 * (s - mean) / 12
    torch.testing.assert_close(gradient.double(), expected / WIDTH, rtol=1e-5, atol=1e-7)


def test_variance_of_equal_tokens_is_zero_and_no_tokens_are_no_nan():
    assert (moments(torch.full((5, WIDTH), 3.3)).var == 0).all()
    empty = moments(torch.zeros(0, WIDTH))
    assert (empty.mean == 0).all()
    assert (empty.var == 0).all()


def test_w2_equals_its_closed_form():
    s, t = tokens(30, 0).double().numpy(), tokens(20, 1, 0.5).double().numpy()
    expected = ((s.mean(0) - t.mean(0)) ** 2 + (s.std(0) - t.std(0)) ** 2).mean()
    assert w2_squared(moments(tokens(30, 0)), moments(tokens(20, 1, 0.5))).item() == pytest.approx(expected, rel=1e-5)


# -- kappa ----------------------------------------------------------------------------------------------------------
def slow_kappa(full: Tensor, kept: Tensor, real: Tensor) -> list[float]:
    """The formula as it is written, sample by sample and channel by channel."""
    values = []
    for features, stay, here in zip(full.double().numpy(), kept, real, strict=True):
        everything, rest = features[here.numpy()], features[(stay & here).numpy()]
        least = 1e-6 * np.mean([everything[:, c].var() for c in range(WIDTH)])
        terms = []
        for c in range(WIDTH):
            mu_f, mu_k = everything[:, c].mean(), rest[:, c].mean()
            var_f, var_k = max(everything[:, c].var(), least), max(rest[:, c].var(), least)
            terms.append(np.log(var_f / var_k) + (var_k + (mu_k - mu_f) ** 2) / var_f - 1)
        values.append(0.5 * float(np.mean(terms)))
    return values


def image(samples: int = 3, count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Features with channels of different sizes, a third of them kept, and the last sample with ten fillers."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(samples, count, WIDTH, generator=generator) * torch.logspace(-1, 2, WIDTH) + 5
    real = torch.ones(samples, count, dtype=torch.bool)
    real[-1, 20:] = False
    return full, torch.rand(samples, count, generator=generator) < 1 / 3, real


def test_kappa_equals_its_formula():
    full, kept, real = image()
    assert kappa(full, kept, real).tolist() == pytest.approx(slow_kappa(full, kept, real), rel=1e-4)


def test_kappa_of_a_single_token_is_finite_and_large():
    full, kept, real = image()
    one = torch.zeros_like(kept)
    one[:, 3] = True
    assert kappa(full, one, real).tolist() == pytest.approx(slow_kappa(full, one, real), rel=1e-4)
    assert (kappa(full, one, real) > kappa(full, kept, real)).all()


def test_kappa_of_all_tokens_is_zero_and_scale_and_batch_do_not_matter():
    full, kept, real = image()
    assert kappa(full, real, real).tolist() == [0.0, 0.0, 0.0]
    assert kappa(torch.full_like(full, 3.5), kept, real).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(kappa(1000 * full, kept, real), kappa(full, kept, real), rtol=1e-4, atol=0)
    alone = torch.cat([kappa(full[i : i + 1, real[i]], kept[i : i + 1, real[i]]) for i in range(3)])
    torch.testing.assert_close(kappa(full, kept, real), alone, rtol=1e-5, atol=0)


def test_kappa_of_merged_tokens_uses_their_own_features():
    full, kept, real = image()
    merged = torch.where(kept[..., None], full.mean(1, keepdim=True), 1e9)
    assert kappa(full, kept, real, merged)[0] > kappa(full, kept, real)[0]
    torch.testing.assert_close(kappa(full, kept, real, full.clone()), kappa(full, kept, real))


def test_consistency_is_the_mean_over_samples_with_an_image():
    full, kept, real = image(4)
    real[1] = False
    metric = Consistency()
    for rows in (slice(0, 2), slice(2, 4)):
        metric.update(full[rows], kept[rows], real[rows])
    metric.update(full[:1, :0], kept[:1, :0], real[:1, :0])
    expected = np.mean([slow_kappa(full[i : i + 1], kept[i : i + 1], real[i : i + 1])[0] for i in (0, 2, 3)])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)


# -- two processes --------------------------------------------------------------------------------------------------

SHARES = [(5, 3), (6, 0)]  # tokens of each rank
SKILLS = [(["colour", "shape"], [True, False]), (["digit"], [True])]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def data(share: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Student's inputs and teacher's states of both ranks."""
    return [(tokens(count, 10 + rank), tokens(count, 20 + rank, 0.3)) for rank, count in enumerate(share)]


MEANS = [((2.0, 5.0), (3, 1)), ((2.0, 5.0), (0, 4)), ((1.5, 1.5), (0, 0))]  # each rank's mean, of how many items


def over_ranks(rank: int, means: tuple[float, ...], counts: tuple[int, ...]) -> tuple[float, float]:
    """The mean over ranks and its gradient; a rank without items has nothing that trains."""
    value = torch.tensor(means[rank], requires_grad=counts[rank] > 0)
    mean = mean_over_ranks(value, counts[rank])
    if mean.requires_grad:
        mean.backward()
    return mean.item(), 0.0 if value.grad is None else value.grad.item()


def work(rank: int, folder: str) -> None:
    """One of two processes: losses and averaged gradients, and metrics merged over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {"loss": [], "gradients": [], "shift": []}
    for share in SHARES:
        student = DistributedDataParallel(model())
        inputs, teacher = data(share)[rank]
        states = student(inputs)
        loss = moment_loss(moments(states), moments(teacher), 3.0)
        loss.backward()
        found["loss"].append(loss.item())
        found["gradients"].append([p.grad for p in student.parameters()])
        shift = Shift(1, WIDTH)
        shift.update({0: states.detach()}, {0: teacher})
        found["shift"].append(shift.compute())
    found["means"] = [over_ranks(rank, *case) for case in MEANS]
    full, kept, real = image(3)
    consistency, rows = Consistency(), slice(0, 2) if rank == 0 else slice(2, 3)
    consistency.update(full[rows], kept[rows], real[rows])
    found["consistency"] = consistency.compute()
    accuracy = SkillAccuracy()
    accuracy.update(SKILLS[rank][1], SKILLS[rank][0])
    found["accuracy"] = accuracy.compute()
    one_sided = SkillAccuracy()
    if rank == 1:
        one_sided.update([True, False], ["digit", "digit"])
    found["one_sided"] = one_sided.compute()
    unnamed = SkillAccuracy()
    unnamed.update([True, False], [None, "all"]) if rank else unnamed.update([False], [None])
    found["unnamed"] = unnamed.compute()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(SHARES)), ids=str)
def test_two_ranks_equal_one_process_with_all_tokens(ranks, case):
    """The loss on every rank, and the gradients after DDP's averaging."""
    alone = model()
    inputs, teacher = (torch.cat(parts) for parts in zip(*data(SHARES[case]), strict=True))
    loss = moment_loss(moments(alone(inputs)), moments(teacher), 3.0)
    loss.backward()
    for rank in ranks:
        assert rank["loss"][case] == pytest.approx(loss.item(), rel=1e-6)
        for parameter, gradient in zip(alone.parameters(), rank["gradients"][case], strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_means_over_ranks_are_those_of_all_items(ranks):
    """The gradient is twice each rank's share, since it is averaged over two ranks afterwards."""
    assert [mean for mean, _ in ranks[0]["means"]] == [mean for mean, _ in ranks[1]["means"]] == [2.75, 5.0, 1.5]
    assert [gradient for _, gradient in ranks[0]["means"]] == [2 * 0.75, 0.0, 0.0]
    assert [gradient for _, gradient in ranks[1]["means"]] == [2 * 0.25, 2.0, 0.0]


def test_a_mean_without_other_ranks_is_the_value_itself():
    value = torch.tensor(1.25)
    assert mean_over_ranks(value, 3) is value


@pytest.mark.parametrize("case", range(len(SHARES)), ids=str)
def test_shift_of_two_ranks_is_that_of_all_tokens(ranks, case):
    inputs, teacher = (torch.cat(parts) for parts in zip(*data(SHARES[case]), strict=True))
    with torch.no_grad():
        states = model()(inputs).double().numpy()
    teacher = teacher.double().numpy()
    expected = ((states.mean(0) - teacher.mean(0)) ** 2 + (states.std(0) - teacher.std(0)) ** 2).mean()
    for rank in ranks:
        assert rank["shift"][case].item() == pytest.approx(expected, rel=1e-6)


def test_accuracy_of_two_ranks_names_every_skill(ranks):
    for rank in ranks:
        assert rank["accuracy"] == pytest.approx({"all": 2 / 3, "colour": 1.0, "shape": 0.0, "digit": 1.0})
        assert rank["one_sided"] == pytest.approx({"all": 0.5, "digit": 0.5})
        assert rank["unnamed"] == pytest.approx({"all": 1 / 3, "all (skill)": 0.0})


def test_consistency_of_two_ranks_is_that_of_all_samples(ranks):
    for rank in ranks:
        assert rank["consistency"].item() == pytest.approx(np.mean(slow_kappa(*image(3))), rel=1e-4)
