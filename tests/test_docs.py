"""Every code block of the documents is run; what can't be run here says why, and is still read by the real parsers."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, Block, blocks, commands, heredocs, ours, spans
from PIL import Image
from tiny import ROOT

import lit_prune
from lit_prune import cli
from lit_prune.cli import LIGHTNING_VERBS, UsageError, main, verbs
from lit_prune.commands import trainer
from lit_prune.commands._support.options import examples, parse_verb
from lit_prune.commands.trainer import PruneCLI
from lit_prune.data.conversation import read_conversation
from lit_prune.data.sources import open_source

BIN = Path(sys.executable).parent
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
EVERY = [block for document in DOCUMENTS for block in blocks(document)]
DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
SHORT = ["trainer.max_steps=1", "data.init_args.train_samples=14", "data.init_args.val_samples=7"]
SHORT += ["data.init_args.batch_size=2", "trainer.logger=false"]


def of(language: str, files: bool = False) -> list[Block]:
    return [block for block in EVERY if block.language == language and bool(block.file) == files]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder `runs` after `bash jobs/try.sh` and a run on a cluster, of one step."""
    folder = tmp_path_factory.mktemp("trained")
    saving = (
        "class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: %s/checkpoints, save_last: true}"
    )
    export = "class_path: lit_prune.callbacks.ExportPlugin, init_args: {folder: %s/plugin}"
    for name in ("try", "rcp"):
        run = folder / "runs" / name
        callbacks = f"trainer.callbacks=[{{{saving % run}}}, {{{export % run}}}]"
        options = [*SHORT, callbacks, f"trainer.default_root_dir={run}", f"data.init_args.root={folder / 'world'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            main(["fit", "-c", str(ROOT / "configs" / "micro.yaml"), *(f"--{option}" for option in options)])
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A clone, as far as documents need one."""
    for name in ("configs", "jobs", "tests", "lit_prune"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}:{ROOT}")
    return tmp_path


# -- running --------------------------------------------------------------------------------------------------------
def run_document(found: list[Block]) -> int:
    """Run the blocks of a document that can be, in order and in one namespace; returns how many were.

    A block of text behind one of Python is what that one prints.
    """
    namespace: dict = {}
    printed, count = None, 0
    for block in found:
        if block.language == "text" and printed is not None:
            assert printed == block.text, f"{block}: the code before prints otherwise"
        printed = None
        if block.reason or block.file:
            continue
        if block.language == "python":
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, str(block), "exec"), namespace)
            printed = out.getvalue()
        elif block.language == "bash":
            for command in commands(block.text):
                run_command(command)
        count += block.language in ("python", "bash")
    return count


def run_command(command: list[str]) -> None:
    """Commands of this project in this process, which has imported what they need; others in the shell."""
    if own := ours(command):
        assert exit_code(main, own[1:]) == 0, command
    else:
        subprocess.run(command, check=True)


def exit_code(function: Callable, *arguments) -> int | str:
    """What a process would end with."""
    try:
        function(*arguments)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@DOCUMENT
def test_documents_run(document, trained, workplace):
    shutil.copytree(trained / "runs", "runs")
    found = blocks(document)
    ran = run_document(list(found))
    assert ran == sum(block.language in ("python", "bash") and not block.reason and not block.file for block in found)


def test_what_the_documents_show_is_mostly_run():
    """Reasons not to run a block stay few."""
    shown = [*of("python"), *of("bash")]
    assert sum(block.reason is None for block in of("python")) >= 6
    assert sum(block.reason is None for block in shown) >= 12


@pytest.mark.parametrize("text", ["print(image)", "import lit_prune\nlit_prune.laod('micro')", "raise SystemExit(3)"])
def test_code_that_fails_is_noticed(text, workplace):
    with pytest.raises((NameError, AttributeError, SystemExit)):
        run_document([Block(ROOT / "x.md", 1, "python", text)])


@pytest.mark.parametrize("text", ["lit-prune sample --cuont 2", "lit-prune samlpe", "ls /nowhere", "lit-prune show"])
def test_commands_that_fail_are_noticed(text, workplace, monkeypatch):
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        run_document([Block(ROOT / "x.md", 1, "bash", text)])


def test_other_output_is_noticed(workplace):
    shown = [Block(ROOT / "x.md", 1, "python", "print(1)"), Block(ROOT / "x.md", 4, "text", "2\n")]
    with pytest.raises(AssertionError, match="prints otherwise"):
        run_document(shown)


# -- reading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", EVERY, ids=str)
def test_blocks_say_what_they_are(block):
    assert block.language in LANGUAGES, f"{block}: name its language, one of {', '.join(sorted(LANGUAGES))}"
    assert not block.reason or block.language in ("bash", "python"), f"{block}: nothing would run it"


def test_every_marker_stands_before_a_block():
    """One with an empty line behind it would be ignored."""
    for document in DOCUMENTS:
        markers = document.read_text(encoding="utf-8").count("<!-- not run here")
        assert markers == sum(block.reason is not None for block in blocks(document)), document


def parse(words: list[str]) -> None:
    """Read a command of this project with the parser that would run it; raises `UsageError` for a wrong one."""
    verb, rest = words[1], words[2:]
    assert verb in LIGHTNING_VERBS or verb in verbs(), f"no verb {verb}"
    exits = any(word == "--print_config" or word.endswith(".help") for word in rest)
    with redirect_stdout(io.StringIO()):
        if verb in LIGHTNING_VERBS:
            code = exit_code(PruneCLI, verb, rest if exits else [*rest, "--print_config"])
        else:
            code = exit_code(parse_verb, verb, rest)
    assert code == 0, words


@DOCUMENT
def test_commands_that_are_not_run_are_read(document, workplace):
    """With the files that the document itself writes."""
    found = [block for block in blocks(document) if block.language == "bash"]
    for block in found:
        for path, text in heredocs(block.text).items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
    lines = [command for block in found if block.reason for command in commands(block.text)]
    lines += [command for span in spans(document) for command in commands(span)]
    for words in {tuple(own) for command in lines if (own := ours(command))}:
        parse(list(words))


@pytest.mark.parametrize(
    "line",
    [
        "lightning fit -c configs/micro.yaml --model.kep 3",
        "lightning fit -c configs/mirco.yaml",
        "lit-prune sweep -c x --trails 2",
        "lit-prune cost --text-tokens many",
    ],
)
def test_wrong_commands_are_not_read(line, workplace):
    with pytest.raises((UsageError, AssertionError)):
        parse(line.split())


@DOCUMENT
def test_files_and_options_in_commands_are_there(document):
    """Of other commands than those read above: scripts, tests, modules, and the options given to them."""
    text = document.read_text(encoding="utf-8")
    shown = {block.file for block in blocks(document)}
    for word in re.findall(r"(?<![\w/.-])(?:jobs|configs|docs|tests)/[\w./-]*\w", text):
        assert word in shown or (ROOT / word).exists(), f"{document.name} names {word}"
    quoted = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines = [command for block in blocks(document) if block.language == "bash" for command in commands(block.text)]
    for command in [*lines, *(span.split() for span in quoted)]:
        if command[:1] == ["python"]:
            module = command[1:2] == ["-m"]
            name = command[2 if module else 1]
            source = Path(find_spec(name).origin) if module else ROOT / name
            options = [word.partition("=")[0] for word in command if word.startswith("--")]
            assert all(f'"{option}"' in source.read_text(encoding="utf-8") for option in options), command


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_shell_is_clean(block, tmp_path):
    (tmp_path / "block.sh").write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{block.text}")
    command = [BIN / "shellcheck", "--exclude=SC1091", tmp_path / "block.sh"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@DOCUMENT
def test_names_in_python_are_defined(document, tmp_path):
    """Also in blocks that are not run: all of a document one after the other."""
    code = [block.text for block in blocks(document) if block.language == "python" and not block.file]
    (tmp_path / "all.py").write_text("\n".join(code))
    command = [BIN / "ruff", "check", "--isolated", "--select=F821,E9", tmp_path / "all.py"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_an_overlay_of_a_run(block, workplace):
    """Over the cluster's configuration: real keys with values of the right types, which come out as they went in."""
    Path("block.yaml").write_text(block.text)
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "configs/rcp.yaml", "-c", "block.yaml", "--print_config"])
    assert not stop.value.code
    resolved = yaml.safe_load(out.getvalue())

    def within(part, whole) -> bool:
        if isinstance(part, dict):
            return all(within(value, whole[key]) for key, value in part.items())
        return part == whole

    assert within(yaml.safe_load(block.text), resolved)


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_instruction_data(block, tmp_path):
    (tmp_path / "data.jsonl").write_text(block.text)
    source = open_source(tmp_path / "data.jsonl")
    assert len(source) == len(block.text.splitlines())
    for record in source:
        assert read_conversation(record)


