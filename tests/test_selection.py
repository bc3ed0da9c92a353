"""Which tokens stay: ranks, counts, gates, packing, and random numbers without a generator."""

import math

import pytest
import torch

from lit_prune.ops import selection


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 20, generator=generator)
    alive = torch.rand(4, 20, generator=generator) > 0.3
    return scores, alive


def test_top_k_keeps_the_best_alive(scored):
    scores, alive = scored
    count = torch.tensor([5, 1, 20, 0])
    kept = selection.top_k(scores, alive, count)
    for row in range(4):
        best = sorted(alive[row].nonzero()[:, 0].tolist(), key=lambda i: -scores[row, i])[: count[row]]
        assert kept[row].nonzero()[:, 0].tolist() == sorted(best)


def test_ties_go_to_the_earlier_token_in_any_batch():
    scores, alive = torch.zeros(3, 8), torch.ones(3, 8, dtype=torch.bool)
    kept = selection.top_k(scores, alive, torch.tensor([3, 3, 3]))
    assert kept[0].tolist() == [True] * 3 + [False] * 5
    assert torch.equal(selection.top_k(scores[:1], alive[:1], torch.tensor([3])), kept[:1])


def test_threshold_keeps_positive_logits_and_at_least_one():
    logits = torch.tensor([[1.0, -1.0, 0.0, 2.0], [-3.0, -1.0, -2.0, -4.0], [5.0, 5.0, -1.0, -1.0]])
    alive = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    kept = selection.threshold(logits, alive)
    assert kept.tolist() == [[True, False, False, False], [False, True, False, False], [False, False, True, False]]


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.tensor([0.3, 0.9], requires_grad=True)
    gate = selection.straight_through(torch.tensor([False, True]), soft.square())
    assert gate.tolist() == [0, 1]
    assert torch.autograd.grad(gate.sum(), soft)[0].tolist() == pytest.approx([0.6, 1.8])


@pytest.mark.parametrize("eps", [1e-2, 1e-8])
def test_log_gate_is_a_mask_and_its_gradient_undoes_eps(eps):
    gate = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    bias = selection.log_gate(gate, eps)
    assert bias.exp().tolist() == pytest.approx([eps, 1.0])
    assert torch.autograd.grad((bias.exp()).sum(), gate)[0].tolist() == pytest.approx([1 - eps] * 2)


def test_logistic_noise_is_logistic():
    torch.manual_seed(0)
    noise = selection.logistic_noise(torch.empty(200_000))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert (noise < 1).double().mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)


@pytest.mark.parametrize(("function", "right"), [(selection.pack, True), (selection.compact, False)])
def test_packing_keeps_order_on_its_side(scored, function, right):
    _, keep = scored
    columns, real = function(keep)
    width = int(keep.sum(1).max())
    assert columns.shape == real.shape == (4, width)
    for row in range(4):
        expected = keep[row].nonzero()[:, 0].tolist()
        assert columns[row][real[row]].tolist() == expected
        place = slice(width - len(expected), None) if right else slice(len(expected))
        assert real[row][place].all()
        assert real[row].sum() == len(expected)


def test_packing_nothing():
    for function in (selection.pack, selection.compact):
        columns, real = function(torch.zeros(2, 5, dtype=torch.bool))
        assert columns.shape == real.shape == (2, 0)


