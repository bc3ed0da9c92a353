"""Random prompts, and the two halves of a request: the prefill and the steps that follow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.evaluation import encode_images
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.places import find, unwrap
from lit_prune.vlm import VLM

SEED = 0  # of the random prompts and of untrained plug-ins


@dataclass(frozen=True)
class Prompt:
    """Inputs of one batch size, without padding: with pixels, and with the images' features already projected."""

    pixels: dict[str, Any]
    features: dict[str, Any]


def random_prompt(vlm: VLM, batch: int, text_tokens: int) -> Prompt:
    """Images of noise behind one text token, and random text after them; the same for every method.

    Raises `LitPruneError` for a family whose number of visual tokens hangs on the image.
    """
    model, places = vlm.model, find(vlm.model)
    vision, size = model.config.vision_config, model.config.get_text_config().vocab_size
    if places.image_length is None:
        raise LitPruneError(
            f"bench draws images for models whose images all have as many tokens, as in LLaVA-1.5; those of "
            f"{type(model).__name__} differ"
        )
    generator = torch.Generator().manual_seed(SEED)
    text = torch.randint(size, (batch, text_tokens), generator=generator)
    token = places.tokens["image"]
    text[text == token] = (token + 1) % size
    image = torch.full((batch, places.image_length), token)
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator).to(model.dtype)
    inputs = {"input_ids": torch.cat([text[:, :1], image, text[:, 1:]], 1), "pixel_values": pixels}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return Prompt(inputs, encode_images(vlm, inputs))


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
