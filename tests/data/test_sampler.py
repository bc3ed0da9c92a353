from itertools import chain

import pytest

from lit_prune.data.sampler import EvalBatches, RankShare, TrainBatches
from lit_prune.errors import LitPruneError


def global_batches(epoch=0, world=1, size=50, batch_size=4, state=None):
    """The global batches of an epoch as sets, put together from all ranks."""
    ranks = []
    for rank in range(world):
        batches = TrainBatches(size, batch_size, 7, rank, world)
        if state:
            batches.load_state_dict(state)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
    return [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)]


def test_every_sample_once_and_ranks_agree():
    whole = global_batches(batch_size=8)
    assert whole == global_batches(world=2)
    assert len(whole) == 6
    seen = list(chain(*whole))
    assert len(set(seen)) == len(seen) == 48
    assert whole != global_batches(epoch=1, batch_size=8)
    assert whole == global_batches(batch_size=8)


@pytest.mark.parametrize("world", [1, 2])
def test_resume_equals_uninterrupted(world):
    for epoch in (0, 2):
        whole = global_batches(epoch, world)
        for done in range(len(whole) + 1):
            batches = TrainBatches(50, 4, 7, 0, world)
            batches.set_epoch(epoch)
            state = batches.state_dict(epoch, done)
            assert global_batches(epoch, world, state=state) == whole[done:]


def test_resume_with_another_number_of_ranks():
    two = TrainBatches(50, 4, 7, 0, 2)
    state = two.state_dict(0, 3)
    first, rest = global_batches(world=2)[:3], global_batches(world=1, state=state)
    assert sorted(chain(*first, *rest)) == sorted(chain(*global_batches(world=1)))
    one = TrainBatches(50, 4, 7)
    one.load_state_dict(state)
    assert len(one) == 3 + len(rest)
    assert one.state_dict(0, 5)["consumed"] == 3 * 8 + 2 * 4


def test_an_iterator_keeps_its_epoch():
    batches = TrainBatches(50, 4, 7)
    expected = list(batches)
    late = iter(batches)
    batches.set_epoch(1)
    assert list(late) == expected
    assert len(batches) == 12


def test_too_few_samples_and_other_data():
    with pytest.raises(LitPruneError, match="3 training samples do not fill one batch of 2 on 2 processes"):
        TrainBatches(3, 2, 0, 0, 2)
    state = TrainBatches(50, 4, 7).state_dict(0, 1)
    with pytest.raises(LitPruneError, match="size 50, the data given now 51"):
        TrainBatches(51, 4, 7).load_state_dict(state)
    with pytest.raises(LitPruneError, match="seed 7"):
        TrainBatches(50, 4, 8).load_state_dict(state)


@pytest.mark.parametrize(("size", "world", "batch_size"), [(10, 1, 4), (9, 2, 4), (9, 4, 2), (1, 2, 3), (8, 2, 2)])
def test_evaluation_sees_each_sample_once_in_equally_many_batches(size, world, batch_size):
    ranks = [EvalBatches(RankShare(size, rank, world), batch_size) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert {len(found) for found in batches} == {len(rank) for rank in ranks} == {len(batches[0])}
    assert sorted(chain(*(batch for found in batches for batch in found))) == list(range(size))
