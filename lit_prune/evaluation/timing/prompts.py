"""Random prompts, and the two halves of a request: the prefill and the steps that follow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.cost.sizes import USUAL
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.noise import noise
from lit_prune.host.parts import find, unwrap
from lit_prune.host.zoo.inputs import types_of
from lit_prune.vlm import VLM

SEED = 0  # of the random prompts and of untrained plug-ins


@dataclass(frozen=True)
class Prompt:
    """Inputs of one batch size, without padding: with pixels, and with the images' features already projected.

    `visual`: visual tokens of each sample.
    """

    pixels: dict[str, Any]
    features: dict[str, Any]
    visual: int


def random_prompt(vlm: VLM, batch: int, text_tokens: int, image: tuple[int, int] = USUAL) -> Prompt:
    """One text token, an image of noise and random text in each sample; the same for every method.

    `image`: height and width in pixels where images differ.
    """
    model, parts = vlm.model, find(vlm.model)
    size, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(SEED)
    text = torch.randint(size, (batch, text_tokens), generator=generator)
    token = parts.tokens["image"]
    for special in parts.tokens.values():
        text[text == special] = (max(parts.tokens.values()) + 1) % size
    images, shown = noise(unwrap(model), token, batch, image, generator)
    ids = torch.cat([text[:, :1], shown.expand(batch, -1), text[:, 1:]], 1)
    inputs = {"input_ids": ids, **images, **types_of(model.config.model_type, unwrap(model), token, ids)}
    for name, value in inputs.items():
        inputs[name] = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
    return Prompt(inputs, vlm.encode_images(inputs), int((shown == token).sum()))


def prefill(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The first token, greedily, and the cache."""
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), cache_of(output)


def decode(model: nn.Module, token: Tensor, cache: Any, steps: int) -> Tensor:
    """The last of `steps` further tokens, greedily."""
    cached = {cache_keyword(unwrap(model)): cache, "use_cache": True, "logits_to_keep": 1}
    for _ in range(steps):
        output = model(input_ids=token, **cached)
        token = output.logits[:, -1:].argmax(-1)
    return token