def test_gather_rows(scored):
    states = torch.randn(4, 20, 3)
    columns, real = selection.compact(scored[1])
    rows = selection.gather_rows(states, columns)
    for row in range(4):
        assert torch.equal(rows[row][real[row]], states[row][scored[1][row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_their_gradients_are_those_of_gather_and_scatter(dtype):
    """To the last bit, also where one sequence stands for all samples (rotary embeddings)."""
    columns = torch.stack([torch.randperm(20)[:7] for _ in range(3)])
    states = torch.randn(3, 20, 5).to(dtype).requires_grad_()
    index, weight = columns[..., None].expand(-1, -1, 5), torch.randn(3, 7, 5).to(dtype)
    pairs = [
        (selection.gather_rows(states, columns), states.gather(1, index)),
        (selection.gather_rows(states[:1].expand(3, -1, -1), columns), states[:1].expand(3, -1, -1).gather(1, index)),
    ]
    for ours, reference in pairs:
        assert torch.equal(ours, reference)
        assert torch.equal(*(torch.autograd.grad((out * weight).sum(), states)[0] for out in (ours, reference)))
    some = torch.randn(3, 7, 5).to(dtype).requires_grad_()
    back = selection.put_rows(some, columns, 20)
    reference = torch.zeros(3, 20, 5, dtype=dtype).scatter(1, index, some)
    assert torch.equal(back, reference)
    assert torch.equal(*(torch.autograd.grad((out * states.detach()).sum(), some)[0] for out in (back, reference)))


def test_hashed_numbers_are_uniform_and_independent():
    seeds, ordinals = torch.arange(400), torch.arange(576).expand(400, -1)
    numbers = selection.hashed_uniform(seeds, ordinals).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.003)
    assert numbers.var().item() == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(numbers.flatten(), bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    assert ((counts - expected).square() / expected).sum() < 43.8, "chi-squared with 19 degrees of freedom, p = 0.001"
    centred = numbers - 0.5
    for a, b in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs((a * b).mean().item() * 12) < 0.01, "neighbouring seeds and ordinals are uncorrelated"


def test_hashed_numbers_depend_on_seed_and_ordinal_alone():
    seeds, ordinals = torch.tensor([3, 99, 2**31 - 2]), torch.arange(50).expand(3, -1)
    numbers = selection.hashed_uniform(seeds, ordinals)
    torch.manual_seed(1)
    assert torch.equal(selection.hashed_uniform(seeds, ordinals), numbers)
    assert torch.equal(selection.hashed_uniform(seeds[1:2], ordinals[1:2, 7:9]), numbers[1:2, 7:9])
    assert (numbers[0] != numbers[1]).all()


# -- several images -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (60, [2880, 576, 0], [50, 10, 0]),
        (10, [30, 20, 10], [5, 3, 2]),  # 5, 3 1/3, 1 2/3
        (7, [36, 36, 36], [3, 2, 2]),  # of equal remainders the earlier
        (9, [16, 0, 0], [9, 0, 0]),
        (99, [16, 4, 0], [16, 4, 0]),
        (4, [100, 1, 1], [2, 1, 1]),  # 3.92, 0.04, 0.04: nobody starves
        (2, [100, 1, 1], [2, 0, 0]),  # there is not one for each
        (0, [16, 4, 4], [0, 0, 0]),
        (3, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_shares_are_in_proportion(count, sizes, shares):
    assert selection.share(torch.tensor([count]), torch.tensor([sizes])).tolist() == [shares]


def test_shares_add_up_and_never_exceed_an_image():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (500, 6), generator=generator) * (torch.rand(500, 6, generator=generator) > 0.3)
    count = torch.randint(0, 200, (500,), generator=generator)
    shares = selection.share(count, sizes)
    assert torch.equal(shares.sum(1), torch.minimum(count, sizes.sum(1)))
    assert ((shares >= 0) & (shares <= sizes)).all()
    enough = count >= (sizes > 0).sum(1)
    assert ((shares > 0) | (sizes == 0))[enough].all()
    exact = count[:, None] * sizes / sizes.sum(1, keepdim=True).clamp(min=1)
    fair = (exact >= 1).logical_or(sizes == 0).all(1) & (count <= sizes.sum(1))
    assert fair.sum() > 50
    assert ((shares - exact).abs() < 1)[fair].all()


@pytest.fixture
def imaged(scored):
    """Two to four images a sample, of different sizes."""
    number = torch.tensor([[0] * 7 + [1] * 13, [0] * 5 + [1] * 5 + [2] * 10, [0] + [1] * 9 + [2] * 9 + [3], [0] * 20])
    sizes = torch.stack([torch.bincount(row, minlength=4) for row in number])
    return *scored, selection.Images(number, sizes)


def test_images_are_ranked_apart(imaged):
    scores, alive, images = imaged
    found = selection.rank(scores, alive, images)
    for row in range(4):
        for image in range(4):
            mine = images.number[row] == image
            if mine.any():
                alone = selection.rank(scores[row][mine][None], alive[row][mine][None])
                assert torch.equal(found[row][mine], alone[0])


def test_top_k_of_several_images_keeps_the_best_of_each(imaged):
    scores, alive, images = imaged
    count = torch.tensor([5, 6, 7, 4])
    kept = selection.top_k(scores, alive, count, images)
    assert kept.sum(1).tolist() == count.tolist()
    shares = selection.share(count, images.sum(alive.long()))
    assert torch.equal(images.sum(kept.long()), shares)
    one = selection.Images(torch.zeros_like(images.number), torch.tensor([[20]] * 4))
    assert torch.equal(selection.top_k(scores, alive, count, one), selection.top_k(scores, alive, count))


def test_threshold_keeps_one_of_each_image(imaged):
    _, alive, images = imaged
    kept = selection.threshold(-torch.rand(4, 20), alive, images=images)
    assert torch.equal(images.sum(kept.long()), (images.sum(alive.long()) > 0).long())


def test_top_mass_keeps_the_fewest_that_hold_the_share():
    """Against sums by hand: a sure sample keeps one token, an unsure one most, a dead token never counts."""
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.2], [5.0, 1.0, 1.0, 0.0]])
    alive = torch.tensor([[True] * 4, [True] * 4, [False, True, True, True]])
    keep = selection.top_mass(logits, alive, 0.8)
    assert keep.tolist() == [
        [True, False, False, False],
        [True, True, True, True],
        [False, True, True, False],
    ]
    assert selection.top_mass(logits, alive, 1.0)[1].all()
    for row, (values, there) in enumerate(zip(logits.tolist(), alive.tolist(), strict=True)):
        weights = {i: 2.718281828459045**v for i, (v, a) in enumerate(zip(values, there, strict=True)) if a}
        best = sorted(weights, key=lambda i: (-weights[i], i))
        count = next(n for n in range(1, 5) if sum(weights[i] for i in best[:n]) >= 0.8 * sum(weights.values()))
        assert set(keep[row].nonzero()[:, 0].tolist()) == set(best[:count])
