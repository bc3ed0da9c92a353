"""Values on the command line: any text is taken as it is or refused in one line, and no model is loaded in vain."""

import contextlib
import importlib
import inspect
import io
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ROOT

from lit_prune import cli, vlm
from lit_prune.commands import sample
from lit_prune.commands import trainer as trainer_verbs
from lit_prune.commands._support import inputs, options
from lit_prune.commands._support.diagnosis import keys_of
from lit_prune.errors import LONGEST_WORD, LitPruneError, one_line
from lit_prune.training import module as training

DATA = trainer_verbs.DATA
MICRO = ROOT / "configs" / "micro.yaml"
SHORT = 1000  # characters of a message, with a value that may be a long path
ASK = ("--image=0.png", "--prompt=What colour is the tile?")


class Loaded(BaseException):
    """Every option was taken: a model would be loaded."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, where no model can be loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise Loaded

    for module in (inputs, training):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*line: str) -> tuple[int, str]:
    """Exit code and what was printed to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            cli.main([*line])
        except SystemExit as exit_:
            return int(exit_.code or 0), err.getvalue()
    return 0, err.getvalue()


def assert_one_line(code: int, text: str) -> None:
    assert code in (1, 2)
    assert text.startswith("error: ")
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert len(text) < SHORT


