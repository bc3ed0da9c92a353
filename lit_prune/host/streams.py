"""States of models that carry several streams of them from layer to layer (hyper-connections).

A method and a repair adapter see one state per token, the mean of its streams [ours]; what a token gains, each of its
streams gains.
"""

from jaxtyping import Float, Int
from torch import Tensor

from lit_prune.ops import selection


def mean_stream(hidden: Tensor, width: int) -> Float[Tensor, "batch columns width"]:
    """One state per token, of (batch, columns, width), (batch, columns, streams x width) or (..., streams, width)."""
    if hidden.ndim == 3 and hidden.shape[2] == width:
        return hidden
    return hidden.flatten(2).unflatten(2, (-1, width)).mean(2)


def gained(hidden: Tensor, before: Float[Tensor, "batch columns width"], after: Tensor) -> Tensor:
    """The states whose mean was `before`, with the mean `after`."""
    if hidden.shape == after.shape:
        return after
    streams = hidden.flatten(2).unflatten(2, (-1, before.shape[2]))
    return (streams + (after - before)[:, :, None]).reshape(hidden.shape)


def rows_at(hidden: Tensor, columns: Int[Tensor, "batch some"]) -> Tensor:
    """States at some columns, with all their streams."""
    if hidden.ndim == 3:
        return selection.gather_rows(hidden, columns)
    return selection.gather_rows(hidden.flatten(2), columns).unflatten(2, hidden.shape[2:])
