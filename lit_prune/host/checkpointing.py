"""Activation checkpointing of a frozen decoder: layers keep their inputs alone and run again in backward."""

from torch import nn

from lit_prune.errors import LitPruneError
from lit_prune.host import places


def checkpoint_activations(model: nn.Module) -> None:
    """Prepare every layer; it acts on those that `set_checkpointing` has switched on.

    Raises:
        LitPruneError: a model that has no activation checkpointing.
    """
    model = places.unwrap(model)
    try:
        # Nothing in a frozen layer draws random numbers. Reentrant checkpoints lose gradients that come by keyword.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    except ValueError as error:
        raise LitPruneError(f"model.checkpoint_activations: {error}") from error
    # Without this, inputs are made to require gradients, and backward runs down to the embeddings.
    model.disable_input_require_grads()


def set_checkpointing(model: nn.Module, first: int, on: bool) -> None:
    """Switch decoder layers from `first` on: transformers asks the layer's own training flag.

    What is inside a layer stays in evaluation mode, and so do the layers below, which have no gradients.
    """
    for layer in places.find(model).layers[first:]:
        layer.training = on
