"""Every verb on a tiny random model of one class: the Python that the commands run, on a few records of noise."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from PIL import Image

from lit_prune.commands.generate import full_trace, run_plain, run_pruned
from lit_prune.commands.show import Asked, as_row
from lit_prune.data import InstructData
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.cells import FULL, Cell
from lit_prune.evaluation.comparison import Comparison
from lit_prune.evaluation.laws import ALL, SHARE, UNREAD, attached, methods, rcp_and_repair, stages
from lit_prune.evaluation.pictures import draw_page
from lit_prune.evaluation.timing import Benchmark, Method
from lit_prune.evaluation.timing.clocks import wall_clock
from lit_prune.evaluation.views import view
from lit_prune.host.zoo.inputs import prompts
from lit_prune.host.zoo.processor import NoiseProcessor
from lit_prune.host.zoo.shrink import tiny_model
from lit_prune.plugin import Plugin
from lit_prune.training.module import PruneModule
from lit_prune.vlm import VLM

VERBS = ("data", "fit", "validate", "test", "predict", "compare", "generate", "show", "bench")
SIZES = ((32, 32), (32, 40), (32, 48), (32, 56))  # width and height of the pictures, which stand for noise
SHOWN = ((0,), (1, 2), (), (3,))  # of which records are
STEPS = 2


@dataclass
class Runs:
    """Outcome of the verbs for one class: a sentence of refusal, or a raw error, where one did not run.

    `trained`: what was trained, and in which mode, if anything was; `outcomes`: what the verbs logged or returned.
    """

    kind: str
    trained: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Any] = field(default_factory=dict)


def run_all(kind: str, verbs: tuple[str, ...] = VERBS, seed: int = 0) -> Runs:
    """Every verb on one class, each on its own, so that one that fails hides no other.

    A class that can't be pruned is refused at "attach", and one that the library can't build or run here fails at
    "library".
    """
    found, verb = Runs(kind), "library"
    with tempfile.TemporaryDirectory() as folder:
        walk = None
        for verb in ("library", *verbs):
            try:
                if walk is None:
                    walk = _Walk(kind, Path(folder), seed)
                else:
                    getattr(walk, verb)(found)
            except LitPruneError as error:
                found.refused["attach" if walk is None else verb] = str(error)
            except Exception as error:
                found.errors[verb] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if walk is None:
                break
    return found


class _Walk:
    """The verbs, in an order in which each may use what earlier ones made."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        model = tiny_model(kind, seed)
        attached(VLM(model, None, kind), ALL).detach()
        with torch.no_grad():
            model(**prompts(kind, model).batch())
        self.folder, self.processor = folder, NoiseProcessor(kind, model)
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        self.vlm = VLM(model, self.processor, kind)
        self.records = _records(folder)
        self.module: PruneModule | None = None

    def data(self, found: Runs) -> None:
        """Samples that are encoded one by one and joined are what the processor makes of them all at once."""
        data = self._data(eval_batch_size=2)
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        texts, images = [], []
        for asked, shown in zip(batch["questions"], SHOWN, strict=False):
            parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": asked}]
            turns = [{"role": "user", "content": parts}]
            texts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
            images += [Image.new("RGB", SIZES[number]) for number in shown]
        together, joined = self.processor(texts, images, padding_side="left"), batch["prompts"]
        if wrong := [name for name in together if not torch.equal(together[name], joined[name])]:
            raise RuntimeError(f"the samples of a batch are joined wrongly: {', '.join(wrong)}")

    def fit(self, found: Runs) -> None:
        """Two steps of RCP and its repair adapter with a validation; dropping where soft masks are refused."""
        try:
            self._fit("soft", found)
        except LitPruneError as error:
            found.refused["fit, soft"] = str(error)
            self._fit("drop", found)

    def _fit(self, mode: str, found: Runs) -> None:
        module = self._module(mode)
        before = {name: parameter.detach().clone() for name, parameter in module.plugin.named_parameters()}
        trainer = self._trainer(max_steps=STEPS, limit_val_batches=1, val_check_interval=STEPS)
        trainer.fit(module, self._data())
        found.outcomes["fit"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        bad = [name for name, value in found.outcomes["fit"].items() if not math.isfinite(value)]
        if bad or trainer.global_step < STEPS:
            raise RuntimeError(f"{trainer.global_step} steps; not finite: {', '.join(bad)}")
        moved = {
            name.partition(".")[0]
            for name, parameter in module.plugin.named_parameters()
            if not torch.equal(before[name], parameter)
        }
        if still := {name.partition(".")[0] for name in before} - moved:
            raise RuntimeError(f"nothing moved in {', '.join(sorted(still))}")
        method = "RCP and repair" if any(True for _ in module.plugin.pruner.parameters()) else "repair"
        found.trained, self.module = f"{method}, {mode}", module

    def validate(self, found: Runs) -> None:
        """The trained method, or an untrained one where it could not be trained."""
        found.outcomes["validate"] = self._trainer().validate(self._trained(), self._data(), verbose=False)[0]

    def test(self, found: Runs) -> None:
        found.outcomes["test"] = self._trainer().test(self._trained(), self._data(), verbose=False)[0]

    def predict(self, found: Runs) -> None:
        answers = [one for batch in self._trainer().predict(self._trained(), self._data()) for one in batch]
        if len(answers) != len(SIZES):
            raise RuntimeError(f"{len(answers)} answers to {len(SIZES)} questions")
        found.outcomes["predict"] = answers

    def compare(self, found: Runs) -> None:
        """The full model, two methods that are not trained, and the trained one."""
        with self._plain():
            data = self._data()
            data.setup("test")
            cells = [Cell(str(place), "80%", None, plugin) for place, plugin in enumerate(self._plugins())]
            comparison = Comparison(self.vlm, Cell(FULL), cells, 2)
            for batch in data.test_dataloader():
                comparison.update(batch)
            if failed := [cell.reason for cell in cells if cell.failed]:
                raise RuntimeError(failed[0])
            found.outcomes["compare"] = [row for _, row in comparison.results()]

    def generate(self, found: Runs) -> None:
        """Answers to two pictures at once, pruned and plain, with their prices."""
        with self._plain():
            inputs = self._inputs()
            total = full_trace(inputs, self.vlm)
            self.vlm.attach(self._plugins()[0], keep=SHARE)
            found.outcomes["generate"] = [run_pruned(self.vlm, inputs, 2)]
            self.vlm.detach()
            found.outcomes["generate"].append(run_plain(self.vlm, inputs, 2, total))

    def show(self, found: Runs) -> None:
        """A picture of the tokens that stay at each stage."""
        with self._plain():
            image = Image.new("RGB", SIZES[1])
            inputs = self.vlm.encode([image], ["what is it ?"])
            self.vlm.attach(self._plugins()[0], keep=SHARE)
            row = as_row(self.vlm, self.vlm.name, inputs, Asked(image, "what is it ?"), {}, 2)
            found.outcomes["show"] = row, draw_page(view(self.vlm, inputs, image), [row])

    def bench(self, found: Runs) -> None:
        """One round beside the full model."""
        with self._plain():
            methods = [Method("full"), Method("pruned", self._plugins()[0], SHARE)]
            bench = Benchmark(self.vlm, methods, [2], 8, 2, wall_clock, SIZES[1][::-1])
            bench.run(1, warmup=0)
            found.outcomes["bench"] = bench.rows()

    # -- parts ------------------------------------------------------------------------------------------------------

    def _module(self, mode: str) -> PruneModule:
        vlm = self.vlm.detach()

        class OnModel(PruneModule):
            def load_frozen(self, *_: Any, **__: Any) -> VLM:
                return vlm

        try:
            pruner, repair = rcp_and_repair(vlm.model)
            return OnModel(vlm.name, pruner, repair, SHARE, train_mode=mode, max_new_tokens=2, lr=1e-3, warmup=0.0)
        except LitPruneError as error:
            if UNREAD not in str(error):
                raise
            pruner, repair = rcp_and_repair(vlm.model, reads=False)
            return OnModel(vlm.name, pruner, repair, SHARE, train_mode=mode, max_new_tokens=2, lr=1e-3, warmup=0.0)

    def _trained(self) -> PruneModule:
        """The module that `fit` left, its plug-in attached again."""
        if self.module is None:
            self.module = self._module("drop")
        if self.vlm.plugin is not self.module.plugin:
            self.vlm.attach(self.module.plugin, keep=SHARE)
        return self.module

    def _plugins(self) -> list[Plugin]:
        """The trained plug-in, one that reads nothing, and one that reads the attention of the layer before."""
        untrained = [Plugin(make(), None).eval() for make in list(methods(stages(self.vlm.model)).values())[:2]]
        return [self._trained().plugin.eval(), *filter(self._fits, untrained)]

    def _fits(self, plugin: Plugin) -> bool:
        """True if the model doesn't refuse a method."""
        try:
            self.vlm.attach(plugin, keep="80%")
        except LitPruneError:
            return False
        self.vlm.detach()
        return True

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Inside, nothing is attached to begin with, and nothing in the end."""
        self._trained()
        self.vlm.detach()
        try:
            yield
        finally:
            self.vlm.detach()

    def _data(self, eval_batch_size: int = 3) -> InstructData:
        splits = dict.fromkeys(("train", "val", "test", "predict"), str(self.records))
        data = InstructData(self.vlm.name, **splits, batch_size=2, eval_batch_size=eval_batch_size)
        data.processor = self.processor
        return data

    def _inputs(self) -> Any:
        return self.vlm.encode([Image.new("RGB", size) for size in SIZES[:2]], ["what is it ?", "is it a b ?"])

    def _trainer(self, **options: Any) -> Trainer:
        silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        fixed = {"accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        return Trainer(**silent, **fixed, default_root_dir=self.folder, **options)


def _records(folder: Path) -> Path:
    """Four questions about one picture each, but one about two, and one about none."""
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(folder / f"{number}.png")
    records = [
        {
            "id": number,
            "image": [f"{image}.png" for image in images],
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(images) + "what is " + "it " * (1 + number) + "?"},
                {"from": "gpt", "value": "a b"},
            ],
        }
        for number, images in enumerate(SHOWN)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
