"""Selection with many tokens: the same picks as from a matrix of all pairs, which is never held."""

import importlib.util
from types import ModuleType

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import coverage, graphs, merging
from lit_prune.pruners import divprune
from lit_prune.pruners.tome import ToMe

KINDS = ("random", "tied")


def unit_vectors(kind: str, tokens: int) -> Tensor:
    """Three samples; `tied`: their cosines are multiples of 1/8, without rounding, and many are equal."""
    draw = torch.Generator().manual_seed(tokens)
    if kind == "tied":
        return (torch.randint(0, 2, (3, tokens, 16), generator=draw) - 0.5) / 2
    return normalize(torch.randn(3, tokens, 16, generator=draw) + 0.3, dim=-1)


def some_alive(tokens: int) -> Tensor:
    alive = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1)) > 0.2
    return alive.index_fill(1, torch.tensor([0]), True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("everyone", [None, 90], ids=["lazy", "sample of all"])
def test_facility_location_without_all_pairs(monkeypatch, kind, everyone):
    """Few of the random ones: of the last tokens two may cover each other alone, and rounding decides."""
    few = 40 if kind == "tied" else 12
    unit, alive, count = unit_vectors(kind, 90), some_alive(90), torch.tensor([0, few, 200])
    draw = torch.Generator().manual_seed(2)
    for weight in (torch.ones(3, 90), torch.randint(1, 4, (3, 90), generator=draw).float()):
        whole = coverage.facility_location(coverage.Cosines(unit), weight, alive, count)
        monkeypatch.setattr(graphs, "DENSE", 16)
        monkeypatch.setattr(coverage, "FIRST", 4)
        some = coverage.facility_location(coverage.Cosines(unit), weight, alive, count, everyone)
        monkeypatch.undo()
        assert torch.equal(some, whole)
        assert some.sum(1).tolist() == [0, few, int(alive[2].sum())]


def test_a_sample_covers_nearly_as_much(monkeypatch):
    """As a share of what the exact picks cover, where 128 of 400 tokens count; random picks cover less."""
    unit, alive, count = unit_vectors("random", 400), some_alive(400), torch.tensor([20, 20, 20])

    def covered(chosen: Tensor) -> Tensor:
        alike = graphs.cosines(unit).masked_fill(~chosen[:, None], 0.0).amax(2)
        return (alike * alive).sum(1)

    exact = covered(coverage.facility_location(coverage.Cosines(unit), alive.float(), alive, count))
    monkeypatch.setattr(graphs, "DENSE", 16)
    sampled = coverage.facility_location(coverage.Cosines(unit), alive.float(), alive, count, 128)
    assert sampled.sum(1).tolist() == [20, 20, 20]
    assert not (sampled & ~alive).any()
    first = alive & (alive.cumsum(1) <= 20)
    assert (covered(sampled) > 0.95 * exact).all()
    assert (covered(sampled) > covered(first)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loneliest_token_without_all_pairs(monkeypatch, kind):
    unit, alive = unit_vectors(kind, 120), some_alive(120)
    whole = divprune.nearest_likeness(unit, alive).masked_fill(~alive, 9.0)
    monkeypatch.setattr(divprune, "BLOCK", 7)
    some = divprune.likeness_of_loneliest(unit, alive).masked_fill(~alive, 9.0)
    assert torch.equal(some.argmin(1), whole.argmin(1))
    torch.testing.assert_close(some.amin(1), whole.amin(1))
    assert (some <= whole + 1e-6).all()


@pytest.mark.parametrize("neighbours", [5, None])
def test_density_peaks_without_all_pairs(monkeypatch, neighbours):
    unit, real, count = unit_vectors("random", 60), some_alive(60), torch.tensor([1, 4, 9])
    whole = merging.density_peaks(unit, real, count, neighbours)
    monkeypatch.setattr(merging, "DENSE", 7)
    some = merging.density_peaks(unit, real, count, neighbours)
    assert all(torch.equal(*pair) for pair in zip(some, whole, strict=True))


def spread_by_hand(scores, unit, place, side, width, alive, count) -> Tensor:
    """Pick by pick over all tokens, as the formula says."""
    chosen = torch.zeros_like(alive)
    for row, most in enumerate(count.tolist()):
        near, taken = torch.zeros_like(scores[row]), ~alive[row]
        for _ in range(min(most, int(alive[row].sum()))):
            pick = (scores[row] * (1 - near)).masked_fill(taken, -1.0).argmax()
            alike = (unit[row] * unit[row, pick]).sum(-1).clamp(min=0)
            rows = place[row] // side - place[row, pick] // side
            columns = place[row] % side - place[row, pick] % side
            near = near.maximum(alike * torch.exp(-(rows.square() + columns.square()).float() / (2 * width**2)))
            chosen[row, pick] = taken[pick] = True
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 0, 20), (60, 200, 150)], ids=["a pick at a time", "all pairs ahead"])
@pytest.mark.parametrize("width", [1e-3, 0.7, 1.0, 9.0])
def test_spread_picks_as_by_hand(kind, counts, width):
    """Over a grid with holes, whose tokens are in any order."""
    unit, alive, draw = unit_vectors(kind, 200), some_alive(200), torch.Generator().manual_seed(4)
    place = torch.stack([torch.randperm(20**2, generator=draw)[:200] for _ in range(3)])
    scores = torch.randint(1, 5, (3, 200), generator=draw).float()
    scores = scores if kind == "tied" else scores + torch.rand(3, 200, generator=draw)
    inputs = (scores, unit, place, 20, width, alive, torch.tensor(counts))
    assert torch.equal(graphs.spread(*inputs), spread_by_hand(*inputs))


def test_spread_looks_only_around_a_pick(monkeypatch):
    unit, alive, count = unit_vectors("random", 900), some_alive(900), torch.tensor([0, 30, 200])
    place = torch.stack([torch.randperm(900, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    scores = torch.rand(3, 900, generator=torch.Generator().manual_seed(3))
    inputs = (scores, unit, place, 30, 0.5, alive, count)
    around = graphs.spread(*inputs)
    monkeypatch.setattr(graphs, "EXPONENT", 1e6)
    assert torch.equal(around, graphs.spread(*inputs))
    assert not torch.equal(around, graphs.spread(*inputs[:4], 1e-3, *inputs[5:])), "neighbours do matter"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", tiny.ROOT / "jobs/scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TOWER_WIDTH = 64
    return module


def test_matching_by_blocks(monkeypatch, scale):
    found = scale.tower_context(400, 30, smooth=True)
    whole = ToMe().prune_vision(found)
    monkeypatch.setattr("lit_prune.pruners.tome.DENSE", 7)
    assert torch.equal(ToMe().prune_vision(found).mask, whole.mask)


@pytest.mark.parametrize("path", tiny.PRUNERS, ids=lambda path: path.stem)
def test_the_largest_tensor_grows_no_faster_than_the_tokens(monkeypatch, scale, path):
    for place in ("ops.graphs", "ops.merging", "pruners.tome"):
        monkeypatch.setattr(f"lit_prune.{place}.DENSE", 100)
    monkeypatch.setattr(divprune, "BLOCK", 100)
    few, many = (
        {
            place: scale.measure(run, tokens, repeats=1)["largest"]
            for place, run in scale.selections(path, tokens, 8, 64, smooth=False).items()
        }
        for tokens in (1600, 6400)
    )
    assert all(many[place] <= 1.1 * few[place] for place in few), (few, many)
