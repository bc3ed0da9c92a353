"""A blank sample for ranks that have no image: under DeepSpeed all ranks must run the same modules.

With ZeRO-3 a module's weights are gathered from all ranks when it runs: a rank whose batch has texts only, or no sample
left, would pass by the vision tower, the projector and the pruner, and the others would wait for it for ever. The other
stages add up the ranks' gradients in the order in which they come, which is that of the modules.
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
    """Whether any sample of a batch has an image."""
    return not set(batch["inputs"]) <= set(TOKEN_KEYS)


def with_blank(batch: dict[str, Any], vlm: VLM) -> dict[str, Any]:
    """A batch without images with one more sample behind the others: a grey image, a word, and no answer to learn."""
    blank = dict(vlm.encode([Image.new("RGB", (32, 32), "grey")], ["?"]))
    fill = {"input_ids": pad_token(vlm.processor), "labels": IGNORED}
    labels = torch.full_like(blank["input_ids"], IGNORED)
    rows, columns = len(batch["ids"]) + 1, blank["input_ids"].shape[1]
    nowhere = torch.zeros(rows, 1, columns, device=blank["input_ids"].device)
    found = {**batch, "boxes": [*batch["boxes"], []], "hints": {"regions": nowhere}}
    found["inputs"] = _joined(batch["inputs"], {**blank, "labels": labels}, fill, left=False)
    if "prompts" in batch:
        found["prompts"] = _joined(batch["prompts"], blank, fill, left=True)
    return found


def _joined(inputs: dict[str, Tensor], blank: dict[str, Tensor], fill: dict[str, int], left: bool) -> dict[str, Tensor]:
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
