"""Attention mass given back: a kept token is attended to as the several tokens that it stands for."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.host.state import Forward
from lit_prune.ops import merging, selection


class MassGivenBack:
    """Adds the logarithm of each kept token's mass to its attention logits, as proportional attention does.

    (ToMe, arXiv 2210.09461, section 3: softmax(q k^T / sqrt(d) + log s).) Every token starts with mass 1, and one that
    a decoder stage drops gives its mass to the nearest kept one of its sample, by cosine of the layer's input states
    [ours]. What was dropped inside the vision tower left no states to compare: its mass is spread evenly over the
    tokens that arrive [ours]. Everything that changes is in the `Forward` and in its `CacheState`.

    Args:
        how: `count` gives all of the mass; `similarity` that times the cosine of the two, at least 0 (in the spirit of
            RESTORE, arXiv 2606.01711; the formula is ours).
    """

    def __init__(self, how: Literal["count", "similarity"]) -> None:
        self.how = how

    @torch.no_grad()
    def give(
        self, hidden: Tensor, columns: Tensor, alive: Tensor, keep: Tensor, forward: Forward, dead: Tensor | None
    ) -> None:
        """Hand the mass of the visual `columns` that are not kept to those that are, before they are packed.

        `dead`: columns that stand for what the vision tower dropped, if this is where it arrives.
        """
        states = selection.gather_rows(hidden, columns)
        known = torch.ones(forward.valid.shape, device=hidden.device) if forward.mass is None else forward.mass
        before = known
        if dead is not None:
            arrived = forward.visual & ~dead
            each = forward.total / arrived.sum(1).clamp(min=1)
            before = torch.where(arrived, each[:, None], known)
        most = None if forward.session.soft else forward.most_visual
        mass = merging.collect_mass(
            states, before.gather(1, columns), alive, keep, weighted=self.how == "similarity", most=most
        )
        forward.mass = before.scatter(1, columns, mass)
        gained = forward.mass.log() - known.log()
        forward.key_bias = gained if forward.key_bias is None else forward.key_bias + gained

    @staticmethod
    def remember(index: int, forward: Forward, past: int) -> None:
        """Bias of the `past` cached keys of the layers from `index` on, and what later forwards find there."""
        state = forward.cache_state
        cached = state.bias.get(index)
        if forward.key_bias is not None and past:
            cached = forward.key_bias.new_zeros(len(forward.valid), 0) if cached is None else cached
            cached = pad(cached, (0, past - cached.shape[1]))
        forward.past_bias = cached
        if forward.mass is not None:
            own = forward.mass.log()
            state.bias[index] = own if cached is None else torch.cat([cached, own], dim=1)
