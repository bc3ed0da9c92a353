"""`lit-prune sample`: pictures with questions that micro-LLaVA answers."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lit_prune
from lit_prune.cli import main
from lit_prune.data import InstructData
from lit_prune.micro.world import RESERVED_SEED, SAMPLE_SEED, SKILLS, make_scene
from lit_prune.micro.worlds import WORLDS


def sample(*options) -> list[dict]:
    main(["sample", *map(str, options)])
    folder = Path(options[options.index("--out") + 1]) if "--out" in options else Path("sample")
    return json.loads((folder / "questions.json").read_text())


def failure(capsys, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["sample", *map(str, options)])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pictures_and_questions(capsys):
    records = sample("--out", "a", "--count", 2, "--seed", 5)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in Path("a").iterdir()) == ["0.png", "1.png", "questions.json"]
    for number in range(2):
        scene = make_scene(SAMPLE_SEED + 5 + number)
        assert np.array_equal(np.asarray(Image.open(f"a/{number}.png")), np.asarray(scene.image()))
        asked = [record for record in records if record["image"] == f"{number}.png"]
        assert sorted(record["skill"] for record in asked) == sorted(SKILLS)
    for record in records:
        human, model = (turn["value"] for turn in record["conversations"])
        assert human.removeprefix("<image>\n")[:30] in printed
        assert model in printed
    assert len({record["id"] for record in records}) == len(records) == 14


def test_questions_are_instruction_data():
    """Batches with the boxes that the oracle reads; no sample is a bad one."""
    sample()
    data = InstructData("micro", test="sample/questions.json", eval_batch_size=21)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert len(batch["ids"]) == 21
    assert sorted(set(batch["skills"])) == sorted(SKILLS)


def test_micro_knows_the_answers():
    """Given whole pictures; and pruned to a ninth with DivPrune, most."""
    records = sample("--count", 4)
    images = [f"sample/{record['image']}" for record in records]
    turns = [[turn["value"] for turn in record["conversations"]] for record in records]
    prompts, answers = [human.removeprefix("<image>\n") for human, _ in turns], [model for _, model in turns]
    vlm = lit_prune.load("micro")
    assert vlm.answer(images, prompts, max_new_tokens=8) == answers
    pruned = vlm.attach("divprune", keep=16, positions="original").answer(images, prompts, max_new_tokens=8)
    assert sum(a == b for a, b in zip(pruned, answers, strict=True)) >= 0.8 * len(answers)


def test_the_same_seed_is_the_same_bytes_and_may_run_again():
    sample("--out", "a")
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    sample("--out", "a")
    sample("--out", "b")
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before
    assert {path.name: path.read_bytes() for path in Path("b").iterdir()} == {p.name: x for p, x in before.items()}


def test_another_file_of_that_name_is_not_lost(capsys):
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/1.png")
    kept = Path("photos/1.png").read_bytes()
    assert "photos/1.png is another file" in failure(capsys, "--out", "photos")
    assert [path.name for path in Path("photos").iterdir()] == ["1.png"], "all or nothing"
    assert Path("photos/1.png").read_bytes() == kept


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--count", 0], "--count 0"),
        (["--count", -2], "--count -2"),
        (["--seed", -1], "--seed -1"),
        (["--seed", RESERVED_SEED], "of the seeds 0 to"),
        (["--seed", RESERVED_SEED - SAMPLE_SEED], "of the seeds 0 to"),
    ],
)
def test_numbers_that_cannot_be(capsys, options, says):
    assert says in failure(capsys, *options)
    assert not Path("sample").exists()


def test_a_file_in_place_of_the_folder(capsys):
    Path("x").write_text("mine")
    assert "--out x is a file" in failure(capsys, "--out", "x")
    assert Path("x").read_text() == "mine"


def test_the_pictures_are_nobodys_training_data():
    for world in WORLDS.values():
        assert all(a.stop <= b.start for a, b in pairwise(world.splits.values()))
