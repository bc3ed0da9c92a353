"""Proportional attention (ToMe): add log(size) to the attention logits of each kept token."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.host.state import Forward, Selected
from lit_prune.ops import merging, selection


class ProportionalAttention:
    """Adds the logarithm of each kept token's size, the number of tokens it stands for, to its attention logits.

    (ToMe, arXiv 2210.09461, section 3: softmax(q k^T / sqrt(d) + log s).) Every token starts with size 1, and one that
    a decoder stage drops adds its size to the nearest kept one of its sample, by cosine of the layer's input states
    [ours]. What was dropped inside the vision tower left no states to compare: its size is spread evenly over the
    tokens that arrive [ours]. Everything that changes is in the `Forward` and in its `CacheState`.

    Args:
        rule: `count` adds all of the size; `similarity` that times the cosine of the two, at least 0 (in the spirit of
            RESTORE, arXiv 2606.01711; the formula is ours). `attention`: a kept token's size grows so that it gets the
            attention that the tokens dropped next to it had, in the rows that the stage reads (the logit bias of ERA,
            arXiv 2606.31982, for the tokens of a cluster; the formula is ours); each stage must read some.
    """

    def __init__(self, rule: Literal["count", "similarity", "attention"]) -> None:
        self.rule = rule

    @torch.no_grad()
    def resize(self, hidden: Float[Tensor, "batch columns width"], selected: Selected, forward: Forward) -> None:
        """Add the sizes of the visual tokens that are not kept to those that are, before they are packed."""
        columns, dead = selected.columns, selected.dead
        states = selection.gather_rows(hidden, columns)
        known = (
            torch.ones(forward.packed.valid.shape, device=hidden.device)
            if forward.packed.token_sizes is None
            else forward.packed.token_sizes
        )
        before = known
        if dead is not None:
            arrived = forward.packed.visual & ~dead
            each = forward.total / arrived.sum(1).clamp(min=1)
            before = torch.where(arrived, each[:, None], known)
        most = None if forward.session.soft else forward.most_visual
        stage = (states, before.gather(1, columns), selected.alive, selected.kept.mask)
        if self.rule == "attention":
            sizes = merging.rectified_sizes(*stage, selected.attention, most)
        else:
            sizes = merging.collect_sizes(*stage, weighted=self.rule == "similarity", most=most)
        _grow(before.to(sizes.dtype).scatter(1, columns, sizes), known, forward)


@torch.no_grad()
def merged(selected: Selected, forward: Forward) -> None:
    """Take the sizes that a merging method gave its kept tokens."""
    ones = torch.ones(forward.packed.valid.shape, device=forward.packed.valid.device)
    known = ones if forward.packed.token_sizes is None else forward.packed.token_sizes
    given = torch.where(selected.alive, selected.kept.sizes.float(), known.gather(1, selected.columns))
    _grow(known.scatter(1, selected.columns, given), known, forward)


def remember(index: int, forward: Forward, past: int) -> None:
    """Bias of the `past` cached keys of the layers from `index` on, and what later forwards find there."""
    state = forward.cache_state
    cached = state.bias.get(index)
    if cached is None and forward.packed.token_sizes is None:
        return
    if forward.packed.key_bias is not None and past:
        cached = forward.packed.key_bias.new_zeros(len(forward.packed.valid), 0) if cached is None else cached
        cached = pad(cached, (0, past - cached.shape[1]))
    forward.keys.past_bias = cached
    if forward.packed.token_sizes is not None:
        own = forward.packed.token_sizes.log()
        state.bias[index] = own if cached is None else torch.cat([cached, own], dim=1)


def _grow(sizes: Float[Tensor, "batch columns"], known: Float[Tensor, "batch columns"], forward: Forward) -> None:
    """Set the columns' sizes, and add what log(size) gained to the bias of their keys."""
    forward.packed.token_sizes = sizes
    gained = sizes.log() - known.log()
    forward.packed.key_bias = gained if forward.packed.key_bias is None else forward.packed.key_bias + gained