# -- refused before a model is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("generate", *ASK, "--max-new-tokens=0"), "--max-new-tokens is 0; it must be a whole number of at least 1"),
        (("generate", *ASK, "--pruner=fastw", "--keep=16"), "did you mean `fastv`?"),
        (("generate", *ASK, "--pruner=fastv"), "fastv names no budget"),
        (("generate", *ASK, "--pruner=fastv", "--keep=0"), "--keep=0: not a budget"),
        (("generate", *ASK, "--json=."), "--json: . is a folder; give a file"),
        (("generate", *ASK, "--json=0.png/a.json"), "0.png is no folder"),
        (("generate", *ASK, "--device=cudda"), "device cudda can't be used"),
        (("generate", "--image=1.png", ASK[1]), "1.png"),
        (("show", "--pruner", "fastv", "divprun", "--keep=16", "--out=k.png"), "did you mean `divprune`"),
        (("show", "--pruner=fastv", "--keep=-5", "--out=k.png"), "--keep=-5: not a budget"),
        (("show", "--pruner=fastv", "--keep=16", "--out=k.jpg"), "pictures are written as .png, .pdf, .svg"),
        (("show", "--pruner=fastv", "--keep=16", "--out=k.png", "--max-new-tokens=-1"), "--max-new-tokens is -1"),
        (("compare", "--methods", "full", "fastw"), "did you mean `fastv`?"),
        (("compare", "--methods", "full", "FastV="), "write PATH or NAME=PATH"),
        (("compare", "--seeds", "0", "-1"), "--seeds[1] is -1"),
        (("compare", "--limit=0"), "--limit 0: at least one sample"),
        (("compare", "--keep", "16", "200%"), "--keep 200%"),
        (("compare", "--out=0.png"), "--out: 0.png"),
        (("bench", "--methods", "full", "fastw@16"), "did you mean `fastv`?"),
        (("bench", "--methods", "full", "--threads=0"), "--threads is 0"),
        (("bench", "--methods", "full", "--repeats=0"), "--repeats is 0"),
        (("bench", "--methods", "full", "--batch-sizes", "1", "0"), "--batch-sizes[1] is 0"),
        (("bench", "--methods", "full", "--time-limit=0"), "nothing was measured: --time-limit is 0.0"),
        (("bench", "--methods", "full", "--image-size", "0", "0"), "--image-size takes height and width"),
        (("bench", "--methods", "full", "--plot=times.gif"), "pictures are written as"),
        (("test", "-c", "micro.yaml", "--model.keep=0"), "model.keep"),
        (("test", "-c", "micro.yaml", "--model.lr=nan"), "model.lr"),
        (("fit", "-c", "micro.yaml", "--data=InstructData", "--data.init_args.train=none.json"), "none.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_it_is_refused_before_a_model_is_loaded(place: Path, line: tuple[str, ...], says: str) -> None:
    sample.run(place, 1)
    before = {path.name for path in place.iterdir()}
    code, text = said(*line)
    assert_one_line(code, text)
    assert says in text
    assert {path.name for path in place.iterdir()} == before


def test_a_configuration_offline_names_the_option_for_a_local_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the data are there: they come first. Nothing is left in the run's folder."""
    monkeypatch.setattr(training, "load", vlm.load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sample.run(place, 1)
    before = {path.name for path in place.iterdir()}
    data = (f"--data.init_args.{name}=questions.json" for name in ("train", "val"))
    code, text = said("fit", "-c", "rcp.yaml", *data, "--data.init_args.images=.")
    assert_one_line(code, text)
    assert "--model.base=FOLDER" in text
    assert {path.name for path in place.iterdir()} == before


def test_what_is_fine_goes_on_to_the_model(place: Path) -> None:
    """Also what a parser of YAML would take for something else, and text beyond the basic plane."""
    sample.run(place, 1)
    for line in (
        ("generate", *ASK, "--pruner=fastv", "--keep=11.1%", "--json=new/a.json"),
        ("generate", "--image=0.png", "--prompt", "💡 [what]: {colour} # 'is' \"it\"?\n"),
        ("show", "--pruner=fastv", "--keep=16", "--out=new/k.PDF"),
        ("compare", "--methods", "full", "RCP=runs/{seed}/plugin", "--seeds", "3", "--limit=1"),
        ("bench", "--methods", "full", "--time-limit=.inf", "--threads=1"),
    ):
        with pytest.raises(Loaded):
            cli.main([*line])
    assert not (place / "new").exists()


@pytest.mark.parametrize("content", ['[{"id": 0}]', "{}", "", '{"a": 1} {', '["' + "x" * 2**20 + '"]'])
def test_a_file_that_is_data_is_not_read_as_a_configuration(place: Path, content: str) -> None:
    """As JSON files of any kind are, given to any option but `--config`; results are written over."""
    sample.run(place, 1)
    (place / "some.json").write_text(content)
    options_ = (f"--data={DATA}", "--data.init_args.train=some.json", "--ckpt_path", "some.json", "--print_config")
    assert said("fit", *options_) == (0, "")
    with pytest.raises(Loaded):
        cli.main(["generate", *ASK, "--json=some.json"])
    assert_one_line(*said("generate", *ASK, "--config=some.json", "--kee=3"))


def test_a_message_is_one_line_whatever_it_names(place: Path) -> None:
    code, text = said("configs", "list", "a\nb\x1b[31m" + "x" * 5000)
    assert_one_line(code, text)
    assert r"a\nb\x1b[31m" in text
    assert one_line("é  💡\tb\udcff ") == "é  💡\\tb\\udcff"
    assert one_line("x" * (LONGEST_WORD - 1)) == "x" * (LONGEST_WORD - 1)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_files_is_refused_before(place: Path) -> None:
    sample.run(place, 1)
    place.chmod(0o500)
    assert "takes no new files" in said("generate", *ASK, "--json=a.json")[1]
    place.chmod(0o700)


# -- any value ------------------------------------------------------------------------------------------------------

ODD = (
    *("", "-1", "0", "1.5", "nan", "-inf", "1e400", "1" * 400, "0x10", "1_000", "true", "null", "~", "None", "-", "--"),
    *("[]", "{}", "[1", "{a: b}", "[null]", "[[1]]", "a b", "'", '"', "&a [*a]", "!!python/name:os.system", "${x}"),
    *(
        "${oc.env:HOME}",
        "\x00",
        "\ud800",
        "é\u202e\n",
        "💡",
        "..",
        "/",
        "x.yaml",
        "50%",
        "-5%",
        "101%",
        "@",
        "http://x",
    ),
    *("hub:x", "a: b", "# a", "2:64,4:8", "1e3", "2020-01-01", "${", "x" * 3000, "a.b.C", "lit_prune.cli.main"),
)
VALUES = st.sampled_from(ODD) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(repr)
MANY = settings(
    max_examples=700, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
VERBS = {verb: importlib.import_module(f"lit_prune.commands.{verb}").run for verb in cli.verbs()}
CHOICES = [(verb, name) for verb, run in VERBS.items() for name in inspect.signature(run).parameters]


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, dict[str, list[str]]]:
    """A verb with all that it needs, and one more option with any value or, where it is a list, several."""
    verb, chosen = draw(st.sampled_from(CHOICES))
    found = {}
    for name, parameter in inspect.signature(VERBS[verb]).parameters.items():
        if name == chosen:
            count = 3 if options._is(options._hints(VERBS[verb])[name], list) else 1
            found[name] = draw(st.lists(VALUES, min_size=1, max_size=count))
        elif parameter.default is parameter.empty:
            found[name] = ["some"]
    return verb, found


@MANY
@given(lines())
def test_any_value_of_a_verb_is_taken_as_it_is_or_refused_in_one_line(line: tuple[str, dict[str, list[str]]]) -> None:
    verb, given_ = line
    argv = [word for name, values in given_.items() for word in (f"--{name}={value}" for value in values)]
    code, text, taken = 0, "", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "run_verb", lambda *line: taken.update(options.parse_verb(*line)[1]))
        code, text = said(verb, *argv)
    if code:
        assert_one_line(code, text)
        return
    hints = options._hints(VERBS[verb])
    for name, values in given_.items():
        listed = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
        if hints[name] is str:
            assert taken[name] == values[0]
        elif hints[name] == list[str] and not listed:
            assert taken[name] == values


class Parsed(trainer_verbs.PruneCLI):
    """The command line of a Lightning verb, read again and again by one parser; nothing is made of it."""

    def before_instantiate_classes(self) -> None:
        pass

    instantiate_classes = after_instantiate_classes = before_instantiate_classes

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def read(self, line: list[str]) -> None:
        self._subcommand_parsers[self.verb].given.clear()
        self.parse_arguments(self.parser, [self.verb, *line])


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    cli_ = Parsed("fit", ["-c", str(MICRO)])
    cli_.keys = keys_of(cli_._subcommand_parsers["fit"])
    return cli_


@settings(MANY, max_examples=300)
@given(data=st.data())
def test_any_value_of_a_lightning_verb_is_read_or_refused_in_one_line(parsed: Parsed, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(parsed.keys))
    value = data.draw(VALUES)
    try:
        parsed.read([f"--{key}={value}"])
    except (cli.UsageError, LitPruneError) as error:
        assert_one_line(2, f"error: {one_line(str(error))}\n")


CONTENT = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*ODD, f"{DATA}", "${model.keep}", "RCP"]),
    lambda part: (
        st.lists(part, max_size=2)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "dict_kwargs", "keep", "a.b", "", "x y"]), part)
    ),
    max_leaves=5,
)


@st.composite
def edited(draw: st.DrawFn) -> dict[str, Any]:
    """A shipped configuration of which one key has another name, or one value is another."""
    content = node = yaml.safe_load(MICRO.read_text())
    while True:
        places = [*range(len(node))] if isinstance(node, list) else [*node]
        place = draw(st.sampled_from(places))
        inner = isinstance(node[place], dict | list) and node[place] and draw(st.booleans())
        if not inner:
            break
        node = node[place]
    if isinstance(node, dict) and draw(st.booleans()):
        node[f"{place}{draw(st.sampled_from(['s', '.x', ' ', '+']))}"] = node.pop(place)
    else:
        node[place] = draw(CONTENT)
    return content


@settings(MANY, max_examples=100)
@given(content=edited())
def test_any_configuration_is_read_or_refused_in_one_line(place: Path, parsed: Parsed, content: dict[str, Any]) -> None:
    (place / "edited.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    try:
        parsed.read(["-c", "edited.yaml"])
    except (cli.UsageError, LitPruneError) as error:
        assert_one_line(2, f"error: {one_line(str(error))}\n")
