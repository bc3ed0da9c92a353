"""The configurations in the package: found from anywhere, listed, copied, and in the wheel with all other data."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

import lit_prune
from lit_prune.cli import UsageError, main
from lit_prune.commands._support.options import parse_verb
from lit_prune.commands.trainer import build
from lit_prune.errors import LitPruneError
from lit_prune.files.shipped import FOLDER, config_names, config_or_text, description, find_config
from lit_prune.vlm import as_plugin

PACKAGE = Path(lit_prune.__file__).parent
SOURCES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working folder without configurations."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(capsys, *words) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    return (code, *capsys.readouterr())


# -- finding --------------------------------------------------------------------------------------------------------
def test_the_package_has_every_configuration_of_the_repository():
    assert [FOLDER / path.relative_to(ROOT / "configs") for path in SOURCES] == sorted(FOLDER.glob("**/*.yaml"))
    assert len(config_names()) == len(SOURCES) > 40


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("micro.yaml", "", "micro.yaml"),
        ("micro", "", "micro.yaml"),
        ("configs/micro.yaml", "", "micro.yaml"),
        ("configs/pruners/fastv.yaml", "", "pruners/fastv.yaml"),
        ("pruners/fastv", "", "pruners/fastv.yaml"),
        ("rcp", "", "rcp.yaml"),
        ("rcp", "pruners", "pruners/rcp.yaml"),
        ("rcp.yaml", "pruners", "pruners/rcp.yaml"),
        ("configs/rcp.yaml", "pruners", "rcp.yaml"),
        ("models/qwen2.5-vl-7b", "pruners", "models/qwen2.5-vl-7b.yaml"),
        (Path("configs/bench/pruners/rcp.yaml"), "pruners", "bench/pruners/rcp.yaml"),
    ],
)
def test_shipped_files_are_found_by_path_and_by_name(name, kind, file):
    assert find_config(name, kind) == FOLDER / file


def test_a_file_that_is_here_comes_first(elsewhere):
    for local in ("micro.yaml", "configs/rcp.yaml", "configs/pruners/fastv.yaml"):
        (elsewhere / local).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / local).touch()
    assert find_config("micro.yaml") == Path("micro.yaml")
    assert find_config("rcp.yaml") == Path("configs/rcp.yaml")
    assert find_config("fastv", "pruners") == Path("configs/pruners/fastv.yaml")
    assert find_config("uniform", "pruners") == FOLDER / "pruners" / "uniform.yaml"
    assert find_config("micro") == FOLDER / "micro.yaml", "a name without suffix is no file of this folder"


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("mirco.yaml", "", "did you mean `micro.yaml`"),
        ("fastw", "pruners", "no method `fastw`; did you mean `fastv`?"),
        ("FastV", "pruners", "did you mean `fastv`?"),
        ("fastv.yaml", "", "did you mean `pruners/fastv.yaml`"),
        ("strategies/dpp.yaml", "", "did you mean `strategies/ddp.yaml`"),
        ("/nowhere/mine.yaml", "", "/nowhere/mine.yaml: No such file (`lit-prune configs` lists"),
        ("../../etc/passwd", "", "no configuration `../../etc/passwd` (`lit-prune configs` lists"),
        ("", "", "no configuration ``"),
        ("configs", "", "no configuration `configs`"),
    ],
)
def test_what_is_not_there_names_the_closest(name, kind, says):
    with pytest.raises(LitPruneError) as refused:
        find_config(name, kind)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_of_ones_own_is_suggested_first(elsewhere):
    (elsewhere / "micro_mine.yaml").touch()
    with pytest.raises(LitPruneError, match=r"did you mean `micro_mine\.yaml`\?"):
        find_config("micro_mime.yaml")


# -- on the command line and in Python ------------------------------------------------------------------------------
def test_options_of_a_command_line_are_looked_up(elsewhere, capsys):
    """Each form of `--config`; what is here, or text of its own, is as it is, and so is any other option."""
    (elsewhere / "mine.yaml").write_text("model: {lr: 0.25}")
    line = ["-c", "micro.yaml", "--config=pruners/fastv.yaml", "-cmine.yaml", "--config", "{model: {keep: 3}}"]
    code, printed, _ = output(capsys, "fit", *line, "--model.base", "micro.yaml", "--print_config")
    model = yaml.safe_load(printed)["model"]
    assert code == 0
    assert model["pruner"]["class_path"].endswith("FastV")
    assert (model["keep"], model["base"]) == (3, "micro.yaml")


def test_whatever_is_here_is_left_as_it_is_written(elsewhere):
    """A file of any name, a pipe, text in place of a file, an address."""
    (elsewhere / "micro").write_text("model: {keep: 3}")
    for value in ("micro", "/dev/stdin", "{}", "model: {keep: 3}", "x" * 5000, "a\0b", "https://x.org/micro.yaml", ""):
        assert config_or_text(value) == value


@pytest.mark.parametrize("files", [["micro.yaml", "configs/pruners/fastv.yaml"], ["micro", "pruners/fastv"]])
def test_a_run_is_built_from_shipped_files(files, micro_folder):
    made = build(files, [f"--model.base={micro_folder}", "--trainer.logger=false"])
    assert type(made.model.plugin.pruner).__name__ == "FastV"
    assert made.model.keep == 16


def test_print_config_of_a_shipped_file(capsys):
    code, printed, _ = output(capsys, "fit", "-c", "rcp.yaml", "-c", "strategies/ddp.yaml", "--print_config")
    assert code == 0
    assert yaml.safe_load(printed)["model"]["base"] == "llava-hf/llava-1.5-7b-hf"


def test_a_file_that_is_nowhere_is_named_with_the_closest(capsys):
    code, _, said = output(capsys, "fit", "-c", "mirco.yaml")
    assert (code, said) == (2, "error: no configuration file `mirco.yaml`; did you mean `micro.yaml` or "
                               "`sweeps/micro.yaml`?\n")  # fmt: skip


def test_files_named_inside_shipped_files_are_found():
    """Methods of a bench file, and the command of a sweep."""
    from lit_prune.commands.bench import _method

    _, options = parse_verb("bench", ["-c", "configs/bench/cpu.yaml"])
    methods = [_method(spec, None) for spec in options["methods"]]
    assert [type(m.plugin.pruner).__name__ for m in methods] == ["Full", "FastV", "RCP", "RCP", "RCP"]
    for name in config_names("sweeps"):
        command = yaml.safe_load(find_config(name).read_text())["command"]
        used = [command[i + 1] for i, word in enumerate(command) if word == "-c"]
        assert used
        assert [config_or_text(file) for file in used] == [str(find_config(file)) for file in used]


def test_verbs_find_their_file():
    _, options = parse_verb("sweep", ["-c", "sweeps/micro.yaml"])
    assert options["config"] == str(FOLDER / "sweeps" / "micro.yaml")
    _, options = parse_verb("compare", ["-c", "rcp.yaml"])
    assert options["config"] == [str(FOLDER / "rcp.yaml")]


@pytest.mark.parametrize("name", [n.rpartition("/")[2] for n in config_names("pruners")])
def test_every_method_attaches_by_its_name(name):
    by_name, by_file = as_plugin(name), as_plugin(ROOT / "configs" / "pruners" / f"{name}.yaml")
    assert by_name.settings() == by_file.settings()


def test_all_methods_are_compared_where_no_folder_is_here(elsewhere):
    from lit_prune.commands.compare import _all_methods

    assert _all_methods() == ["full", *config_names("pruners")]
    (elsewhere / "configs" / "pruners").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "pruners" / "fastv.yaml", "configs/pruners/mine.yaml")
    assert _all_methods() == ["full", "configs/pruners/mine.yaml"]


# -- lit-prune configs ----------------------------------------------------------------------------------------------
def test_each_is_listed_on_a_line_with_what_it_says_of_itself(capsys):
    code, printed, _ = output(capsys, "configs")
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert code == 0
    assert [line[0] for line in lines] == list(config_names())
    assert all(len(line) == 2 for line in lines), "a file that doesn't say in its first comment what it is"
    assert dict(lines)["pruners/random"] == "Random tokens: a control."
    assert dict(lines)["rcp"] == description(FOLDER / "rcp.yaml") != ""


def test_a_description_is_the_first_sentence(elsewhere):
    for text, found in [
        ("# One. Two.\nmodel:\n", "One."),
        ("# LLaVA-1.5: a model\n# of two lines. More.\n", "LLaVA-1.5: a model of two lines."),
        ("model: {}\n# late\n", ""),
        ("", ""),
    ]:
        (elsewhere / "x.yaml").write_text(text)
        assert description(elsewhere / "x.yaml") == found


def test_part_of_the_list(capsys):
    code, printed, _ = output(capsys, "configs", "list", "strategies", "micro")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == [
        "micro", "strategies/ddp", "strategies/deepspeed_2", "strategies/deepspeed_3"
    ]  # fmt: skip


def test_copies_are_the_files_and_keep_their_folders(capsys, elsewhere):
    code, printed, _ = output(capsys, "configs", "copy", "micro", "fastv", "sweeps", "--to", "mine")
    assert code == 0
    copied = sorted(path.relative_to("mine").as_posix() for path in Path("mine").rglob("*.yaml"))
    assert copied == [
        "micro.yaml", "pruners/fastv.yaml", "sweeps/budgets.yaml", "sweeps/micro.yaml", "sweeps/rcp.yaml"
    ]  # fmt: skip
    assert sorted(printed.splitlines()) == [f"mine/{path}" for path in copied]
    for path in copied:
        assert Path("mine", path).read_bytes() == (ROOT / "configs" / path).read_bytes()
        assert not Path("mine", path).is_symlink()


def test_copies_of_all_make_the_repositorys_folder(capsys):
    assert output(capsys, "configs", "copy")[0] == 0
    assert sorted(path.relative_to("configs") for path in Path("configs").rglob("*.yaml")) == [
        path.relative_to(ROOT / "configs") for path in SOURCES
    ]


def test_a_file_that_was_edited_is_not_lost(capsys, elsewhere):
    assert output(capsys, "configs", "copy", "micro")[0] == 0
    assert output(capsys, "configs", "copy", "micro")[0] == 0, "the same file is no loss"
    Path("configs/micro.yaml").write_text("mine")
    code, _, said = output(capsys, "configs", "copy", "micro", "pruners")
    assert code == 1
    assert "configs/micro.yaml is there and differs" in said
    assert Path("configs/micro.yaml").read_text() == "mine"
    assert not Path("configs/pruners").exists(), "all or nothing"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["copy", "mirco"], 1, "did you mean `micro`"),
        (["list", "nothing-like-it"], 1, "no shipped configuration `nothing-like-it`"),
        (["cpoy", "micro"], 2, "`action`: expected one of ['list', 'copy'], got cpoy"),
    ],
)
def test_wrong_words_are_refused_in_one_line(capsys, words, code, says):
    found, _, said = output(capsys, "configs", *words)
    assert found == code
    assert said.count("\n") == 1
    assert says in said


def test_leading_words_are_the_first_parameters_in_order():
    _, options = parse_verb("configs", ["copy", "micro", "fastv", "--to", "x"])
    assert (options["action"], options["names"], options["to"]) == ("copy", ["micro", "fastv"], Path("x"))
    _, options = parse_verb("export", ["last.ckpt", "--out", "plugin"])
    added = {"push": None, "private": False, "license": None}
    assert options == {"checkpoint": Path("last.ckpt"), "out": Path("plugin"), **added}
    with pytest.raises(UsageError, match="extra"):
        parse_verb("export", ["last.ckpt", "plugin", "extra"])


# -- the wheel ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that nothing is left in the tree and nothing stale is taken from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lit_prune", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    subprocess.run(command, cwd=source, check=True)
    (file,) = source.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_code_and_data_and_nothing_else(wheel):
    names = set(wheel.namelist())
    own = {name for name in names if ".dist-info/" not in name}
    tracked = {
        f"lit_prune/{path.relative_to(PACKAGE).as_posix()}"
        for pattern in ("**/*.py", "micro/weights/*", "micro/weights_576/*", "cost/shapes/*/*.json", "py.typed")
        for path in PACKAGE.glob(pattern)
    }
    configs = {f"lit_prune/files/{path.relative_to(ROOT).as_posix()}" for path in SOURCES}
    assert own == tracked | configs
    assert {
        "lit_prune/py.typed",
        "lit_prune/files/configs/micro.yaml",
        "lit_prune/files/configs/pruners/fastv.yaml",
    } <= own
    assert {f"lit_prune/micro/{folder}/model.safetensors" for folder in ("weights", "weights_576")} <= own
    assert "lit_prune/cost/shapes/llava-hf/llava-1.5-7b-hf.json" in own


def test_the_wheels_files_are_the_repositorys(wheel):
    for path in SOURCES:
        assert wheel.read(f"lit_prune/files/{path.relative_to(ROOT).as_posix()}") == path.read_bytes()
    scripts = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "lit-prune = lit_prune.cli:main" in scripts
