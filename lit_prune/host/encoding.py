"""Images through vision tower and projector ahead of the forward that they belong to."""

import inspect
from typing import Any

from torch import nn

from lit_prune.host.compat import ENCODED, parameters
from lit_prune.host.counting import COUNTED, Counter, unknown
from lit_prune.host.parts import INPUTS, ended_rows
from lit_prune.host.pictures import keep_sizes


def encode_images(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model with what vision tower and projector make of their pixels in place of these."""
    encoded, rest = {}, dict(inputs)
    for modality, names in INPUTS.items():
        pixels = next((name for name in names if inputs.get(name) is not None), None)
        encode = getattr(model.base_model, f"get_{modality}_features", None)
        taken = () if encode is None else tuple(inspect.signature(encode).parameters)
        if pixels is None or names[0] not in taken or ENCODED not in parameters(type(model).forward):
            continue  # what can't be encoded apart, each forward encodes
        asked = {name: inputs[name] for name in taken if inputs.get(name) is not None}
        asked[names[0]] = rest.pop(pixels).to(model.dtype)
        counter = Counter() if unknown(model.config) else None
        try:
            encoded[modality] = encode(**asked, return_dict=True)
        finally:
            flops = None if counter is None else counter.end()
        if flops is not None:
            setattr(encoded[modality], COUNTED, flops)
    keep_sizes(encoded, inputs, ended_rows(model.config))
    return {**rest, ENCODED: encoded} if encoded else inputs
