"""Positions without gaps: from each stage on, tokens are numbered anew, and cached sequences go on from there."""

import logging
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedConfig

from lit_prune.errors import LitPruneError
from lit_prune.host.options import HostOptions
from lit_prune.host.state import Forward

log = logging.getLogger(__name__)


class Renumbering:
    """Rotary embeddings of a decoder whose tokens move up where others have left.

    A layer before a stage keeps the numbers that it had: its cached keys carry them. Everything that changes is in the
    `Forward` and in its `CacheState`.

    Args:
        decoder: the model's decoder, with a rotary embedding that all layers share.

    Raises:
        LitPruneError: a decoder whose tokens have more than one position, or whose layers have several embeddings.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.rotary = getattr(decoder, "rotary_emb", None)
        if not renumbers(decoder):
            raise LitPruneError(
                "positions: renumbered needs one position per token and one rotary embedding for all layers; this "
                "model's tokens have several (M-RoPE: time, height, width), or its layers differ: use "
                "positions: original"
            )

    def enter(self, forward: Forward, kwargs: dict) -> None:
        """Take the position ids that the decoder gave its layers, before the first stage changes any."""
        if forward.packed.positions is None:
            forward.packed.positions = kwargs["position_ids"].expand(forward.packed.columns.shape[0], -1)

    def leave(self, index: int, hidden: Tensor, forward: Forward) -> None:
        """Give the layers from `index` on, a stage's, the embeddings of the new numbers, if any token has left."""
        state, removed = forward.cache_state, forward.removed
        past = None if state is None else state.removed.get(index)
        if removed is None and past is None:
            return
        positions = forward.packed.positions if past is None else forward.packed.positions - past[:, None]
        cos, sin = self.rotary(hidden, positions)  # on its own device, by accelerate's hook
        forward.keys.rope = (cos.to(hidden.device), sin.to(hidden.device))
        if removed is not None and state is not None:
            state.removed[index] = removed if past is None else past + removed


def renumbers(decoder: nn.Module) -> bool:
    """True if tokens of this decoder can be renumbered: each has one position, and all layers one embedding."""
    rotary = getattr(decoder, "rotary_emb", None)
    # Some M-RoPE classes know their sections without a word of them in the configuration.
    return rotary is not None and not hasattr(rotary, "mrope_section") and _one_position(decoder.config)


def settled(
    options: HostOptions,
    decoder: nn.Module,
    positions: str | None,
    proportional_attention: str | None,
    frames: str | None,
) -> HostOptions:
    """A plug-in's options for one decoder, with those that the caller sets in their place; None: not set.

    Methods ask for renumbered positions where their authors' code, written for models with one position per token,
    renumbers; elsewhere their tokens keep the original ones, with a warning. Only what the caller asks for is refused.
    """
    if positions is None and options.positions == "renumbered" and not renumbers(decoder):
        log.warning(
            "kept tokens keep their original positions, where this method renumbers them: tokens of this model have "
            "several positions each (M-RoPE), or its layers have several embeddings"
        )
        positions = "original"
    given = {"positions": positions, "proportional_attention": proportional_attention, "frames": frames}
    return replace(options, **{name: value for name, value in given.items() if value is not None})


def _one_position(config: PreTrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return "mrope_section" not in rope and not any(isinstance(value, dict) for value in rope.values())
