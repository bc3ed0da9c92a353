import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from itertools import chain

import pytest
import torch
from instruct_samples import TOKENS, conversation, make_data, write_samples
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from recording import QUIET, Recorder, SaveEverywhere, TwoRanks

from lit_prune.commands.trainer import PruneCLI
from lit_prune.data.conversation import IGNORED
from lit_prune.data.dataset import InstructDataset, concatenate
from lit_prune.data.instruct import InstructData, context_length
from lit_prune.data.loader import dead_workers_explained
from lit_prune.data.micro import MicroData
from lit_prune.data.mixture import WeightedSource
from lit_prune.data.sources import open_source, sample_name
from lit_prune.data.streamed import StreamedData
from lit_prune.errors import LitPruneError


# Batches
@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three samples: one turn, two turns, no image."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    samples = [
        {
            "id": "a",
            "image": "red.png",
            "conversations": conversation("<image>\nQ", "yes"),
            "skill": "existence",
            "boxes": [[0, 1, 2, 3]],
        },
        {"image": "red.png", "conversations": conversation("<image>\nOne", "A", "Two", "BB")},
        {"id": 7, "conversations": conversation("Text", "C")},
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return path


def batch_of(data: InstructData, split: str) -> dict:
    stage, loader = {"train": ("fit", "train_dataloader"), "val": ("validate", "val_dataloader")}.get(
        split, (split, f"{split}_dataloader")
    )
    data.setup(stage)
    return data.on_before_batch_transfer(next(iter(getattr(data, loader)())), 0)


