import json
import pickle
from collections import Counter
from functools import partial
from itertools import chain, islice

import datasets
import pyarrow.parquet
import pytest
import torch
from instruct_samples import conversation
from lightning.pytorch import Trainer
from PIL import Image
from recording import QUIET, Recorder, SaveEverywhere, TwoRanks
from torch.utils.data import DataLoader

from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.progress import rewind_to_step
from lit_prune.data.stream import Stream
from lit_prune.data.streamed import StreamedData
from lit_prune.errors import LitPruneError

SIZES = (11, 7, 9, 3)  # rows of the files: 30 samples


@pytest.fixture
def files(tmp_path):
    """Four parquet files of unequal length with 30 samples, s3 of them bad."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    number = 0
    for file, size in enumerate(SIZES):
        rows = []
        for _ in range(size):
            image = "none.png" if number == 3 else "red.png"
            rows.append({"id": f"s{number}", "image": image, "conversations": conversation("<image>\nQ", str(number))})
            number += 1
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{file}.parquet", batch_size=4)
    return f"{tmp_path}/*.parquet"


@pytest.fixture
def stream(processor, files):
    def make(location=files, **options) -> Stream:
        settings = {"batch_size": 2, "steps": 6, "seed": 3, "block": 4, **options}
        return Stream(str(location), None, partial(InstructDataset, processor=processor), "pets", **settings)

    return make


def read(stream: Stream, batches: int, workers: int = 0) -> list[list[str]]:
    """The ids of the next batches; the stream is told of each."""
    loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=Collate(0, "train"))
    found = []
    for batch in islice(loader, batches):
        stream.take(batch["place"])
        assert "failure" not in batch
        found.append(batch["ids"])
    return found


GOOD = {f"s{number}" for number in range(30)} - {"s3"}


def test_a_pass_holds_every_sample_once_and_each_is_another(stream):
    samples = list(chain(*read(stream(batch_size=1), 58)))
    assert set(samples[:29]) == set(samples[29:]) == GOOD
    assert samples[:29] != samples[29:]
    assert samples == list(chain(*read(stream(batch_size=1), 58)))
    assert samples[:29] != list(chain(*read(stream(batch_size=1, seed=4), 29)))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2), (2, 2)])
def test_no_sample_twice_in_a_pass_whoever_reads_it(stream, world, workers):
    passes = {}
    for rank in range(world):
        part = stream(batch_size=1, rank=rank, world=world, workers=workers)
        loader = DataLoader(part, batch_size=None, num_workers=workers, collate_fn=Collate(0, "train"))
        for batch in islice(loader, 60):  # files are unequal: streams are in different passes
            passes.setdefault(batch["place"][1][0], Counter()).update(batch["ids"])
    assert set(passes[0]) == GOOD
    assert all(set(seen.values()) == {1} for seen in passes.values())
    assert len(passes) > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_batch_goes_on_exactly(stream, workers):
    whole = read(stream(workers=workers), 16, workers)
    for done in range(0, 16, 1 if workers == 0 else 5):
        first = stream(workers=workers)
        assert read(first, done, workers) == whole[:done]
        state = json.loads(json.dumps(first.state_dict()))
        again = stream(workers=workers)
        again.load_state_dict(state)
        assert read(again, 16 - done, workers) == whole[done:], done


def test_what_is_read_ahead_is_not_trained_on(stream):
    whole = read(stream(), 3)
    some = stream()
    loader = DataLoader(some, batch_size=None, collate_fn=Collate(0, "train"))
    for batch in islice(loader, 2):
        some.take(batch["place"])
    again = stream()
    again.load_state_dict(some.state_dict(rewind=1))  # the second batch broke off
    assert read(again, 2) == whole[1:]


def test_another_number_of_workers_begins_the_next_pass(stream, caplog):
    first = stream(workers=2)
    read(first, 4, workers=2)
    again = stream()
    again.load_state_dict(first.state_dict())
    assert again.places == [(1, 0, 0, 0)]
    assert "another number of ranks or workers" in caplog.text
    with pytest.raises(LitPruneError, match="stream has seed 3, the data given now 4"):
        stream(seed=4).load_state_dict(first.state_dict())


def test_rows_as_the_table_has_them(processor, folder, tmp_path):
    """The same encoding as of indexed data, bit for bit; bad rows are named by file and id."""
    from source_samples import as_bytes, batch_of, rows

    from lit_prune.data.sources import open_source

    datasets.Dataset.from_list(list(rows(folder, as_bytes(folder)))).to_parquet(tmp_path / "a.parquet")
    expected = batch_of(open_source(tmp_path / "a.parquet"), processor)
    made = Stream(str(tmp_path / "a.parquet"), None, partial(InstructDataset, processor=processor), "", 5, 1)
    batch = Collate(0, "train")(next(iter(pickle.loads(pickle.dumps(made)))))
    order = [batch["ids"].index(name) for name in expected["ids"]]
    assert [batch["records"][row] for row in order] == expected["records"]
    inputs = batch["inputs"]
    assert torch.equal(inputs["input_ids"][order], expected["inputs"]["input_ids"])
    shown = [{"text": 0, "both": 2}.get(name, 1) for name in batch["ids"]]
    pixels = dict(zip(batch["ids"], inputs["pixel_values"].split(shown), strict=True))
    assert torch.equal(torch.cat([pixels[name] for name in expected["ids"]]), expected["inputs"]["pixel_values"])
    assert {skipped[:2] for skipped in batch["skipped"]} <= {(str(tmp_path / "a.parquet"), n) for n in ("bad", "open")}


def test_what_cannot_be_streamed(stream, files, tmp_path, folder):
    with pytest.raises(LitPruneError, match="4 files cannot be dealt out to 5 processes with 1 readers each"):
        stream(world=5)
    with pytest.raises(LitPruneError, match="only parquet, arrow and the hub are streamed"):
        stream(folder / "data.jsonl")
    rows = [{"id": "x", "image": "none.png", "conversations": conversation("Q", "A")}]
    datasets.Dataset.from_list(rows * 500).to_parquet(tmp_path / "bad" / "a.parquet")
    broken = next(iter(stream(tmp_path / "bad", block=250)))
    assert broken.failure.startswith("1000 bad samples in a row; the last: ")
    nothing = datasets.Dataset.from_list(rows).select([])
    nothing.to_parquet(tmp_path / "empty" / "a.parquet")
    assert "no samples" in next(iter(stream(tmp_path / "empty"))).failure
    other = datasets.Dataset.from_list([{"text": "x"}])
    other.to_parquet(tmp_path / "other" / "a.parquet")
    assert "no column conversations or messages" in next(iter(stream(tmp_path / "other"))).failure
    cut = tmp_path / "0.parquet"
    made = stream(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    assert "0.parquet: " in next(iter(made)).failure


# In training
class Rewinding(Recorder):
    """As `PruneModule` does."""

    def on_save_checkpoint(self, checkpoint):
        rewind_to_step(checkpoint, self.trainer)


def fit(processor, files, folder, checkpoint=None, callbacks=(), workers=0, **options) -> Recorder:
    data = StreamedData(base="unused", train=files, val=files, batch_size=2, steps=6, block=4, num_workers=workers)
    data.processor = processor
    model = Rewinding()
    settings = {**QUIET, "max_epochs": 2, "default_root_dir": folder, "enable_checkpointing": False, **options}
    Trainer(callbacks=list(callbacks), **settings).fit(model, data, ckpt_path=checkpoint)
    return model


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"accumulate_grad_batches": 4}, {"limit_train_batches": 4}])
def test_training_resumes_where_it_was(processor, files, tmp_path, options):
    whole = fit(processor, files, tmp_path, callbacks=[SaveEverywhere(tmp_path)], **options)
    steps = options.get("limit_train_batches", 6)
    assert len(whole.seen) == 2 * steps
    assert len(whole.evaluated) > 0
    samples = list(chain(*whole.seen))
    assert "workers" in options or len(set(samples)) == len(samples) == 4 * steps  # in the first pass
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[:: 5 if "workers" in options else 2]:
        again = fit(processor, files, tmp_path, str(checkpoint), **options)
        assert again.seen == whole.seen[len(whole.seen) - len(again.seen) :], checkpoint.name
        assert torch.equal(again.weight, whole.weight), checkpoint.name


def test_two_processes_stream_and_resume(processor, files, tmp_path):
    """Their files are unequal: one is in its second pass while the other is in its first, and neither waits."""

    def both(checkpoint=None, callbacks=()) -> list[list[str]]:
        data = StreamedData(base="unused", train=files, batch_size=2, steps=9, block=4, seed=3)
        data.processor = processor
        settings = {**QUIET, "strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False, "max_epochs": 1}
        trainer = Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **settings)
        trainer.fit(TwoRanks(tmp_path), data, ckpt_path=checkpoint)
        return [json.loads((tmp_path / f"rank{rank}.json").read_text())["train"] for rank in (0, 1)]

    whole = both(callbacks=[SaveEverywhere(tmp_path)])
    assert [len(seen) for seen in whole] == [9, 9]
    state = torch.load(next(tmp_path.glob("*-batch-9.ckpt")), weights_only=True)["StreamedData"]
    assert sorted(rank["places"][0][0] for rank in state["streams"]) == [0, 1]
    again = both(str(next(tmp_path.glob("*-batch-2.ckpt"))))
    assert again == [seen[2:] for seen in whole]


def test_files_without_rows_are_passed_by(stream, files, tmp_path):
    """Also where they are all that a stream has in a pass; a row group of no rows, as Spark leaves them."""
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet").slice(0, 0)
    for name in "456789":
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    seen, passes = set(), set()
    for rank in range(2):
        loader = DataLoader(stream(batch_size=1, rank=rank, world=2), batch_size=None, collate_fn=Collate(0, "train"))
        for batch in islice(loader, 45):
            assert "failure" not in batch
            seen.update(batch["ids"])
            passes.add((rank, batch["place"][1][0]))
    assert seen == GOOD
    assert len(passes) > 4


def test_resume_after_a_file_grew(stream, files, tmp_path):
    state = stream().state_dict()
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet")
    pyarrow.parquet.write_table(pyarrow.concat_tables([table, table]), tmp_path / "0.parquet")
    with pytest.raises(LitPruneError, match="stream has bytes"):
        stream().load_state_dict(state)


def test_one_location_is_streamed():
    with pytest.raises(LitPruneError, match="one location can be streamed, 2 are given"):
        StreamedData(base="unused", train=["a.parquet", "b.parquet"])


def test_wrong_settings():
    with pytest.raises(LitPruneError, match="must be positive"):
        StreamedData(base="unused", train="x", steps=0)
