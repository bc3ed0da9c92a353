"""Price a prompt and its answer on a model's shape, full and at a method's budgets (`lit-prune cost`)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lit_prune.commands._support.inputs import image_pixels
from lit_prune.cost.decoders import decoder_size
from lit_prune.cost.flops import ModelSize, decode, decoder_layers, decoder_total, kv_bytes, price
from lit_prune.cost.shapes import Config, Shape, names
from lit_prune.cost.sizes import USUAL, known_size
from lit_prune.cost.towers import tower_trace
from lit_prune.cost.trace import TowerTrace, Trace, plan, step
from lit_prune.errors import LitPruneError
from lit_prune.host.parts import check_stages
from lit_prune.loading import load_shape
from lit_prune.ops.budget import Budget, format_budget, parse_budget, resolve
from lit_prune.plugin import Plugin, unpruned
from lit_prune.plugin.methods import FULL
from lit_prune.vlm import as_plugin

MOST_TOKENS = 10_000_000  # of one prompt; squares of the count are exact in 64 bits


@dataclass(frozen=True)
class Prompt:
    """Token counts of a prompt and its answer, and bytes of a cached value."""

    visual: int
    text: int
    answer: int
    bytes_per_value: int

    @property
    def steps(self) -> int:
        """Decoding steps of the answer: the prefill gives its first token."""
        return self.answer - 1


@dataclass(frozen=True)
class Bill:
    """The price of one prompt and its answer under one schedule: FLOPs by part, bytes, and what each layer sees."""

    schedule: dict[int, int]
    tower: TowerTrace | None  # what the image's tiles ask of a vision tower that the method prunes inside
    average: float
    prefill: dict[str, float]
    decoder: float  # of the prefill, with all that pruning adds
    step: dict[str, float]  # of the first decoding step
    answer: dict[str, float]  # of all decoding steps
    kv: int
    kv_after: int
    visual: list[int]  # visual tokens at each decoder layer's input
    layers: list[float]  # FLOPs of each decoder layer


@dataclass(frozen=True)
class Case:
    """A prompt on a model's shape, and the method that is to prune it, if any."""

    model: str
    config: Config
    size: ModelSize
    prompt: Prompt
    dtype: str
    method: str | None  # as it was given
    plugin: Plugin

    @property
    def title(self) -> str:
        """Describe what is priced."""
        prompt = self.prompt
        return f"{self.model}: {prompt.visual} visual and {prompt.text} text tokens, an answer of {prompt.answer}"

    def budgets(self, keep: list[Any] | None) -> dict[str, Budget]:
        """The budgets as they are written, an average or `layer:count` pairs; by default the plug-in's own.

        A share is one of the prompt's visual tokens.
        """
        if self.method is None:
            if keep:
                raise LitPruneError("--keep needs a method: give --pruner too")
            return {}
        if keep:
            read = [parse_budget(each, "--keep") for each in keep]
            return {format_budget(each): resolve(each, self.prompt.visual, "--keep") for each in read}
        if self.plugin.keep is None:
            raise LitPruneError("give budgets: --keep N, visual tokens averaged over the decoder layers' inputs")
        return {format_budget(self.plugin.keep): resolve(self.plugin.keep, self.prompt.visual)}

    def bill(self, budget: Budget | None = None) -> Bill:
        """The price at a budget; without one that of the full model."""
        size, prompt, plugin = self.size, self.prompt, self.plugin if budget is not None else unpruned()
        pruner, repair = plugin.pruner, plugin.repair
        schedule = pruner.schedule(prompt.visual if budget is None else budget, prompt.visual, size.depth)
        trace = plan(schedule, prompt.visual, prompt.text, size.depth, pruner, repair)
        if budget is not None:
            # Of a tower whose price isn't known, only a method that prunes inside it needs the patches: it is refused.
            patches = 0 if size.image is None else size.image.patches
            trace.tower = tower_trace(self.config, pruner, budget, patches)
        prices = [
            price(trace, size, pruner, repair),
            price(step(trace, 1), size, repair=repair),
            decode(trace, size, prompt.steps, repair),
        ]
        prefill, first, answer = ({part: flops.item() for part, flops in parts.items()} for parts in prices)
        return Bill(
            schedule=schedule,
            tower=trace.tower,
            average=trace.average_visual().item(),
            prefill=prefill,
            decoder=decoder_total(prices[0]).item(),
            step=first,
            answer=answer,
            kv=self._bytes(trace),
            kv_after=self._bytes(step(trace, prompt.steps)),
            visual=[int(count) for count in trace.visual],
            layers=decoder_layers(trace, size)[:, 0].tolist(),
        )

    def _bytes(self, trace: Trace) -> int:
        return int(kv_bytes(trace, self.size, self.prompt.bytes_per_value).item())


def _counted(config: Config, image: tuple[int, int]) -> ModelSize | None:
    """Sizes of a decoder, or tower, that its fields don't describe, counted on the model's classes without weights.

    None: nor can these be built.

    Of models whose shape is shipped the fields are enough.
    """
    if isinstance(config, Shape):
        return None
    from lit_prune.host.structure import meta_size  # brings models' code

    with suppress(Exception):  # configurations are anyone's
        return meta_size(config, image)
    return None


def _size(config: Config, image: tuple[int, int]) -> ModelSize:
    """Sizes of a model, as far as they are known; raises `LitPruneError` where the decoder's aren't."""
    described = known_size(config, image)
    if described is not None and described.tower_known:
        return described
    return _counted(config, image) or described or decoder_size(config)  # which says what is missing


def describe(
    model: str,
    pruner: str | None,
    visual: int | None,
    image_size: list[int] | None,
    text: int,
    answer: int,
    dtype: str,
) -> Case:
    """A case from the options of the command line; raises `LitPruneError` for what can't be priced."""
    try:
        config = load_shape(model)
    except LitPruneError as error:
        raise LitPruneError(f"{error}. Shapes known here: micro, {', '.join(names())}") from error
    pixels = image_pixels(image_size)
    if pixels is not None and visual is not None:
        raise LitPruneError("--image-size tells the visual tokens: leave --visual-tokens out")
    size = _size(config, pixels or USUAL)
    usual = size.image.visual if size.image is not None else size.counted[1] if size.counted is not None else None
    if visual is None and usual is None:
        raise LitPruneError(f"{model}: how many visual tokens an image has isn't known; give --visual-tokens")
    visual = usual if visual is None else visual
    for name, count in (("text", text), ("answer", answer), ("visual", visual)):
        if not 1 <= count <= MOST_TOKENS:
            raise LitPruneError(f"--{name}-tokens {count} must be at least 1, and at most {MOST_TOKENS}")
    plugin = as_plugin(pruner or FULL)
    check_stages(config, plugin.pruner.stages(size.depth))
    prompt = Prompt(visual, text, answer, getattr(torch, dtype).itemsize)
    return Case(model, config, size, prompt, dtype, pruner, plugin)
