"""The Trainer's limits with these samplers: overfit_batches and limit_*_batches do what they say, resumed runs too."""

import json
from itertools import chain

import pytest
import torch
from instruct_samples import make_data, write_samples
from lightning.pytorch import Trainer
from recording import QUIET, Recorder, SaveEverywhere, TwoRanks

from lit_prune.data.streamed import StreamedData
from lit_prune.errors import LitPruneError


def fit(processor, path, folder, checkpoint=None, callbacks=(), data=None, **options) -> Recorder:
    model = Recorder()
    settings = {**QUIET, "max_epochs": 3, "enable_checkpointing": False, "default_root_dir": folder, **options}
    chosen = {"train": str(path), "val": str(path), "seed": 5, **(data or {})}
    Trainer(callbacks=list(callbacks), **settings).fit(model, make_data(processor, **chosen), ckpt_path=checkpoint)
    return model


def epochs(model: Recorder, batches: int) -> list[list[list[str]]]:
    return [model.seen[start : start + batches] for start in range(0, len(model.seen), batches)]


@pytest.mark.parametrize(("amount", "batches"), [(1, 1), (2, 2), (0.4, 2), (1.0, 5)])
@pytest.mark.parametrize("data", [{}, {"num_workers": 2}, {"group_by_length": True}], ids=str)
def test_overfitting_sees_the_same_batches_every_epoch(processor, tmp_path, amount, batches, data):
    path = write_samples(tmp_path / "data", 22, bad=(3,))
    seen = epochs(fit(processor, path, tmp_path, overfit_batches=amount, data=data), batches)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert len(set(chain(*seen[0]))) >= 4 * batches - 1  # one stands in for the bad sample
    plain = epochs(fit(processor, path, tmp_path, limit_train_batches=amount, data=data), batches)
    assert plain[0] == seen[0]
    assert plain[0] != plain[1]


def test_overfitting_reloaded_every_epoch_sees_the_same(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    seen = epochs(fit(processor, path, tmp_path, overfit_batches=2, reload_dataloaders_every_n_epochs=1), 2)
    assert seen[0] == seen[1] == seen[2]


def test_overfitting_mixtures_with_weights(processor, tmp_path):
    paths = [str(write_samples(tmp_path / name, count)) for name, count in (("a", 20), ("b", 6))]
    train = [{"data": path, "weight": weight} for path, weight in zip(paths, (1.0, 2.0), strict=True)]
    seen = epochs(fit(processor, paths[0], tmp_path, overfit_batches=3, data={"train": train}), 3)
    assert seen[0] == seen[1] == seen[2]


def test_overfitting_resumes_exactly(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    whole = fit(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)], overfit_batches=2)
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        done = int(checkpoint.stem.rsplit("-", 1)[1])
        again = fit(processor, path, tmp_path, str(checkpoint), overfit_batches=2)
        assert again.seen == whole.seen[done:], checkpoint.name
        assert torch.equal(again.weight, whole.weight)


def test_two_processes_overfit_on_their_own_batches(processor, tmp_path):
    path = str(write_samples(tmp_path / "data", 22))
    settings = {**QUIET, "strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False, "max_epochs": 2}
    trainer = Trainer(default_root_dir=tmp_path, overfit_batches=2, **settings)
    trainer.fit(TwoRanks(tmp_path), make_data(processor, train=path, batch_size=2))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text())["train"] for rank in (0, 1))
    assert first[:2] == first[2:]
    assert second[:2] == second[2:]
    assert not set(chain(*first)) & set(chain(*second))


def test_a_stream_refuses_to_overfit(processor, tmp_path):
    data = StreamedData(base="unused", train="x.parquet")
    data.processor = processor
    with pytest.raises(LitPruneError, match="overfit_batches needs the same batches in every epoch"):
        Trainer(overfit_batches=1, default_root_dir=tmp_path, **QUIET).fit(Recorder(), data)


@pytest.mark.parametrize(("amount", "batches"), [(1, 1), (4, 4), (0.5, 2), (1.0, 5), (99, 5)])
@pytest.mark.parametrize("resumed", [False, True])
def test_training_is_limited(processor, tmp_path, amount, batches, resumed):
    path = write_samples(tmp_path / "data", 22)
    options = {"limit_train_batches": amount, "max_epochs": 2}
    whole = fit(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)] if resumed else [], **options)
    assert len(whole.seen) == 2 * batches
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[::3]:  # test_instruct goes on from every moment
        done = int(checkpoint.stem.rsplit("-", 1)[1])
        again = fit(processor, path, tmp_path, str(checkpoint), **options)
        assert again.seen == whole.seen[done:], checkpoint.name
    assert not whole.seen or len(whole.evaluated) == 2 * 6


@pytest.mark.parametrize(("amount", "batches"), [(0, 0), (1, 1), (0.5, 3), (1.0, 6), (99, 6)])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_is_limited(processor, tmp_path, verb, amount, batches):
    path, limit = str(write_samples(tmp_path, 22)), {"validate": "val"}.get(verb, verb)
    model, data = Recorder(), make_data(processor, **{limit: path})
    run = Trainer(default_root_dir=tmp_path, **QUIET, **{f"limit_{limit}_batches": amount})
    getattr(run, verb)(model, data, **({} if verb == "predict" else {"verbose": False}))
    assert [batch["records"] for batch in model.evaluated] == [
        list(range(22))[start : start + 4] for start in range(0, 4 * batches, 4)
    ]


def test_validation_within_training_is_limited(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    for amount, batches in ((2, 2), (0.5, 3)):
        model = fit(processor, path, tmp_path, limit_val_batches=amount, max_epochs=1)
        assert [batch["records"][0] for batch in model.evaluated] == [0, 4, 8][:batches]
