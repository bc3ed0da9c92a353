"""Inputs of `generate` and `show`: model, images, prompts, pruner."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lit_prune.commands._support.console import err, say
from lit_prune.errors import LitPruneError
from lit_prune.loading import Base, context_length, hide_progress
from lit_prune.ops.budget import Budget, parse_budget
from lit_prune.plugin import Plugin
from lit_prune.vlm import VLM, as_plugin, load

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SEED = 0  # of untrained weights


def image_pixels(image_size: list[int] | None) -> tuple[int, int] | None:
    """Height and width in pixels as an option gives them."""
    if image_size is None:
        return None
    if len(image_size) != 2 or min(image_size) < 1:
        raise LitPruneError("--image-size takes height and width in pixels, e.g. --image-size 672 1008")
    return image_size[0], image_size[1]


def load_model(model: Base, dtype: Dtype = "auto", device: str = "auto", random_weights: bool = False) -> VLM:
    """Load the frozen model on a device; `auto` is the GPU if available."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LitPruneError(f"device {wanted} can't be used: {str(error).splitlines()[0]}") from error
    hide_progress()
    with err.status("loading the model"):
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        return load(model, dtype=chosen, random_weights=random_weights, device=wanted)


@dataclass(frozen=True)
class Choice:
    """A method and its budget, read before a model is loaded: most mistakes show then."""

    name: str  # as it was given
    plugin: Plugin
    keep: Budget | None  # None: the plug-in's own

    @classmethod
    def of(cls, pruner: str, keep: Any) -> "Choice":
        """By the method's name, YAML file or plug-in folder; raises `LitPruneError`."""
        budget, plugin = None if keep is None else parse_budget(keep, "--keep"), as_plugin(pruner)
        if budget is None and plugin.keep is None and plugin.pruner.default_keep is None:
            raise LitPruneError(
                f"{pruner} names no budget: give --keep N, visual tokens averaged over the decoder layers"
            )
        return cls(pruner, plugin, budget)


def own_choice(vlm: VLM, name: str, keep: Any = None) -> Choice | None:
    """The plug-in that came with the model, where `name` is that of a plug-in and not of a model; else None."""
    budget = None if keep is None else parse_budget(keep, "--keep")
    return None if vlm.plugin is None else Choice(name, vlm.plugin, budget)


def attach(vlm: VLM, choice: Choice) -> str:
    """Attach a method; returns its title."""
    plugin = choice.plugin
    described = plugin.dims is None  # a saved one knows the model that it was made for
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vlm.attach(plugin, keep=choice.keep)
    name = _title(plugin)
    if plugin.trained and described:
        say(f"note: {choice.name} describes a method that has weights; they are untrained here")
        return f"{name}, untrained"
    return name


def _title(plugin: Plugin) -> str:
    """The method's name, else its class's as words: TextAttention is "Text attention"."""
    if plugin.title:
        return plugin.title
    first, *rest = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", type(plugin.pruner).__name__).split()
    return " ".join([first, *(word.lower() for word in rest)])


def encode(vlm: VLM, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
    """Model inputs of one image and one prompt each, checked against what the model can read."""
    inputs = vlm.encode(images, prompts)
    _check_length(vlm, inputs["attention_mask"].sum(1))
    _note_unknown(vlm, inputs["input_ids"])
    return inputs


def _check_length(vlm: VLM, lengths: Tensor) -> None:
    limit = context_length(vlm.processor, vlm.name)
    if limit is not None and int(lengths.max()) > limit:
        raise LitPruneError(
            f"prompt {int(lengths.argmax()) + 1} is too long: {int(lengths.max())} tokens with its image's, and the "
            f"context of {vlm.name} has {limit}"
        )


def _note_unknown(vlm: VLM, ids: Tensor) -> None:
    """A closed vocabulary such as micro's reads other words as unknown; without a word about it, answers puzzle."""
    count = int((ids == vlm.processor.tokenizer.unk_token_id).sum())
    if vlm.processor.tokenizer.unk_token_id is not None and count:
        say(f"note: {count} word(s) of the prompts are not in the vocabulary of {vlm.name}")


def respond(vlm: VLM, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Greedy answers of the model as it stands, pruned or plain."""
    if max_new_tokens < 1:
        raise LitPruneError(f"max_new_tokens={max_new_tokens} must be at least 1")
    config = copy.copy(vlm.model.generation_config)
    config.update(max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None)
    with torch.inference_mode():
        tokens = vlm.model.generate(**inputs, generation_config=config)
    return vlm.decode(tokens, inputs["input_ids"].shape[1])
