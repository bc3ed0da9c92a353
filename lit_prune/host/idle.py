"""Layers whose work a forward can leave out: those below a point that another forward has reached, and late ones.

A hook can't skip a layer, but it can hand it one column and stretch what comes out to the length that everything
around expects. So every module still runs in its order on every rank, which sharded weights need, and no forward, layer
list or class is touched. A layer over one column costs about what it costs in decoding.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Prefix:
    """States at the input of decoder layer `layer`: the first forward leaves them, the next ones start from them.

    Only for forwards over the same batch that don't differ below that layer.
    """

    layer: int
    states: Tensor | None = None


def one_column(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A layer's arguments with the first column alone."""
    cos, sin = kwargs["position_embeddings"]
    rope = (cos[..., :1, :], sin[..., :1, :])
    kwargs = {**kwargs, "attention_mask": None, "position_ids": None, "position_embeddings": rope}
    return (args[0][:, :1], *args[1:]), kwargs


def stretched(output: Tensor, length: int) -> Tensor:
    """An idle layer's output at the length of the sequence, without memory; its values mean nothing."""
    return output[:, :1].expand(-1, length, -1)
