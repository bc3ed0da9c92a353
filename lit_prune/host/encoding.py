"""Images through vision tower and projector ahead of the forward that they belong to."""

import inspect
from typing import Any

from torch import nn

from lit_prune.host.compat import ENCODED
from lit_prune.host.parts import INPUTS


def encode_images(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model with what vision tower and projector make of their pixels in place of these."""
    encoded, rest = {}, dict(inputs)
    for modality, pixels in INPUTS.items():
        if inputs.get(pixels) is None:
            continue
        encode = getattr(model.base_model, f"get_{modality}_features")
        asked = {name: inputs[name] for name in inspect.signature(encode).parameters if inputs.get(name) is not None}
        asked[pixels] = rest.pop(pixels).to(model.dtype)
        encoded[modality] = encode(**asked, return_dict=True)
    return {**rest, ENCODED: encoded} if encoded else inputs