def test_evaluation_batch(processor, mixed):
    batch = batch_of(make_data(processor, test=str(mixed)), "test")
    tokenizer, inputs, prompts = processor.tokenizer, batch["inputs"], batch["prompts"]
    assert batch["ids"] == ["a", 1, 7]
    assert batch["answers"] == ["yes", "BB", "C"]
    assert batch["questions"] == ["Q", "Two", "Text"]
    assert batch["skills"] == ["existence", None, None]
    assert batch["boxes"] == [[[0, 1, 2, 3]], [], []]
    assert batch["records"] == [0, 1, 2]
    assert batch["sources"] == ["", "", ""]
    lists = {"ids", "answers", "questions", "skills", "boxes", "records", "sources"}
    assert set(batch) == {"inputs", "prompts", "hints", *lists}
    assert batch["hints"]["regions"].shape == (3, 1, TOKENS)
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert set(prompts) == set(inputs) - {"labels"}
    assert prompts["pixel_values"] is inputs["pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape
    for row, text in enumerate(
        ["USER: <image>\nQ ASSISTANT:", "USER: <image>\nOne ASSISTANT: A</s>USER: Two ASSISTANT:"]
    ):
        expected = tokenizer(text.replace("<image>", "<image>" * TOKENS))["input_ids"]
        assert prompts["input_ids"][row, -len(expected) :].tolist() == expected
        assert prompts["attention_mask"][row].sum() == len(expected)
        assert inputs["input_ids"][row, : len(expected)].tolist() == expected
    longest = inputs["attention_mask"].sum(1)
    assert (longest[1] > longest[0]) & (longest[0] > longest[2])
    assert (inputs["input_ids"][2, longest[2] :] == tokenizer.pad_token_id).all()
    assert (inputs["labels"][2, longest[2] :] == IGNORED).all()
    assert not inputs["attention_mask"][2, longest[2] :].any()


def test_training_batch_has_no_prompts(processor, mixed):
    batch = batch_of(make_data(processor, train=str(mixed), batch_size=3), "train")
    assert "prompts" not in batch
    assert sorted(batch["records"]) == [0, 1, 2]


def test_prediction_needs_no_answer(processor, tmp_path):
    write_samples(tmp_path, 1)
    path = tmp_path / "ask.jsonl"
    path.write_text(json.dumps({"image": "red.png", "conversations": conversation("<image>\nQ")}))
    batch = batch_of(make_data(processor, predict=str(path)), "predict")
    assert batch["answers"] == [""]
    assert batch["prompts"]["input_ids"].tolist() == batch["inputs"]["input_ids"].tolist()
    assert (batch["inputs"]["labels"] == IGNORED).all()


def test_images_of_different_numbers_of_tiles_are_padded():
    a, b = torch.ones(1, 3, 2, 4), torch.full((2, 1, 2, 4), 2.0)
    whole = concatenate([a, b])
    assert whole.shape == (3, 3, 2, 4)
    assert torch.equal(whole[:1], a)
    assert torch.equal(whole[1:, :1], b)
    assert not whole[1:, 1:].any()


def test_moving_keeps_one_copy_of_the_images(processor, mixed):
    data = make_data(processor, test=str(mixed))
    batch = batch_of(data, "test")
    batch["prompts"]["pixel_values"] = batch["prompts"]["pixel_values"].clone()  # as pinning memory does
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["prompts"]["pixel_values"] is moved["inputs"]["pixel_values"]
    assert {value.device.type for part in ("inputs", "prompts") for value in moved[part].values()} == {"meta"}


def test_the_order_does_not_depend_on_workers_and_all_pickles(processor, tmp_path):
    path = str(write_samples(tmp_path, 21, bad=(3,), name="data.jsonl"))
    orders = []
    for workers in (0, 2):
        data = make_data(processor, train=path, val=path, num_workers=workers)
        data.setup("fit")
        pickle.dumps(data.datasets["train"])
        orders.append(
            [(b["ids"], b["skipped"]) for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader]
        )
    assert orders[0] == orders[1]
    assert sum(bool(skipped) for _, skipped in orders[0]) >= 2


def test_context_of_the_tokenizer(processor):
    assert context_length(processor) is None
    processor.tokenizer.model_max_length, before = 50, processor.tokenizer.model_max_length
    assert context_length(processor) == 50
    processor.tokenizer.model_max_length = before


# Bad samples
def test_training_replaces_and_evaluation_leaves_out(processor, tmp_path, caplog):
    path = write_samples(tmp_path, 24, bad=(4, 5, 20, 21, 22, 23))
    data, model = make_data(processor, train=str(path), val=str(path)), Recorder()
    with caplog.at_level(logging.WARNING, "lit_prune"):
        Trainer(max_epochs=2, default_root_dir=tmp_path / "run", **QUIET).fit(model, data)
    assert [len(ids) for ids in model.seen] == [4] * 12
    assert {"s4", "s20"}.isdisjoint(chain(*model.seen))
    assert list(chain(*model.seen)).count("s6") == 2 * 3  # itself and two it stands for
    sizes = [len(batch["ids"]) for batch in model.evaluated]
    assert sizes == [4, 2, 4, 4, 4, 0] * 2
    assert model.evaluated[5]["inputs"] == model.evaluated[5]["prompts"] == {}
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == ["s20", "s21", "s22", "s23", "s4", "s5"]
    assert lines[0]["file"] == str(path)
    assert "image missing.png is missing" in lines[0]["reason"]
    assert len(caplog.records) == 6
    assert f"{path}: sample s4: image missing.png is missing" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(processor, tmp_path, workers):
    path = str(write_samples(tmp_path, 200, bad=tuple(range(0, 200, 10))))
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path / "run", **QUIET)
    trainer.test(Recorder(), make_data(processor, test=path, max_bad_share=0.11), verbose=False)
    with pytest.raises(LitPruneError, match=r"11 of 104 samples seen in test are bad \(max_bad_share=0.05\); .*jsonl"):
        trainer.test(Recorder(), make_data(processor, test=path, num_workers=workers), verbose=False)
    path = str(write_samples(tmp_path, 8, bad=tuple(range(8))))
    with pytest.raises(LitPruneError, match="8 of 8 samples seen in test are bad"):
        trainer.test(Recorder(), make_data(processor, test=path), verbose=False)
    with pytest.raises(LitPruneError, match="8 of 8 samples seen in train are bad"):
        trainer.fit(Recorder(), make_data(processor, train=path, num_workers=workers))


@pytest.mark.parametrize("boxes", ["abc", 3, [3], [[1, 2, 3]], [[1, 2, 3, "4"]], [[1, 2, 3, float("nan")]], [{}]])
def test_boxes_that_are_none(processor, tmp_path, boxes):
    records = [{"conversations": conversation("Q", "A"), "boxes": given} for given in (boxes, [[0, 1.5, 2, 3]], None)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    fetched = InstructDataset(open_source(tmp_path / "data.jsonl"), processor, mode="eval").__getitems__([0, 1, 2])
    assert [sample.boxes for sample in fetched.samples] == [[[0, 1.5, 2, 3]], []]
    assert "boxes" in fetched.skipped[0][2]


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "\ud800", ["a"], None, 1.5, True])
def test_names_that_are_none(name):
    """Whatever would break a line, a terminal or a file of results: the index stands for it."""
    assert sample_name({"id": name}, 7) == 7
    assert [sample_name({"id": good}, 7) for good in ("ü 1", 0, "x" * 200)] == ["ü 1", 0, "x" * 200]


