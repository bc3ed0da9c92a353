"""Dummy image for ranks without one: under DeepSpeed all ranks must run the same modules.

ZeRO-3 gathers a module's weights from all ranks when it runs. A rank whose batch is text-only or empty would skip the
vision tower, projector and pruner, and the others' all-gather would deadlock. ZeRO-1 and -2 reduce gradients in the
order in which they arrive, which depends on the modules that ran.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.data.conversation import IGNORED, TOKEN_KEYS
from lit_prune.data.dataset import pad_token
from lit_prune.vlm import VLM


def has_image(batch: dict[str, Any]) -> bool:
    """True if any sample of the batch has an image."""
    return not set(batch["inputs"]) <= set(TOKEN_KEYS)


def with_blank(batch: dict[str, Any], vlm: VLM) -> dict[str, Any]:
    """Append a dummy sample to a batch without images: a grey image, one word, and no answer to learn."""
    blank = dict(vlm.encode([Image.new("RGB", (32, 32), "grey")], ["?"]))
    fill = {"input_ids": pad_token(vlm.processor), "labels": IGNORED}
    labels = torch.full_like(blank["input_ids"], IGNORED)
    rows, columns = len(batch["ids"]) + 1, blank["input_ids"].shape[1]
    no_regions = torch.zeros(rows, 1, columns, device=blank["input_ids"].device)
    extended = {**batch, "boxes": [*batch["boxes"], []], "hints": {"regions": no_regions}}
    extended["inputs"] = _joined(batch["inputs"], {**blank, "labels": labels}, fill, left=False)
    if "prompts" in batch:
        extended["prompts"] = _joined(batch["prompts"], blank, fill, left=True)
    return extended


def _joined(inputs: dict[str, Tensor], blank: dict[str, Tensor], fill: dict[str, int], left: bool) -> dict[str, Tensor]:
    """Concatenate the token tensors of a batch and the dummy sample, padded to equal length on one side."""
    joined = dict(blank)
    for key in TOKEN_KEYS:
        if key in inputs and key in blank:
            rows = [inputs[key], blank[key].to(inputs[key])]
            longest = max(row.shape[1] for row in rows)
            gaps = [longest - row.shape[1] for row in rows]
            sides = [(gap, 0) if left else (0, gap) for gap in gaps]
            rows = [pad(row, side, value=fill.get(key, 0)) for row, side in zip(rows, sides, strict=True)]
            joined[key] = torch.cat(rows)
    return joined
