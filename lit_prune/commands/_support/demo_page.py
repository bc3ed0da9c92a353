"""The page of `lit-prune demo`. No verb itself."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

# Before gradio is imported, which reads them then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from lit_prune.commands._support.inputs import Choice, attach, encode
from lit_prune.commands._support.processes import free_port
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.pictures import Mask, mark, titled
from lit_prune.evaluation.streaming import Progress, stream
from lit_prune.evaluation.views import View, view
from lit_prune.files.images import MAX_PIXELS
from lit_prune.files.inputs import as_image
from lit_prune.files.shipped import config_names
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.micro.worlds import WORLDS
from lit_prune.ops.budget import as_json, parse_budget
from lit_prune.plugin import learns
from lit_prune.plugin.methods import as_plugin
from lit_prune.vlm import VLM

LARGEST_FILE = "20mb"  # of an upload
LONGEST = 2000  # characters of a question
SAMPLES = ("colour", "relation", "counting", "position")  # skills of the pictures to try
SHOWN = 384  # pixels of a stage's picture, at least
HOUR = 3600
FONTS = ("system-ui", "sans-serif")
CSS = """
.answer textarea { font-size: 1.15rem; }
.facts p { margin: 0; font-variant-numeric: tabular-nums; }
#picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#stages .grid-wrap { height: auto; max-height: none; min-height: 0; padding: 0; }
#stages .grid-container { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)) !important; height: auto; }
#stages .thumbnail-item { max-width: 20rem; }
#stages .empty { min-height: 6rem; }
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
footer { display: none !important; }
"""


@dataclass(frozen=True)
class Shown:
    """Contents of the page for a question: both answers with their times, and the stages' pictures."""

    full: str = ""
    full_facts: str = ""
    pruned: str = ""
    pruned_facts: str = ""
    stages: tuple[tuple[Image.Image, str], ...] = ()
    note: str = ""


