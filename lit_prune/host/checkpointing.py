"""Activation checkpointing of a frozen decoder: layers keep their inputs alone and run again in backward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lit_prune.errors import LitPruneError
from lit_prune.host import parts
from lit_prune.host.compat import enable_checkpointing


def prepare(model: nn.Module, draws: bool = False) -> None:
    """Prepare every layer; nothing changes until a forward runs inside `checkpointed`.

    `draws`: random numbers are drawn inside the layers, and the second run has to draw the same.

    Raises:
        LitPruneError: a model that has no activation checkpointing.
    """
    model = parts.unwrap(model)
    try:
        # A frozen layer alone draws no random numbers. Reentrant checkpoints lose gradients that come by keyword.
        options = {"use_reentrant": False, "preserve_rng_state": draws}
        enable_checkpointing(model, options)
    except ValueError as error:
        raise LitPruneError(f"model.checkpoint_activations: {error}") from error
    # Without this, inputs are made to require gradients, and backward runs down to the embeddings.
    model.disable_input_require_grads()


@contextmanager
def checkpointed(model: nn.Module, first: int) -> Iterator[None]:
    """Forwards inside keep the inputs of decoder layers from `first` on, and nothing in them.

    transformers asks each layer's own training flag; what is inside a layer stays in evaluation mode, and so do the
    layers below `first`, which have no gradients. Backward may run outside.
    """
    layers = parts.find(model).layers[first:]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
