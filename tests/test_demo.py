"""`lit-prune demo` in headless Chromium, in an environment with gradio and playwright: jobs/demo.sh makes one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

from lit_prune.micro import world
from lit_prune.vlm import VLM, load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["chromium"] * (CHROMIUM is None)
pytestmark = [
    pytest.mark.integrations,
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}"),
]
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
PATIENCE = 120_000  # ms, on a machine that others keep busy


@contextmanager
def served(*options: str) -> Iterator[str]:
    """The address of a demo that the command serves."""
    command = [sys.executable, "-m", "lit_prune", "demo", "--port", "0", *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    demo = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in demo.stderr:
            lines.append(line)
            if found := re.search(r"http://[\w.:]+/?", line):
                yield found[0]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        demo.terminate()
        demo.wait(60)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served("--pruner", "fastv", "divprune", "--keep", "16") as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The page at a phone's size; at the end, that it asked for nothing but what it is served from."""
    found = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    found.set_default_timeout(PATIENCE)
    asked = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(address)
    found.wait_for_selector("#ask")
    yield found
    foreign = {url for url in asked if urlsplit(url).scheme in ("http", "https", "ws") and not url.startswith(address)}
    found.close()
    assert not foreign


@pytest.fixture(scope="module")
def micro() -> VLM:
    return load("micro")


def ask(page) -> tuple[str, str]:
    """Click, and wait for the pruned answer to be over: both answers."""
    page.click("#ask")
    page.wait_for_function("document.querySelector('#pruned-facts').innerText.includes('per second')")
    page.wait_for_function("!document.querySelector('#note').innerText.includes('answering')")
    page.wait_for_timeout(1500)
    return tuple(page.input_value(f"#{name} textarea") for name in ("full", "pruned"))


def answers(micro: VLM, image: Image.Image, question: str, method: str) -> tuple[str, str]:
    plain = micro.detach().answer(image, question, 64)
    return plain, micro.attach(method, keep=16).answer(image, question, 64)


def test_a_sample_is_answered_in_full_and_pruned(page, micro, tmp_path):
    """With the tokens kept at each stage, times, and tokens per second; nothing is wider than a phone."""
    page.locator("table tbody tr").nth(1).click()
    page.wait_for_selector("#picture img")
    scene = world.make_scene(world.SAMPLE_SEED + 1)
    question = scene.questions({"relation": 1})[0].text
    assert page.input_value("#question textarea") == question
    assert ask(page) == answers(micro, scene.image(), question, "fastv")
    full, pruned = (page.inner_text(f"#{name}-facts") for name in ("full", "pruned"))
    assert re.fullmatch(r"144 visual tokens · first token after \d+ ms · \d+ tokens, [\d.]+ per second", full.strip())
    assert re.search(r"16 of 144 visual tokens · first token after \d+ ms \([\d.e+]+x as fast\)", pruned)
    page.wait_for_selector("#stages img")
    assert "layer 2" in page.inner_text("#stages") or page.locator("#stages img").count() >= 1
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


def test_a_picture_of_ones_own(page, micro, tmp_path):
    """Uploaded; another method and budget."""
    scene = world.make_scene(world.SAMPLE_SEED + 11)
    question = scene.questions({"colour": 1})[0].text
    scene.image().save(tmp_path / "own.png")
    page.set_input_files("#picture input[type=file]", tmp_path / "own.png")
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", question)
    assert ask(page) == answers(micro, scene.image(), question, "fastv")
    shown = page.locator("#stages img").first
    shown.wait_for()
    dark = page.evaluate(
        """async (source) => { const image = new Image(); image.src = source; await image.decode();
        const canvas = document.createElement("canvas"); canvas.width = image.width; canvas.height = image.height;
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, image.width, image.height).data]; }""",
        shown.get_attribute("src"),
    )
    assert len(np.unique(np.reshape(dark, (-1, 4))[:, :3], axis=0)) > 10, "a picture, part of it dark"


@pytest.mark.parametrize(
    ("question", "keep", "says"),
    [
        ("", "16", "write a question"),
        ("Is there a blue cross?", "no", "budget"),
        ("Is there a blue cross?", "3", "be reached"),
    ],
)
def test_what_is_wrong_is_a_message(page, question, keep, says):
    page.locator("table tbody tr").first.click()
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", question)
    page.fill("#keep input, #keep textarea", keep)
    page.click("#ask")
    page.wait_for_function(f"document.body.innerText.toLowerCase().includes({says!r})")


def test_files_that_are_no_pictures_or_too_large(page, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(os.urandom(21 << 20))
    for name in ("text.png", "large.png"):
        page.set_input_files("#picture input[type=file]", tmp_path / name)
        page.fill("#question textarea", "What colour is the tile?")
        page.wait_for_timeout(3000)
        page.click("#ask")
        page.wait_for_function("/error|exceeds|cannot|choose a picture/i.test(document.body.innerText)")
        page.reload()
        page.wait_for_selector("#ask")
    assert page.input_value("#full textarea") == ""


def test_nothing_leaves_this_machine():
    """No link is shared and no analytics are sent, whatever the environment says."""
    from lit_prune.commands._support import demo_page

    demo = demo_page.Demo(load("micro"), ["divprune"], 16, 4)
    assert demo.page.analytics_enabled is False
    address = demo.launch("127.0.0.1", 0)
    assert urlsplit(address).hostname == "127.0.0.1"
    assert not demo.page.share
    assert not Path(demo.folder.name, "..", "share").exists()
    demo.page.close()