def test_a_file_that_changes_under_way(processor, tmp_path):
    path = write_samples(tmp_path, 8)
    data = make_data(processor, train=str(path), num_workers=1)
    data.setup("fit")
    write_samples(tmp_path, 9)
    with pytest.raises(LitPruneError, match=r"data.json: the file changed after it was opened$"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_a_worker_that_dies_is_named(processor, tmp_path, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(InstructDataset, "__getitems__", die)  # the forked workers have it too
    data = make_data(processor, train=str(write_samples(tmp_path, 8)), num_workers=1, prefetch_factor=3)
    with pytest.raises(LitPruneError, match=r"a process that reads data died: .* lower data.num_workers or data.pref"):
        Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(Recorder(), data)


def test_a_worker_that_dies_during_a_step_is_named(processor, tmp_path, monkeypatch):
    # torch installs its handler of a child's death once a process, and Lightning takes it away behind the first run
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)

    class Killer(Recorder):
        def training_step(self, batch, batch_idx):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(30)  # the handler raises here
            raise AssertionError("nobody noticed")

    data = make_data(processor, train=str(write_samples(tmp_path, 40)), num_workers=1)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(LitPruneError, match="a process that reads data died"), dead_workers_explained():
        trainer.fit(Killer(), data)


def test_wrong_settings(processor, tmp_path):
    path = str(write_samples(tmp_path, 2))
    with pytest.raises(LitPruneError, match="data: train is not given: fit needs"):
        make_data(processor, val=path).setup("fit")
    with pytest.raises(LitPruneError, match="no such file"):
        make_data(processor, test=path + "x").setup("test")
    with pytest.raises(LitPruneError, match="is no folder"):
        make_data(processor, test=path, images=str(tmp_path / "none")).setup("test")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(LitPruneError, match=r"empty.json: no samples"):
        make_data(processor, test=str(tmp_path / "empty.json")).setup("test")


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("batch_size", "eval_batch_size", "max_length", "prefetch_factor")),
        *({name: -1} for name in ("num_workers", "seed")),
        *({"max_bad_share": share} for share in (-0.1, 1.1, float("nan"))),
    ],
    ids=str,
)
def test_numbers_that_cannot_be(processor, wrong):
    with pytest.raises(LitPruneError, match=rf"data.{next(iter(wrong))} is .*; it must be "):
        make_data(processor, train="a.json", **wrong)


def test_options_that_are_passed_on_are_known_to_the_command_line():
    """jsonargparse finds them in the code of the parent; what the parent is given already is no option."""

    def keys(data: type) -> set[str]:
        parser = ArgumentParser()
        parser.add_class_arguments(data, "data")
        return {action.dest.removeprefix("data.") for action in parser._actions} - {"help", "config"}

    options = keys(InstructData)
    assert keys(StreamedData) == options - {"group_by_length"} | {"steps", "block"}
    own = {"root", "train_samples", "val_samples", "test_samples", "data_seed", "questions_per_image"}
    own |= {"world", "train_skills"}
    assert keys(MicroData) == options - {"train", "val", "test", "predict", "images"} | own


