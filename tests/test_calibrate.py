"""`lit-prune calibrate`: a threshold by quantile on unlabelled images, for each budget."""

import json

import pytest
import torch
from PIL import Image

from lit_prune import load
from lit_prune.cli import main
from lit_prune.host import Record, Session
from lit_prune.ops.moments import kappa
from lit_prune.pruners.base import VisionContext
from lit_prune.pruners.dcp import DCPPrune


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Ten scenes, in batches of four, at two budgets."""
    folder = tmp_path_factory.mktemp("calibrated")
    main(["sample", "--count", "10", "--out", str(folder / "images")])
    options = ["--quantile", "0.8", "--batch-size", "4", "--out", str(folder / "out"), "--json", str(folder / "t.json")]
    main(["calibrate", "--pruner", "dcp", "--image", str(folder / "images"), "--keep", "16", "8", *options])
    return folder


def test_a_share_of_the_images_lies_below(calibrated):
    rows = json.loads((calibrated / "t.json").read_text())
    assert [row["keep"] for row in rows] == ["16", "8"]
    for row in rows:
        values = sorted(row["values"])
        assert len(values) == 10
        assert row["threshold"] == pytest.approx(values[7] + 0.2 * (values[8] - values[7]), abs=1e-4)
    assert rows[0]["threshold"] != rows[1]["threshold"]


def test_values_are_kappa_of_the_plain_selection(calibrated):
    """One image, seen by a method that notes what its last stage is shown."""
    seen: list[VisionContext] = []

    class Spy(DCPPrune):
        def prune_vision(self, context):
            seen.append(context)
            return super().prune_vision(context)

    vlm = load("micro").attach(Spy(), keep=16)
    with vlm.using(Session()):
        vlm.encode_images(dict(vlm.encode(Image.open(calibrated / "images" / "0.png"), "Is there a circle?")))
    last = seen[-1]
    plain = last.memory["score"].gather(1, last.ordinal).argsort(descending=True)[:, :16]
    expected = kappa(last.states, torch.zeros_like(last.alive).scatter(1, plain, True), last.alive)
    found = json.loads((calibrated / "t.json").read_text())[0]["values"][0]
    assert expected.item() == pytest.approx(found, abs=1e-4)


def test_the_plugins_trigger_on_the_rest(calibrated):
    """Two of ten images let twice the budget through to the decoder."""
    vlm = load("micro").attach(calibrated / "out" / "keep_8")
    assert vlm.plugin.keep == 8
    record, names = Record(), [str(calibrated / "images" / f"{number}.png") for number in range(10)]
    with vlm.using(Session(record=record)):
        vlm.encode_images(dict(vlm.encode(names, "Is there a circle?")))
    assert sorted(record.trace.tower.stages[-1][1].tolist()) == [8] * 8 + [16] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pruner", "fastv", "--keep", "16"], "--pruner fastv: no threshold to calibrate"),
        (["--pruner", "dcp_rcp", "--keep", "16"], "no threshold to calibrate"),
        (["--pruner", "dcp", "--keep", "16", "--quantile", "1.1"], "--quantile is 1.1; it must be"),
        (["--pruner", "dcp", "--keep", "144"], "keep 144 drops nothing"),
        (["--pruner", "dcp", "--keep", "16", "--image", "empty"], "--image empty: no image"),
        (["--pruner", "dcp", "--keep", "16", "--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_what_is_refused(calibrated, capsys, monkeypatch, options, says):
    monkeypatch.chdir(calibrated)
    (calibrated / "empty").mkdir(exist_ok=True)
    image = [] if "--image" in options else ["--image", "images/0.png"]
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *options, *image])
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed
