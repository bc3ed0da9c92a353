from collections import Counter
from itertools import chain

import numpy as np
import pytest

from lit_prune.data.order import WINDOW, Order, apportion
from lit_prune.data.sampler import EvalBatches, RankShare, TrainBatches
from lit_prune.errors import LitPruneError

ONE = Order((50,), seed=7)
MIXED = Order((30, 7, 13), (1.0, 2.0, 0.5), seed=7)
LENGTHS = np.random.default_rng(0).geometric(0.01, 50).astype(np.int32)
ORDERS = {
    "one source": ONE,
    "several": Order((30, 7, 13), seed=7),
    "weighted": MIXED,
    "by length": Order((30, 7, 13), (1.0, 2.0, 0.5), 7, LENGTHS, group=8),
}


def global_batches(order=ONE, epoch=0, world=1, batch_size=4, state=None):
    """The global batches of an epoch, put together from all ranks in the order of the samples."""
    ranks = []
    for rank in range(world):
        batches = TrainBatches(order, batch_size, rank, world)
        if state:
            batches.load_state_dict(state)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
    return [list(chain(*zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]


# Batches of an order
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_ranks_share_one_sequence(order):
    for epoch in (0, 1):
        whole = global_batches(order, epoch, batch_size=8)
        assert whole == global_batches(order, epoch, 2, 4) == global_batches(order, epoch, 4, 2)
        assert list(chain(*whole)) == order.epoch(epoch)[:48].tolist()
    assert whole != global_batches(order, batch_size=8)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_at_every_position_equals_uninterrupted(order, world):
    for epoch in (0, 2):
        whole = global_batches(order, epoch, world, 8 // world)
        for done in range(len(whole) + 1):
            batches = TrainBatches(order, 8 // world, 0, world)
            batches.set_epoch(epoch)
            state = batches.state_dict(epoch, done)
            assert global_batches(order, epoch, world, 8 // world, state) == whole[done:]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_resume_with_another_number_of_ranks(order):
    two = TrainBatches(order, 4, 0, 2)
    state = two.state_dict(0, 3)
    first, rest = global_batches(order, world=2)[:3], global_batches(order, world=1, state=state)
    assert list(chain(*first, *rest)) == order.epoch(0)[:48].tolist()
    one = TrainBatches(order, 4)
    one.load_state_dict(state)
    assert len(one) == 3 + len(rest)
    assert one.state_dict(0, 5)["consumed"] == 3 * 8 + 2 * 4


def test_an_epoch_of_whole_optimizer_steps():
    """12 batches, stepped after every 5; wherever it is resumed, the epoch ends at the same batch."""
    whole = list(TrainBatches(ONE, 4))[:10]
    batches = TrainBatches(ONE, 4, multiple=5)
    assert list(batches) == whole
    for done in range(11):
        resumed = TrainBatches(ONE, 4, multiple=5)
        resumed.load_state_dict(batches.state_dict(0, done))
        assert list(resumed) == whole[done:]
        assert len(resumed) == len(batches) == 10
    with pytest.raises(LitPruneError, match="do not fill one batch of 4, accumulated 13 times, on 1 processes"):
        TrainBatches(ONE, 4, multiple=13)


def test_an_iterator_keeps_its_epoch():
    batches = TrainBatches(ONE, 4)
    expected = list(batches)
    late = iter(batches)
    batches.set_epoch(1)
    assert list(late) == expected
    assert len(batches) == 12


def test_too_few_samples():
    with pytest.raises(LitPruneError, match="3 training samples do not fill one batch of 2 on 2 processes"):
        TrainBatches(Order((3,)), 2, 0, 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Order((30, 7, 14), MIXED.weights, 7), r"has sizes \[30, 7, 13\], the data given now \[30, 7, 14\]"),
        (Order((7, 30, 13), MIXED.weights, 7), "sizes"),
        (Order(MIXED.sizes, (1.0, 2.0, 0.6), 7), r"weights \[1.0, 2.0, 0.5\], the data given now \[1.0, 2.0, 0.6\]"),
        (Order(MIXED.sizes, None, 7), "weights"),
        (Order(MIXED.sizes, MIXED.weights, 8), "seed 7, the data given now 8"),
        (Order(MIXED.sizes, MIXED.weights, 7, LENGTHS), "group_by_length False"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(other, message):
    state = TrainBatches(MIXED, 4).state_dict(0, 1)
    with pytest.raises(LitPruneError, match=message):
        TrainBatches(other, 4).load_state_dict(state)


def test_a_checkpoint_of_other_records_is_refused():
    state = TrainBatches(ONE, 4, fingerprints=["a"]).state_dict(0, 1)
    TrainBatches(ONE, 4, fingerprints=["a"]).load_state_dict(state)
    with pytest.raises(LitPruneError, match=r"has fingerprints \['a'\], the data given now \['b'\]"):
        TrainBatches(ONE, 4, fingerprints=["b"]).load_state_dict(state)


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(LitPruneError, match=r"has sizes None, the data given now \[50\]"):
        TrainBatches(ONE, 4).load_state_dict({"seed": 7, "size": 50, "epoch": 0, "consumed": 4})


# Orders
def test_one_source_is_a_seeded_permutation():
    for epoch in range(3):
        assert ONE.epoch(epoch).tolist() == np.random.default_rng([7, epoch]).permutation(50).tolist()


def test_without_weights_every_sample_comes_once():
    for epoch in range(3):
        assert sorted(ORDERS["several"].epoch(epoch)) == list(range(50))


def test_weights_are_shares_and_passes_go_on():
    counts = MIXED.counts
    assert counts == apportion(50, [1, 2, 0.5]) == [14, 29, 7]
    bounds = (range(30), range(30, 37), range(37, 50))
    streams = [[], [], []]
    for epoch in range(12):
        order = MIXED.epoch(epoch).tolist()
        for stream, bound, count in zip(streams, bounds, counts, strict=True):
            mine = [index for index in order if index in bound]
            assert len(mine) == count
            stream += mine
    for stream, bound in zip(streams, bounds, strict=True):
        passes = [stream[i : i + len(bound)] for i in range(0, len(stream) - len(bound) + 1, len(bound))]
        assert len(passes) >= 5
        assert all(sorted(found) == list(bound) for found in passes)
        assert passes[0] != passes[1]


def test_sources_are_mixed_throughout():
    order = Order((4000, 1000), (1.0, 1.0), seed=1).epoch(0)
    for part in np.split(order, 10):  # 500 draws at one half: four standard errors
        assert abs((part < 4000).mean() - 0.5) < 4 * 0.5 / 500**0.5


@pytest.mark.parametrize(("total", "weights"), [(10, [1, 1, 1]), (7, [0.1, 0.2, 0.7]), (1_000_003, [3, 0.001, 9])])
def test_apportioned_within_one(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0,), (1e308, 1e308)]
)
def test_wrong_weights(weights):
    with pytest.raises(LitPruneError, match="must be positive numbers"):
        Order((5, 5), weights)


def test_a_weight_of_less_than_one_sample():
    with pytest.raises(LitPruneError, match="give source 1 less than one sample in an epoch of 10"):
        Order((5, 5), (1.0, 1e-3))


def test_samples_of_similar_length_come_together():
    size, group = 2 * WINDOW * 8 + 45, 8
    lengths = np.random.default_rng(0).geometric(0.01, size)
    plain, grouped = Order((size,), seed=3), Order((size,), None, 3, lengths, group)
    for epoch in range(2):
        before, after = plain.epoch(epoch), grouped.epoch(epoch)
        assert Counter(after.tolist()) == Counter(before.tolist())
        spread = [np.ptp(lengths[order[:840]].reshape(-1, group), axis=1).mean() for order in (before, after)]
        assert spread[1] < 0.15 * spread[0]
        longest = lengths[after[: WINDOW * group]].reshape(-1, group).max(1)
        assert (np.diff(longest) > 0).any()  # shuffled, neither growing
        assert (np.diff(longest) < 0).any()  # nor shrinking


def test_a_resumed_epoch_keeps_its_groups():
    order = ORDERS["by length"]
    state = TrainBatches(order, 4, 0, 2).state_dict(0, 2)
    other = Order(order.sizes, order.weights, order.seed, order.lengths, group=4)
    assert list(chain(*global_batches(other, state=state))) == order.epoch(0)[16:48].tolist()


# Evaluation
def test_processes_share_whole_batches():
    """Each is one that a process alone has, so that its samples meet the same padding."""
    whole = list(EvalBatches(RankShare(10), 4))
    shares = [EvalBatches(RankShare(10), 4) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.turns = slice(rank, None, 2)
    assert [list(share) for share in shares] == [whole[::2], whole[1::2]]
    assert [len(share) for share in shares] == [2, 1]


@pytest.mark.parametrize(("size", "world", "batch_size"), [(10, 1, 4), (9, 2, 4), (9, 4, 2), (1, 2, 3), (8, 2, 2)])
def test_evaluation_sees_each_sample_once_in_equally_many_batches(size, world, batch_size):
    ranks = [EvalBatches(RankShare(size, rank, world), batch_size) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert {len(found) for found in batches} == {len(rank) for rank in ranks} == {len(batches[0])}
    assert sorted(chain(*(batch for found in batches for batch in found))) == list(range(size))