# Mixtures
@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sources of 30 and 10 samples; every fifth of the second is bad, its images lie elsewhere."""
    folder = tmp_path_factory.mktemp("two")
    first = write_samples(folder / "a", 30)
    second = write_samples(folder / "b", 10, bad=(0, 5), name="data.jsonl")
    (folder / "b" / "red.png").rename(folder / "red.png")
    return [WeightedSource(str(first), weight=1), WeightedSource(str(second), str(folder), weight=3)]


def test_a_mixture_of_sources(processor, two, tmp_path):
    data, model = make_data(processor, train=two, batch_size=5, max_bad_share=0.3), Figures()
    Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET).fit(model, data)
    sources = Counter(chain(*model.sources))
    assert sources == {"data": 2 * 10, "data-2": 2 * 30}
    assert model.figures["share/data"] == 0.25
    assert model.figures["share/data-2"] == 0.75
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["file"], line["sample"]) for line in lines} == {(two[1].data, "s0"), (two[1].data, "s5")}
    later = [(name, sample) for name, sample in zip(chain(*model.sources), chain(*model.seen), strict=True)]
    assert Counter(later)["data-2", "s1"] == 2 * Counter(later)["data-2", "s2"] == 12  # replaced within its source
    assert all(Counter(later)["data", f"s{i}"] <= 1 for i in range(30))


class Figures(Recorder):
    """Notes where the samples come from."""

    def __init__(self):
        super().__init__()
        self.sources: list[list[str]] = []

    def training_step(self, batch, batch_idx):
        self.sources.append(batch["sources"])
        self.figures = batch["figures"]
        return super().training_step(batch, batch_idx)


def test_a_mixture_does_not_depend_on_workers_and_resumes(processor, two, tmp_path):
    whole = run(processor, two, tmp_path, callbacks=[SaveEverywhere(tmp_path)], max_epochs=2, max_bad_share=0.5)
    for workers, done in ((0, 3), (2, 11)):
        checkpoint = next(tmp_path.glob(f"*-batch-{done}.ckpt"))
        again = run(processor, two, tmp_path, str(checkpoint), workers=workers, max_epochs=2, max_bad_share=0.5)
        assert again.seen == whole.seen[done:]
        assert torch.equal(again.weight, whole.weight)
    two = [WeightedSource(two[0].data, weight=1), WeightedSource(two[1].data, two[1].images, weight=2)]
    with pytest.raises(LitPruneError, match=r"weights \[1, 3\], the data given now \[1, 2\]"):
        run(processor, two, tmp_path, str(checkpoint), max_epochs=2)


def test_one_source_as_a_dict(processor, tmp_path):
    data = make_data(processor, train={"data": "a.json", "name": "pets"})
    assert data.sources == [WeightedSource("a.json", name="pets")]


def test_a_list_of_files_is_every_sample_once(processor, tmp_path):
    paths = [str(write_samples(tmp_path, count, name=name)) for count, name in ((9, "a.json"), (6, "b.jsonl"))]
    data = make_data(processor, train=paths, batch_size=5)
    data.setup("fit")
    seen = [pair for batch in data.train_dataloader() for pair in zip(batch["sources"], batch["ids"], strict=True)]
    assert sorted(seen) == sorted([("a", f"s{i}") for i in range(9)] + [("b", f"s{i}") for i in range(6)])
    assert pickle.loads(pickle.dumps(data.datasets["train"])).sizes == (9, 6)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "an empty list"),
        ([WeightedSource("a", weight=1), "b.json"], "some sources have a weight, b.json has none"),
        ([WeightedSource("a", name="x"), WeightedSource("b", name="x")], "two sources named x"),
        ([{"data": "a", "weight": "much"}], "is no source: .* weight .a number. only"),
        ([{"data": None}], "is no source"),
        ([WeightedSource("a/x.json"), WeightedSource("b", name="x")], "two sources named x"),
    ],
)
def test_wrong_mixtures(processor, train, message):
    with pytest.raises(LitPruneError, match=message):
        make_data(processor, train=train)


def test_a_mixture_from_a_configuration(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text(
        "data:\n  class_path: lit_prune.data.InstructData\n  init_args:\n    train:\n"
        "      - {data: a.json, images: ra, weight: 2.0}\n      - {data: b.parquet, weight: 1, name: bees}\n"
    )
    micro = ["-c", "configs/micro.yaml", "-c", "configs/pruners/fastv.yaml"]
    data = PruneCLI(None, [*micro, "-c", str(file)]).datamodule
    assert data.sources == [WeightedSource("a.json", "ra", 2.0, "a"), WeightedSource("b.parquet", None, 1.0, "bees")]
    for given, names in (("x/c.json", ["c"]), ("[c.json, d.json]", ["c", "d"])):
        data = PruneCLI(None, [*micro, "--data=lit_prune.data.InstructData", f"--data.train={given}"]).datamodule
        assert [source.name for source in data.sources] == names


def test_a_path_on_the_command_line_is_one_source(tmp_path):
    """Also where the file is there: jsonargparse reads a file that may be a list of objects."""
    path = write_samples(tmp_path, 3)
    chosen = ["--data=lit_prune.data.InstructData", f"--data.init_args.train={path}"]
    data = PruneCLI(None, ["-c", "configs/micro.yaml", "-c", "configs/pruners/fastv.yaml", *chosen]).datamodule
    assert [source.data for source in data.sources] == [str(path)]


def test_a_key_that_no_source_has(processor):
    with pytest.raises(LitPruneError, match="is no source"):
        make_data(processor, train=[{"data": "a.json", "wieght": 1}])


# Resuming
def run(processor, train, folder, checkpoint=None, callbacks=(), workers=0, max_bad_share=0.05, **options) -> Recorder:
    train, val = (train, None) if isinstance(train, list) else (str(train), str(train))
    model, data = (
        Recorder(),
        make_data(processor, train=train, val=val, num_workers=workers, seed=5, max_bad_share=max_bad_share),
    )
    settings = {**QUIET, "max_epochs": 3, "default_root_dir": folder, **options}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        settings["enable_checkpointing"] = False
    Trainer(callbacks=list(callbacks), **settings).fit(model, data, ckpt_path=checkpoint)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 3}, {"limit_train_batches": 4, "reload_dataloaders_every_n_epochs": 1}]
)
def test_resume_from_any_moment_equals_uninterrupted(processor, tmp_path, options):
    path = write_samples(tmp_path / "data", 22, bad=(3,))  # 5 batches of 4 an epoch
    whole = run(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)], max_epochs=2, **options)
    per_epoch = options.get("limit_train_batches", 5)
    assert len(whole.seen) == 2 * per_epoch
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 2 * (per_epoch + 2)
    for checkpoint in checkpoints:
        done = int(checkpoint.stem.rsplit("-", 1)[1])
        again = run(processor, path, tmp_path, str(checkpoint), max_epochs=2, **options)
        assert again.seen == whole.seen[done:], checkpoint.name
        assert torch.equal(again.weight, whole.weight), checkpoint.name


def test_resume_with_workers(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    whole = run(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)], workers=2, max_epochs=2)
    for done in (2, 5, 7):
        checkpoint = next(tmp_path.glob(f"*-batch-{done}.ckpt"))
        again = run(processor, path, tmp_path, str(checkpoint), workers=2, max_epochs=2)
        assert again.seen == whole.seen[done:]
        assert torch.equal(again.weight, whole.weight)


def test_more_steps_after_max_steps(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    whole = run(processor, path, tmp_path, max_epochs=-1, max_steps=13)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    first = run(processor, path, tmp_path, callbacks=[saver], max_epochs=-1, max_steps=3)
    rest = run(processor, path, tmp_path, str(tmp_path / "last.ckpt"), max_epochs=-1, max_steps=13)
    assert first.seen + rest.seen == whole.seen


def test_other_data_is_refused(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    run(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)], max_epochs=1)
    path = write_samples(tmp_path / "data", 30)
    with pytest.raises(LitPruneError, match=r"cannot resume: .* sizes \[22\]"):
        run(processor, path, tmp_path, str(sorted(tmp_path.glob("*.ckpt"))[0]))


def test_other_records_are_refused_however_many(processor, tmp_path):
    path = write_samples(tmp_path / "data", 22)
    run(processor, path, tmp_path, callbacks=[SaveEverywhere(tmp_path)], max_epochs=1)
    checkpoint = str(sorted(tmp_path.glob("*.ckpt"))[0])
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # the same in another dress
    run(processor, path, tmp_path, checkpoint, max_epochs=1)
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    with pytest.raises(LitPruneError, match=r"cannot resume: .* fingerprints"):
        run(processor, path, tmp_path, checkpoint, max_epochs=1)


# Two processes
@pytest.mark.parametrize("weights", [None, (1, 2)], ids=["one source", "a mixture by length"])
def test_two_processes_share_each_batch_and_resume(processor, tmp_path, weights):
    path = str(write_samples(tmp_path / "data", 21, bad=(20,)))
    train, options = path, {}
    if weights:
        other = str(write_samples(tmp_path / "more", 9, name="more.jsonl"))
        train = [WeightedSource(data, weight=weight) for data, weight in zip((path, other), weights, strict=True)]
        options = {"group_by_length": True}

    def fit(checkpoint=None, callbacks=()):
        data = make_data(processor, train=train, val=path, batch_size=2, seed=5, **options)
        trainer = Trainer(
            strategy="ddp_fork",
            devices=2,
            max_epochs=1,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **QUIET,
        )
        trainer.fit(TwoRanks(tmp_path), data, ckpt_path=checkpoint)
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    first, second = fit(callbacks=[SaveEverywhere(tmp_path)])
    alone = Recorder()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    trainer.fit(alone, make_data(processor, train=train, batch_size=4, seed=5, **options))
    assert [sorted(a + b) for a, b in zip(first["train"], second["train"], strict=True)] == [
        sorted(ids) for ids in alone.seen
    ]
    assert [len(first["val"]), len(second["val"])] == [3, 3]
    assert sorted(chain(*first["val"], *second["val"])) == sorted(f"s{i}" for i in range(20))
    again = fit(str(next(tmp_path.glob("*-batch-2.ckpt"))))
    assert [rank["train"] for rank in again] == [first["train"][2:], second["train"][2:]]