# -- what single documents say --------------------------------------------------------------------------------------
def test_the_readmes_picture_is_the_one_with_that_question(workplace):
    """Each question it asks about a picture of `lit-prune sample` is one of that picture's."""
    main(["sample"])
    records = json.loads(Path("sample/questions.json").read_text())
    asked = {(f"sample/{r['image']}", r["conversations"][0]["value"].removeprefix("<image>\n")) for r in records}
    shown = "".join(block.text for block in blocks(ROOT / "README.md"))
    pairs = re.findall(r'--image (\S+) --prompt "([^"]+)"', shown) + re.findall(r'answer\("(\S+)", "([^"]+)"\)', shown)
    assert len(pairs) >= 4
    assert set(pairs) <= asked
    assert Image.open("sample/0.png").size == (96, 96)


def test_the_readme_lists_every_method():
    """The table has a row for each file of configs/pruners."""
    rows = "".join(re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == {path.stem for path in (ROOT / "configs" / "pruners").glob("*.yaml")}


def test_numbers_in_the_text_about_loading():
    """The schedule that a comment shows is the one that comes out."""
    vlm = lit_prune.load("llava-hf/llava-1.5-7b-hf", random_weights=True, device="meta").attach("models/llava-1.5-7b")
    assert f"# {vlm.host.schedule}: 64 on average" in (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")


# -- --help ---------------------------------------------------------------------------------------------------------
def lines_of(verb: str) -> list[str]:
    return examples(import_module(f"lit_prune.commands.{verb}").run)


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_shows_examples_that_its_parser_reads(verb, workplace, capsys):
    assert lines_of(verb)
    for line in lines_of(verb):
        (words,) = commands(line)
        parse(words)
    assert any(line.startswith(f"lit-prune {verb}") for line in lines_of(verb))
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert all(f"  {line}\n" in printed for line in lines_of(verb))
    assert max(len(line) for line in lines_of(verb)) < 118


def test_the_first_help_shows_examples_that_are_read(workplace, capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for line in cli.EXAMPLES:
        assert f"  {line}\n" in printed
        (words,) = commands(line)
        parse(words)


@pytest.mark.parametrize("verb", LIGHTNING_VERBS)
def test_lightnings_verbs_show_theirs(verb, workplace, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    usage, _, about = printed.partition("\n\n")
    assert usage == f"usage: lightning {verb} -c FILE [-c FILE ...] [--option value ...]"
    assert about.startswith(LIGHTNING_VERBS[verb])
    for line in trainer.EXAMPLES[verb]:
        assert f"  {line}\n" in printed
        (words,) = commands(line)
        parse(words)
    assert "--trainer.max_steps" in printed
    assert "--model.keep" in printed


@pytest.mark.parametrize("verb", ["sample", "configs", "generate", "show", "cost"])
def test_examples_run(verb, trained, workplace):
    shutil.copytree(trained / "runs", "runs")
    main(["sample"])
    for line in lines_of(verb):
        (words,) = commands(line)
        run_command(words)
