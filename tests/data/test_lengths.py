"""Samples of similar length together, and samples that are too long."""

import json
import time

import numpy as np
import pytest
from instruct_samples import TOKENS, conversation, make_data, write_samples
from PIL import Image

from lit_prune.data.dataset import InstructDataset
from lit_prune.data.lengths import estimate_lengths
from lit_prune.data.mixture import WeightedSource
from lit_prune.data.sampler import TrainBatches
from lit_prune.data.sources import open_source


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """200 samples as uneven as instruction data: short questions about an image, and texts of very different length."""
    folder = tmp_path_factory.mktemp("skewed")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    draw = np.random.default_rng(0)
    samples = []
    for index in range(200):
        answer = "a b" * int(draw.lognormal(2.5, 1.0))
        turns = conversation("<image>\nQ", "yes") if index % 2 else conversation("Q", answer or "no", "R", "so")
        samples.append({"id": index, "conversations": turns} | ({"image": "red.png"} if index % 2 else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return str(path)


def padding(batches) -> float:
    """Share of the tokens that are padding."""
    masks = [batch["inputs"]["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_grouping_saves_padding(processor, skewed):
    shares, seen = [], []
    for group in (False, True):
        data = make_data(processor, train=skewed, batch_size=8, group_by_length=group)
        data.setup("fit")
        batches = list(data.train_dataloader())
        shares.append(padding(batches))
        seen.append(sorted(index for batch in batches for index in batch["ids"]))
    print(f"padding: {shares[0]:.1%} of all tokens, grouped by length {shares[1]:.1%}")
    assert seen[0] == seen[1] == list(range(200))
    assert shares[0] > 0.5
    assert shares[1] < 0.15


def test_one_sequence_for_any_number_of_ranks_and_workers(processor, tmp_path):
    paths = [str(write_samples(tmp_path / str(count), count)) for count in (40, 20)]
    sources = [WeightedSource(path, weight=weight) for path, weight in zip(paths, (1, 2), strict=True)]
    data = make_data(processor, train=sources, batch_size=8, group_by_length=True)
    data.setup("fit")
    order = data._train_batches.order
    assert order.group == 8
    expected = order.epoch(0)[:56].tolist()
    places = [data.datasets["train"].place(index) for index in expected]
    for world, workers in ((1, 0), (1, 2), (2, 0), (4, 2)):
        ranks = []
        for rank in range(world):
            data.batch_size = 8 // world  # a finder may have changed it: the sampler follows
            data._train_batches = TrainBatches(order, data.batch_size, rank, world)
            data.num_workers = workers
            batches = list(data.train_dataloader())
            names = [data.datasets["train"].names.index(name) for batch in batches for name in batch["sources"]]
            ranks.append(zip(names, [record for batch in batches for record in batch["records"]], strict=True))
        assert [place for step in zip(*ranks, strict=True) for place in step] == places


def test_lengths_are_close(processor, skewed):
    data = make_data(processor, train=skewed)
    data.setup("fit")
    part = data.datasets["train"].parts[0]
    estimated, exact = estimate_lengths(part), np.array([len(part[i].inputs["input_ids"]) for i in range(len(part))])
    assert estimated.dtype == np.int32
    order = np.argsort(estimated, kind="stable")
    assert (np.diff(exact[order]) >= -3).mean() > 0.97
    assert abs(estimated.sum() / exact.sum() - 1) < 0.2


@pytest.mark.slow
def test_many_lengths_take_seconds(processor, tmp_path):
    path = tmp_path / "data.jsonl"
    ask, tell = "What stands beside the door of house {}?", "A bicycle, number {}. " * 8
    with path.open("w") as out:
        for number in range(200_000):
            turns = conversation(ask.format(number), tell.replace("{}", str(number)))
            out.write(json.dumps({"id": number, "conversations": turns}) + "\n")
    part = InstructDataset(open_source(path), processor)
    start = time.thread_time()
    lengths = estimate_lengths(part)
    seconds = time.thread_time() - start
    print(f"lengths of {len(lengths):,} records, {path.stat().st_size / 1e6:.0f} MB: {seconds:.1f} s of CPU time")
    assert seconds < 30


def test_what_cannot_be_read_has_no_length(processor, tmp_path):
    path = tmp_path / "data.jsonl"
    parts = [{"type": "image"}, {"type": "text", "text": "Q"}]
    records = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A" * 40}], "images": ["x"]},
        {"conversations": "text"},
        {"conversations": [3]},
        {"conversations": conversation("Q", "A" * 40)},
        {"image": 3, "conversations": conversation("Q", "A")},
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\nbroken")
    data = make_data(processor, train=str(path), batch_size=1)
    data.setup("fit")
    lengths = estimate_lengths(data.datasets["train"].parts[0])
    assert lengths.tolist() == [lengths[3], 0, 0, lengths[3], 0, 0]  # 41 characters; no image could be encoded
    assert lengths[3] > 40


def test_images_count(processor, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "data.json"
    ask = conversation("<image> Q", "A" * 20)
    records = [{"image": "a.png", "conversations": ask}, {"conversations": conversation("Q", "A" * 20)}]
    path.write_text(json.dumps(records))
    data = make_data(processor, train=str(path), batch_size=1)
    data.setup("fit")
    one, none = estimate_lengths(data.datasets["train"].parts[0]).tolist()
    assert TOKENS <= one - none <= TOKENS + len("<image> ") * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_turns_are_cut_and_counted(processor, tmp_path, workers):
    turns = conversation("Q", "A" * 30, "R", "B" * 30, "S", "C" * 30)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": i, "conversations": turns[: 2 * (1 + i % 3)]} for i in range(6)]))
    options = {"train": str(path), "test": str(path), "batch_size": 6, "num_workers": workers, "max_length": 110}
    data = make_data(processor, too_long="cut_turns", **options)
    data.trainer = None
    data.setup()
    (found,) = data.train_dataloader()
    assert found["cut"] == 2
    assert not found["skipped"]
    assert {i: answer[0] for i, answer in zip(found["ids"], found["answers"], strict=True)} == dict(enumerate("ABBABB"))
    assert found["inputs"]["input_ids"].shape[1] <= 110
    data = make_data(processor, **options)
    data.setup()
    (skipping,) = data.train_dataloader()
    assert sorted(bad.sample for bad in skipping["skipped"]) == [2, 5]
    (tested, *_) = data.test_dataloader()
    assert tested["ids"] == [0, 1, 3]
