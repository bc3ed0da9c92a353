import json
import logging
from dataclasses import replace

import pytest
from PIL import Image

from lit_prune.data import micro as module
from lit_prune.data.micro import MicroData, seeds_of
from lit_prune.errors import LitPruneError
from lit_prune.micro.model import build, build_processor
from lit_prune.micro.world import RESERVED_SEED, SAMPLE_SEED, SKILLS
from lit_prune.micro.worlds import WORLDS

MICRO = WORLDS["micro"]
PAGE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("micro")


def make_data(root, **options) -> MicroData:
    sizes = {"train_samples": 20, "val_samples": 8, "test_samples": 15}
    data = MicroData(root=str(root), batch_size=4, eval_batch_size=8, **{**sizes, **options})
    data.processor = build_processor()
    return data


def test_reads_like_any_instruction_data(root, caplog):
    data = make_data(root)
    data.prepare_data()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert {split: len(it) for split, it in data.datasets.items()} == {
        "train": 20,
        "val": 8,
        "test": 15,
        "predict": 15,
    }
    assert data.max_length == 1024
    with caplog.at_level(logging.WARNING, "lit_prune"):
        batch = data.on_before_batch_transfer(next(iter(data.test_dataloader())), 0)
        for found in data.train_dataloader():
            data.on_before_batch_transfer(found, 0)
    assert not caplog.records
    assert batch["inputs"]["pixel_values"].shape == (8, 3, 96, 96)
    assert set(batch["skills"]) <= set(SKILLS)
    assert len(set(batch["skills"])) == 7
    assert any(batch["boxes"])
    words = build_processor().tokenizer.batch_decode(batch["prompts"]["input_ids"])
    assert all(text.rstrip().endswith("assistant:") for text in words)
    assert "<unk>" not in "".join(words)


def test_processor_and_context_come_from_the_base_model(root, tmp_path):
    model, processor = build()
    processor.tokenizer.model_max_length = 10**30
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    data = MicroData(str(tmp_path), root=str(root), train_samples=20, val_samples=8, test_samples=15)
    data.prepare_data()
    data.setup("test")
    assert data.max_length == 1024
    assert data.processor.tokenizer.model_max_length > 1e9


