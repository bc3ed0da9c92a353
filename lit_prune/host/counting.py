"""FLOPs of vision towers whose arithmetic isn't known: counted while they run, whatever their structure."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lit_prune.cost.formulas import has_formula
from lit_prune.cost.shapes import Config

Size = torch.Size
BY_CROPS = ("molmo2_vision",)  # towers whose work isn't in proportion to the visual tokens, nor said by the inputs
COUNTED = "lit_prune_flops"  # attribute of an encoded image: what encoding it took


def unknown(config: Config) -> bool:
    """True if the price of a tower for some images can't be read off configuration and inputs."""
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    return not has_formula(config) or kind in BY_CROPS


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """The full square of every head, by the shapes of queries, keys and values."""
    return sdpa_flop_count(query, key, value)


# PyTorch's counter doesn't know the CPU's fused attention.
FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


class Counter:
    """Counts from its start to its end, which may come more than once."""

    def __init__(self) -> None:
        self.mode: FlopCounterMode | None = FlopCounterMode(display=False, custom_mapping=FUSED)
        self.mode.__enter__()
        self.total = 0

    def end(self) -> int:
        """Stop, if it still counts; the FLOPs so far."""
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.total, self.mode = self.mode.get_total_flops(), None
        return self.total


def counted(encoded: dict[str, Any]) -> int | None:
    """FLOPs of encoding some images; None where they were not counted."""
    each = [getattr(output, COUNTED, None) for output in encoded.values()]
    return None if None in each else sum(each)


def shared(flops: int | None, total: Tensor) -> Tensor | None:
    """A batch's FLOPs by sample, in proportion to their visual tokens (batch,); None where they aren't known."""
    return None if flops is None else flops * total.double() / total.sum().clamp(min=1)