class Demo:
    """A gradio page on one model, which answers one question at a time.

    Args:
        vlm: the model, left plain between questions.
        pruners: methods to choose from, as `as_plugin` takes them; by default the shipped ones without weights.
        keep: budget to begin with.
        max_new_tokens: longest answer.

    Raises:
        LitPruneError: a budget that can't be read.
    """

    def __init__(self, vlm: VLM, pruners: Sequence[str] | None, keep: Any, max_new_tokens: int) -> None:
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self.dims = find(vlm.model).dims
        self.methods = list(pruners or self._untrained())
        vlm.answer(Image.new("RGB", (64, 64), "grey"), "Is it grey?", 2)  # the first forward is slower than others
        self.keep = str(as_json(parse_budget("11.1%" if keep is None else keep, "--keep")))
        self.busy, self.folder = Lock(), TemporaryDirectory(prefix="lit-prune-demo-")
        self.samples = self._samples() if vlm.name in WORLDS else []
        self.page = self._page()

    def launch(self, host: str, port: int) -> str:
        """Serve on a thread of its own; returns the address. Raises OSError where no port is free."""
        _, address, _ = self.page.queue(max_size=16, api_open=False).launch(
            server_name=host,
            server_port=port or free_port(host),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
        )
        return address

    # The model

    def answer(self, picture: str | None, question: str, method: str, keep: Any) -> Iterator[Shown]:
        """Answer in full, then pruned; each step is what the page shows by then.

        Raises `LitPruneError` for no picture or one that can't be read, no question, or a budget that can't be met.
        """
        if not picture:
            raise LitPruneError("choose a picture first")
        if not question.strip():
            raise LitPruneError("write a question")
        if len(question) > LONGEST:
            raise LitPruneError(f"the question has {len(question)} characters; {LONGEST} are the most")
        if method not in self.methods:
            raise LitPruneError(f"{method} is none of this page's methods")
        image = as_image(picture)
        if image.width * image.height > MAX_PIXELS:
            raise LitPruneError(f"the picture has {image.width} x {image.height} pixels; {MAX_PIXELS:,} are the most")
        choice = Choice.of(method, keep)
        with self.busy:
            try:
                yield from self._both(image, question.strip(), choice)
            finally:
                self.vlm.detach()

    def _both(self, image: Image.Image, question: str, choice: Choice) -> Iterator[Shown]:
        vlm = self.vlm.detach()
        inputs, full, shown = encode(vlm, [image], [question]), None, Shown()
        total = int(find(vlm.model).image_columns(inputs["input_ids"]).sum())
        for full in stream(vlm, inputs, self.max_new_tokens):
            shown = Shown(full.text, _facts(full, f"{total} visual tokens"), note="answering pruned …")
            yield shown
        attach(vlm, choice)
        record, pruned, stages = Record(), None, ()
        with vlm.using(Session(record=record)):
            for pruned in stream(vlm, inputs, self.max_new_tokens):
                if pruned.tokens == 1:  # the prefill is over: the stages are known
                    visual = f"{record.trace.average_visual()[0]:.4g} of {total} visual tokens"
                    stages, note = self._stages(inputs, image, record)
                facts = _facts(pruned, visual, full)
                yield Shown(shown.full, shown.full_facts, pruned.text, facts, stages, note)

    def _stages(
        self, inputs: dict[str, Any], image: Image.Image, record: Record
    ) -> tuple[tuple[tuple[Image.Image, str], ...], str]:
        """A picture for each stage with dropped patches dark; without any, why."""
        kept = {stage.layer: stage.kept[0].bool().cpu().numpy() for stage in record.stages}
        try:
            seen = view(self.vlm, inputs, image)
            return tuple((_picture(seen, mask), title) for title, mask in titled(kept)), ""
        except LitPruneError as error:
            counts = ", ".join(title for title, _ in titled(kept))
            return (), f"kept: {counts}. No picture: {error}"

    def _untrained(self) -> list[str]:
        """Shipped methods that have no weights and answer a question about a grey picture."""
        found = []
        for path in config_names("pruners"):
            plugin = as_plugin(path)
            if learns(plugin, self.dims):
                continue
            try:
                self.vlm.attach(plugin, keep="50%")
                self.vlm.answer(Image.new("RGB", (64, 64), "grey"), "Is it grey?", 1)
            except LitPruneError:  # an oracle needs the regions asked about
                continue
            found.append(Path(path).stem)
        self.vlm.detach()
        return found

    def _samples(self) -> list[tuple[str, str]]:
        """Pictures of the model's world with a question each."""
        found, world = [], WORLDS[self.vlm.name]
        for number, skill in enumerate(SAMPLES):
            scene = world.make_scene(world.splits["sample"][number])
            path = Path(self.folder.name) / f"{number}.png"
            scene.image().save(path)
            question = world.ask(scene, skill) or world.choose(scene, 1)[0]
            found.append((str(path), question.text))
        return found

    # The page

    def _page(self) -> gr.Blocks:
        with gr.Blocks(title="lit_prune demo", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
            gr.Markdown(f"## Visual-token pruning, live\n{self.vlm.name}, {self.dims.visual} visual tokens an image")
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    picture = gr.Image(
                        type="filepath", sources=["upload", "clipboard"], label="Picture", height=280, elem_id="picture"
                    )
                with gr.Column(scale=3, min_width=280):
                    question = gr.Textbox(label="Question", max_length=LONGEST, elem_id="question")
                    with gr.Row():
                        method = gr.Dropdown(self.methods, value=self.methods[0], label="Method", min_width=140)
                        keep = gr.Textbox(
                            self.keep, label="Budget", info="visual tokens, or a share", min_width=120, elem_id="keep"
                        )
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Row():
                columns = [self._column("Full model", "full"), self._column("Pruned", "pruned")]
            note = gr.Markdown(elem_id="note")
            gr.Markdown("#### Tokens kept at each stage")
            stages = gr.Gallery(
                show_label=False, height="auto", object_fit="contain", buttons=["fullscreen"], elem_id="stages"
            )
            if self.samples:
                samples = [list(each) for each in self.samples]
                gr.Examples(samples, [picture, question], label="Pictures to try", cache_examples=False)
            outputs = [*columns[0], *columns[1], stages, note]
            inputs = [picture, question, method, keep]
            gr.on(
                [ask.click, question.submit],
                self._show,
                inputs,
                outputs,
                concurrency_limit=1,
                show_progress="minimal",
                api_visibility="private",
            )
        return page

    def _column(self, title: str, name: str) -> tuple[gr.Textbox, gr.Markdown]:
        with gr.Column(min_width=280):
            text = gr.Textbox(label=title, lines=2, interactive=False, elem_id=name, elem_classes="answer")
            return text, gr.Markdown(elem_id=f"{name}-facts", elem_classes="facts")

    def _show(self, *asked: Any) -> Iterator[tuple[Any, ...]]:
        """The steps of `answer` as gradio's outputs; user errors become a message on the page."""
        try:
            yield ("", "", "", "", [], "answering in full …")
            for shown in self.answer(*asked):
                yield (
                    shown.full,
                    shown.full_facts,
                    shown.pruned,
                    shown.pruned_facts,
                    list(shown.stages),
                    shown.note,
                )
        except LitPruneError as error:
            yield ("", "", "", "", [], "")
            raise gr.Error(str(error), duration=None, print_exception=False) from error


def _facts(progress: Progress, visual: str, full: Progress | None = None) -> str:
    """One line of figures; beside the full model, how much sooner the first token came."""
    sooner = f" ({full.first / progress.first:.2g}x as fast)" if full is not None else ""
    tokens = f"{progress.tokens} token{'' if progress.tokens == 1 else 's'}"
    first = f"first token after {1e3 * progress.first:.0f} ms{sooner}"
    return f"{visual} · {first} · {tokens}, {progress.tokens_per_second:.1f} per second"


def _picture(seen: View, kept: Mask) -> Image.Image:
    """The image with dropped patches dark, enlarged by a whole factor so that a patch keeps its edges."""
    marked = mark(seen, kept)
    factor = -(-SHOWN // marked.shape[0])
    return Image.fromarray(np.kron(marked, np.ones((factor, factor, 1), np.uint8)))
