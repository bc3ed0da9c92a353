"""The list of bad samples: over sources, ranks and resumed runs."""

import json
from itertools import chain

import pytest
import torch
from instruct_samples import make_data, write_samples
from lightning.pytorch import LightningModule, Trainer

from lit_prune.data.bad_samples import BadSampleLog
from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.mixture import WeightedSource
from lit_prune.data.samples import Skipped
from lit_prune.data.sources import open_source
from lit_prune.errors import LitPruneError


class Nothing(LightningModule):
    """Trains one weight on nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(processor, sources, folder, checkpoint=None, workers=0, devices=1, share=0.5, **options):
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp_fork" if devices > 1 else "auto",
        devices=devices,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = make_data(processor, train=sources, batch_size=4 // devices, num_workers=workers, max_bad_share=share)
    trainer.fit(Nothing(), data, ckpt_path=checkpoint)
    return trainer


def listed(folder) -> dict[str, list[tuple]]:
    """File and sample of every line, by list."""
    found = {}
    for path in sorted(folder.glob("bad_samples*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [(line["file"], line["sample"]) for line in lines]
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    paths = [str(write_samples(folder / name, 20, bad=(1, 2, 11))) for name in ("a", "b")]
    return [WeightedSource(path, weight=1) for path in paths]


def every_bad(sources) -> list[tuple]:
    return sorted((source.data, f"s{index}") for source in sources for index in (1, 2, 11))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_is_listed_once_with_its_source(processor, sources, tmp_path, workers):
    fit(processor, sources, tmp_path, workers=workers, max_epochs=3)
    assert list(listed(tmp_path)) == ["bad_samples.jsonl"]
    assert sorted(listed(tmp_path)["bad_samples.jsonl"]) == every_bad(sources)


def test_a_resumed_run_lists_nothing_again(processor, sources, tmp_path):
    trainer = fit(processor, sources, tmp_path, max_epochs=-1, max_steps=6)
    before = listed(tmp_path)["bad_samples.jsonl"]
    assert before
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(processor, sources, tmp_path, str(tmp_path / "half.ckpt"), max_epochs=-1, max_steps=30)
    after = listed(tmp_path)["bad_samples.jsonl"]
    assert after[: len(before)] == before
    assert sorted(after) == every_bad(sources)


def test_ranks_write_lists_of_their_own(processor, sources, tmp_path):
    fit(processor, sources, tmp_path, devices=2, max_epochs=4)
    found = listed(tmp_path)
    assert sorted(found) == ["bad_samples.jsonl", "bad_samples.rank1.jsonl"]
    assert set(chain(*found.values())) == set(every_bad(sources))


def test_samples_of_one_id_are_several(processor, tmp_path):
    """Ids repeat in LLaVA's own data."""
    path = write_samples(tmp_path, 200, bad=tuple(range(0, 200, 10)))
    path.write_text(json.dumps([{**record, "id": "same"} for record in json.loads(path.read_text())]))
    with pytest.raises(LitPruneError, match=r"\d+ of \d+ samples seen in train are bad"):
        fit(processor, [str(path)], tmp_path / "stopped", max_epochs=1, share=0.09)
    fit(processor, [str(path)], tmp_path / "run", max_epochs=1, share=0.2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["record"] for line in lines) == list(range(0, 200, 10))
    assert {line["sample"] for line in lines} == {"same"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_share_is_that_of_the_epoch(processor, tmp_path, workers):
    """A sample that stands in for a bad one is not a further one: 20 of 200 are 10 %, not 20 of 220."""
    path = write_samples(tmp_path, 200, bad=tuple(range(9, 200, 10)))
    records, data = [], make_data(processor, train=str(path), max_bad_share=1.0, num_workers=workers)
    data.setup("fit")
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)
        records += batch["records"]
    assert len(records) == 200
    assert (data.bad_samples.good, len(data.bad_samples.bad)) == (180, 20)
    log = BadSampleLog(0.1)
    bad = [Skipped("f", number, "broken", number) for number in range(20)]
    log.update("train", 0, 180, bad, 200)  # not more than a tenth
    with pytest.raises(LitPruneError, match=r"21 of 201 samples seen in train are bad \(max_bad_share=0.1\)"):
        log.update("train", 0, 0, [Skipped("f", 20, "broken", 20)], 200)