def test_written_once_and_the_same_every_time(root, tmp_path, monkeypatch):
    data, again = make_data(root), make_data(tmp_path)
    data.prepare_data()
    again.prepare_data()
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((root / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    monkeypatch.setattr(module.instructions, "write_world", None)
    make_data(root).prepare_data()
    with pytest.raises(TypeError):
        make_data(root, data_seed=1).prepare_data()


def test_an_interrupted_write_is_not_taken_for_whole(tmp_path, monkeypatch):
    calls = []

    def interrupted(world, folder, *_):
        (folder / "instructions.json").write_text("[")
        calls.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.instructions, "write_world", interrupted)
    data = make_data(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    data.prepare_data()
    assert len(json.loads((data.splits["train"].folder(tmp_path) / "instructions.json").read_text())) == 20


def test_another_process_was_faster(tmp_path, monkeypatch):
    data, write = make_data(tmp_path), module.instructions.write_world

    def beaten(*arguments):
        monkeypatch.undo()
        make_data(tmp_path).prepare_data()
        return write(*arguments)

    monkeypatch.setattr(module.instructions, "write_world", beaten)
    data.prepare_data()
    assert len(list(tmp_path.iterdir())) == 3


def test_splits_and_data_seeds_are_disjoint():
    ranges = [seeds_of(MICRO, split, 20, 7, data_seed) for split in ("train", "val", "test") for data_seed in range(3)]
    seeds = [seed for found in ranges for seed in found]
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 3
    assert max(seeds.stop for name, seeds in MICRO.splits.items() if name != "sample") == SAMPLE_SEED < RESERVED_SEED
    for wrong in (("val", 7_000_007, 7, 0), ("test", 700, 7, 20_000), ("train", 7, 7, -1), ("train", 0, 7, 0)):
        with pytest.raises(LitPruneError, match=wrong[0]):
            seeds_of(MICRO, *wrong)
    assert seeds_of(MICRO, "val", 7_000_000, 7, 0).stop == 6_000_000


def test_images_are_of_the_written_scene(root):
    data = make_data(root)
    data.prepare_data()
    folder = data.splits["val"].folder(root)
    first = json.loads((folder / "instructions.json").read_text())[0]
    assert Image.open(folder / first["image"]).size == (96, 96)
    assert first["id"].startswith("5000000")


def test_the_world_is_the_base_models(tmp_path):
    """Of micro-576 the large one, of any other model the small one, and either by name."""
    sizes = {"train_samples": 1, "val_samples": 1, "test_samples": 1}
    assert MicroData("micro-576", root=str(tmp_path), **sizes).splits["val"].world is WORLDS["micro-576"]
    assert MicroData("micro", root=str(tmp_path), **sizes).splits["val"].world is MICRO
    assert MicroData("a/b", root=str(tmp_path), world="micro-576", **sizes).splits["val"].world is WORLDS["micro-576"]
    with pytest.raises(LitPruneError, match=r"no world 'mikro': give micro or micro-576"):
        MicroData("micro", world="mikro", **sizes)


def test_scenes_of_the_large_world_are_written_too(tmp_path):
    data = MicroData(
        "micro-576", root=str(tmp_path), train_samples=2, val_samples=36, test_samples=2, questions_per_image=18
    )
    split = data.splits["val"]
    split.write(tmp_path)
    samples = json.loads((split.folder(tmp_path) / "instructions.json").read_text())
    assert len(samples) == 36
    assert {sample["skill"] for sample in samples} >= set(WORLDS["micro-576"].skills[:3])
    with Image.open(split.folder(tmp_path) / samples[0]["image"]) as image:
        assert image.size == (192, 192)


def test_training_on_some_skills_leaves_evaluation_as_it_is(root):
    data, chosen = make_data(root, train_skills=["shape", "colour"]), make_data(root)
    data.prepare_data()
    chosen.prepare_data()
    assert {split: it.folder(root) for split, it in data.splits.items() if split != "train"} == {
        split: it.folder(root) for split, it in chosen.splits.items() if split != "train"
    }
    samples = json.loads((data.splits["train"].folder(root) / "instructions.json").read_text())
    assert len(samples) == 20
    assert {sample["skill"] for sample in samples} == {"shape", "colour"}
    assert data.splits["train"].folder(root) == make_data(root, train_skills=["colour", "shape"]).splits[
        "train"
    ].folder(root)
    for wrong, says in (([], "train_skills is empty"), (["taste"], "'taste' is not one of")):
        with pytest.raises(LitPruneError, match=says):
            make_data(root, train_skills=wrong)


@pytest.mark.parametrize(("skill", "an_image", "samples"), [("direction", 18, 60), ("size", 1, 40), ("words", 18, 5)])
def test_a_rare_skill_has_enough_questions(tmp_path, monkeypatch, skill, an_image, samples):
    """Not every scene can be asked about it; none is drawn that isn't needed."""
    drawn = []
    monkeypatch.setattr(
        type(WORLDS["micro-576"].make_scene(0)), "image", lambda scene: drawn.append(scene.seed) or PAGE
    )
    sizes = {"train_samples": samples, "val_samples": 1, "test_samples": 1, "questions_per_image": an_image}
    split = MicroData("micro-576", root=str(tmp_path), train_skills=[skill], **sizes).splits["train"]
    split.write(tmp_path)
    asked = json.loads((split.folder(tmp_path) / "instructions.json").read_text())
    assert [sample["skill"] for sample in asked] == [skill] * samples
    assert len(drawn) < len(split.seeds)
    assert asked[-1]["image"].endswith(f"{drawn[-1]:07d}.png"), "the last picture is of the last question"


def test_too_few_questions_of_a_skill_say_what_to_do(tmp_path, monkeypatch):
    """Before any picture is drawn."""
    split = MicroData("micro-576", root=str(tmp_path), train_samples=9, train_skills=["size"]).splits["train"]
    split.world = replace(split.world, choose=lambda scene, count: [])
    with pytest.raises(
        LitPruneError, match="have 0 questions of size, fewer than 9: name more skills, or give a larger"
    ):
        split.write(tmp_path)
    assert not list(tmp_path.iterdir())
