"""The README's "Add a method", followed in a copy of the sources, whose tests of methods take the new one too."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from documents import Block, blocks
from tiny import ROOT

BIN = Path(sys.executable).parent
SHOWN = [block for block in blocks(ROOT / "README.md") if block.file]
WIDE = ("test_floors.py", "test_shipped.py")  # of every module, of every configuration
CORE = ("test_equality.py", "test_pruners.py", "test_positions.py")
QUIET = ["-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]


def in_copy(copy: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def copy_with(folder: Path, shown: list[Block]) -> Path:
    """The sources and tests, with files from a document."""
    for name in ("lit_prune", "configs", "tests", "jobs", "docs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for block in shown:
        assert not (folder / block.file).exists(), f"{block.file} is there already"
        (folder / block.file).write_text(block.text.partition("\n")[2])  # without the line that names the file
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return copy_with(tmp_path_factory.mktemp("clone"), SHOWN)


def battery(copy: Path, core: bool = False) -> subprocess.CompletedProcess[str]:
    """The tests that have the new method's name in theirs, of the modules that go through all methods or the core."""
    tests = copy / "tests"
    modules = [path for path in sorted(tests.glob("test_*.py")) if re.search(r"\bPRUNERS\b", path.read_text())]
    modules = [path for path in modules if path.name in CORE] if core else modules
    return in_copy(
        copy, sys.executable, "-m", "pytest", *QUIET, "-k", name_of(SHOWN), *modules, *map(tests.joinpath, WIDE)
    )


def name_of(shown: list[Block]) -> str:
    (name,) = {Path(block.file).stem for block in shown}
    return name


def test_a_method_is_one_file_and_one_configuration():
    assert [Path(block.file).parent.as_posix() for block in SHOWN] == ["lit_prune/pruners", "configs/pruners"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("core", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_new_method_passes_the_tests_of_methods(copy, core):
    ran = battery(copy, core)
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= (15 if core else 45)


def test_the_new_file_has_the_projects_style(copy):
    files = [block.file for block in SHOWN if block.language == "python"]
    for command in (["check"], ["format", "--check"]):
        checked = in_copy(copy, BIN / "ruff", *command, *files)
        assert checked.returncode == 0, checked.stdout


def test_commands_pick_it_up(copy):
    """By its name, like any shipped one."""
    name = name_of(SHOWN)
    listed = in_copy(copy, sys.executable, "-m", "lit_prune", "configs", "list", f"pruners/{name}")
    assert listed.stdout.split()[:1] == [f"pruners/{name}"]
    priced = in_copy(copy, sys.executable, "-m", "lit_prune", "cost", "--pruner", name, "--keep", "128")
    assert priced.returncode == 0, priced.stderr


def test_it_is_a_sensible_example(copy):
    """On micro-LLaVA, at a ninth of the tokens, far better than chance: random tokens answer 43 %."""
    code = f"""
import lit_prune
from lit_prune.micro.world import VALIDATION_SEED, choose_questions, make_scene
scenes = [make_scene(VALIDATION_SEED + i) for i in range(10)]
asked = [(scene.image(), question) for scene in scenes for question in choose_questions(scene, 7)]
right = {{}}
vlm = lit_prune.load("micro")
for name in ("random", "{name_of(SHOWN)}"):
    vlm.attach(name, keep=16)
    answers = vlm.answer([image for image, _ in asked], [question.text for _, question in asked], max_new_tokens=4)
    right[name] = sum(answer == question.answer for answer, (_, question) in zip(answers, asked)) / len(asked)
print(*right.values())
"""
    ran = in_copy(copy, sys.executable, "-c", code)
    assert ran.returncode == 0, ran.stderr
    by_chance, found = map(float, ran.stdout.split())
    assert found > by_chance + 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_method_that_ranks_noise_fails_there(tmp_path):
    """States after the input norm are nearly equally long, so their order is that of rounding errors."""
    changed = [re.sub(r"return 1 - .*", "return context.visual.norm(dim=-1)", block.text) for block in SHOWN]
    assert changed != [block.text for block in SHOWN]
    noisy = [replace(block, text=text) for block, text in zip(SHOWN, changed, strict=True)]
    ran = battery(copy_with(tmp_path, noisy))
    assert ran.returncode == 1, ran.stdout
