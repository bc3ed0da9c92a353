"""An answer token by token: the same as `VLM.answer`, with times; and the demo's checks that need no gradio."""

import threading
from contextlib import chdir
from importlib.util import find_spec
from itertools import pairwise

import pytest
from tiny import ROOT

from lit_prune import cli
from lit_prune.evaluation.streaming import stream
from lit_prune.host import Record, Session
from lit_prune.micro import world
from lit_prune.vlm import VLM, load


@pytest.fixture(scope="module")
def micro() -> VLM:
    return load("micro")


@pytest.fixture(scope="module")
def asked() -> tuple:
    scene = world.make_scene(world.SAMPLE_SEED + 1)
    return scene.image(), scene.questions({"relation": 1})[0].text


@pytest.mark.parametrize("keep", [None, 16])
def test_the_last_step_is_the_whole_answer(micro, asked, keep):
    """Plain and pruned; each step has a token more, and times only grow."""
    micro.detach()
    if keep is not None:
        micro.attach("divprune", keep=keep)
    steps = list(stream(micro, micro.encode(*asked), 8))
    answer = micro.answer(*asked, 8)
    assert [step.tokens for step in steps] == list(range(1, len(steps) + 1))
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(steps))
    assert steps[-1].text == answer
    assert len(steps) > 1
    assert len({step.first for step in steps}) == 1
    assert 0 < steps[0].first == steps[0].seconds < steps[-1].seconds
    assert steps[-1].tokens_per_second == steps[-1].tokens / steps[-1].seconds


def test_the_stages_are_known_with_the_first_token(micro, asked):
    micro.attach("fastv", keep=16)
    record = Record()
    with micro.using(Session(record=record)):
        next(steps := stream(micro, micro.encode(*asked), 8))
        assert record.trace.average_visual().tolist() == [16]
        steps.close()


def test_who_stops_reading_stops_the_generation(micro, asked):
    """And no thread is left; the model answers as before."""
    micro.detach()
    before = threading.active_count()
    steps = stream(micro, micro.encode(*asked), 500)
    next(steps)
    steps.close()
    assert threading.active_count() == before
    assert micro.answer(*asked, 8)


def test_errors_of_the_model_reach_the_reader(micro, asked):
    inputs = dict(micro.detach().encode(*asked))
    inputs["pixel_values"] = inputs["pixel_values"][:, :1]
    with pytest.raises(Exception, match=r"channels|size|shape|dimension"):
        list(stream(micro, inputs, 4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "70000"], "--port is 70000; it must be a whole number from 0 to 65535"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be"),
        pytest.param(
            [],
            'pip install -e ".[demo]"',
            marks=pytest.mark.skipif(find_spec("gradio") is not None, reason="it is"),
        ),
    ],
)
def test_the_demo_says_what_is_wrong(options, says, capsys):
    with chdir(ROOT), pytest.raises(SystemExit) as ended:
        cli.main(["demo", *options])
    assert ended.value.code == 1
    assert says in capsys.readouterr().err