def test_what_another_rank_has_listed(tmp_path):
    first, second = (BadSampleLog(0.5, tmp_path, rank) for rank in (0, 1))
    for log, sample in ((first, "a"), (second, "a"), (second, "b"), (first, "b"), (first, "c")):
        log.update("train", 0, 10, [Skipped("f.json", sample, "broken", ord(sample))], 100)
    assert listed(tmp_path) == {
        "bad_samples.jsonl": [("f.json", "a"), ("f.json", "c")],
        "bad_samples.rank1.jsonl": [("f.json", "b")],
    }


def test_a_list_that_was_cut_short_does_no_harm(tmp_path):
    (tmp_path / "bad_samples.jsonl").write_text('3\n{"other": 1}\nnot JSON\n{"file": "f.json", "sam')
    BadSampleLog(0.5, tmp_path, 1).update("train", 0, 10, [Skipped("f.json", "a", "broken", 0)], 100)
    assert (tmp_path / "bad_samples.rank1.jsonl").is_file()


# Samples that do not go together
class Odd(InstructDataset):
    """Gives the samples of `odd` pixel values of another shape."""

    odd: tuple[int, ...] = ()

    def _encode(self, record, name, index):
        sample = super()._encode(record, name, index)
        if index in self.odd:
            sample.inputs["pixel_values"] = sample.inputs["pixel_values"][0]
        return sample


def odd_batch(processor, tmp_path, odd, mode):
    path = write_samples(tmp_path, 6)
    data = Odd(open_source(path), processor, mode=mode)
    data.odd = odd
    return str(path), Collate(0, mode)(data.__getitems__(list(range(6))))


@pytest.mark.parametrize("odd", [(0,), (5,), (2, 3), (0, 5)])
def test_a_sample_that_does_not_fit_its_batch_is_bad(processor, tmp_path, odd):
    path, batch = odd_batch(processor, tmp_path, odd, "eval")
    assert batch["records"] == [index for index in range(6) if index not in odd]
    assert batch["inputs"]["pixel_values"].shape == (6 - len(odd), 3, 8, 8)
    assert batch["prompts"]["input_ids"].shape[0] == 6 - len(odd)
    assert [(bad.file, bad.sample, bad.record) for bad in batch["skipped"]] == [(path, f"s{i}", i) for i in odd]
    assert all("does not fit into a batch with the others: " in bad.reason for bad in batch["skipped"])
    _, batch = odd_batch(processor, tmp_path, odd, "train")
    assert len(batch["ids"]) == 6
    assert set(batch["records"]) == set(range(6)) - set(odd)
    assert batch["replaced"] == len(odd)


def test_a_batch_that_cannot_be_made_at_all(processor, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(Collate, "_join", fail)
    _, batch = odd_batch(processor, tmp_path, (), "eval")
    assert batch["ids"] == []
    assert len(batch["skipped"]) == 6
    _, batch = odd_batch(processor, tmp_path, (), "train")
    assert "no sample of a batch can be used; the last: " in batch["failure"]


def test_odd_samples_are_counted_in_training(processor, tmp_path, monkeypatch):
    path = write_samples(tmp_path, 24)
    encode = InstructDataset._encode

    def odd(self, record, name, index):
        sample = encode(self, record, name, index)
        if index == 7:
            sample.inputs["pixel_values"] = sample.inputs["pixel_values"].flatten()
        return sample

    monkeypatch.setattr(InstructDataset, "_encode", odd)
    fit(processor, [str(path)], tmp_path / "run", max_epochs=2)
    assert listed(tmp_path / "run") == {"bad_samples.jsonl": [(str(path), "s7")]}
