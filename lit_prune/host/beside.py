"""Rows of a layer that run beside those that learn, without autograd.

Under soft masks the states of a dropped token have a weight of 1e-8 in all that follows, so hardly any gradient returns
through them: what teaches the token is its gate, a bias on its keys. Its keys and values are needed all the same. So a
layer's call gets the rows that are not dropped alone, and when these come to their attention, the others run through
the same layer without autograd, with the keys and values of all rows. Nothing is computed twice but the attention of
the rows that learn, and backward runs over those rows alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from lit_prune.cost.trace import WORTH
from lit_prune.errors import LitPruneError
from lit_prune.host.attention import REQUEST, Captured, Request
from lit_prune.host.compat import plain_forward, unsupported
from lit_prune.host.compiled import CompiledForward
from lit_prune.host.packing import KEPT
from lit_prune.host.slicing import Slices


class Rows:
    """Split of a sequence's columns into those that learn and the others, the same for all layers up to the next stage.

    Args:
        order: all columns of each sample, those that learn last.
        learning: how many these are in the sample that has most; other samples have some of the others among them.
    """

    def __init__(self, order: Int[Tensor, "batch columns"], learning: int) -> None:
        self.order, self.learning = order, learning
        others = order.shape[1] - learning
        self.own, self.others = Slices(order[:, others:], order.shape[1]), Slices(order[:, :others], order.shape[1])
        self.masks: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}  # by identity, with the mask itself

    @classmethod
    def of(cls, learning: Bool[Tensor, "batch columns"], most: int | None) -> "Rows | None":
        """The split; None where too few columns are dropped. `most`: see `learning`; None: the device is asked."""
        most = int(learning.sum(1).max()) if most is None else most
        if learning.shape[1] - most < WORTH * learning.shape[1]:
            return None
        return cls(learning.to(torch.uint8).argsort(dim=1, stable=True), most)

    def to(self, device: torch.device) -> "Rows":
        """For layers on another device."""
        return Rows(self.order.to(device), self.learning)

    def join(
        self, own: Shaped[Tensor, "batch learning ..."], others: Shaped[Tensor, "batch others ..."]
    ) -> Shaped[Tensor, "batch columns ..."]:
        """Values of both in the order of their columns."""
        full = others.new_empty(self.order.numel(), *others.shape[2:])
        for rows, values in ((self.others, others), (self.own, own)):
            full = full.index_copy_(0, _flat(rows), values.flatten(0, 1))
        return full.unflatten(0, self.order.shape)

    def mask(self, whole: Any, dtype: torch.dtype) -> Tensor:
        """Float mask of the rows that learn over all keys in `order`, made once; `whole`: the layer's, None: causal."""
        key = (id(whole), dtype)
        if key not in self.masks:
            rows, batch = self.own.columns, len(self.order)
            allowed = self.order[:, None] <= rows[..., None]
            if whole is not None:
                visible = (whole if whole.dtype == torch.bool else whole >= 0)[:, 0].expand(batch, -1, -1)
                visible = visible.gather(1, rows[..., None].expand(-1, -1, visible.shape[2]))
                allowed = visible.gather(2, self.order[:, None].expand(-1, rows.shape[1], -1))
            zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            self.masks[key] = (whole, zeros.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None])
        return self.masks[key][1]

    def check(self, attention: str, packs: bool, layer: nn.Module) -> None:
        """Raise `LitPruneError` where a layer can't be split: by its attention function, shared rows, compilation."""
        if attention != "sdpa":
            raise LitPruneError(
                f"model.backward: kept needs attn_implementation='sdpa', and this model has {attention}"
            )
        if packs:
            raise LitPruneError("model.backward: kept can't split rows that samples share; set data.pack: false")
        if isinstance(vars(layer).get("forward"), CompiledForward):
            raise LitPruneError("model.backward: kept doesn't run in compiled layers; train without VLM.compile()")

    def split(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], "Beside"]:
        """A layer's arguments at the rows that learn, and what runs the others meanwhile."""
        hidden, *rest = args
        others = (take(self.others, hidden.detach()), *self.others.of(tuple(rest)))
        beside = Beside(self, partial(_run, layer, others, self.others.named(kwargs, KEPT)))
        request = replace(kwargs[REQUEST], beside=beside)
        own = (take(self.own, hidden), *self.own.of(tuple(rest)))
        return own, {**self.own.named(kwargs, KEPT), REQUEST: request}, beside


@dataclass
class Beside:
    """One call of a layer over the rows that learn; `run` takes the others through it.

    `output`: of the others, until it is joined. `ran`: they have run; a layer that activation checkpointing runs again
    needs no more than their keys and values.
    """

    rows: Rows
    run: Callable[[Request], Tensor]
    output: Tensor | None = None
    ran: bool = False

    def attend(self, attention: Callable, states: tuple[Tensor, ...], mask: Any, request: Request, kwargs: dict):
        """Attention of the rows that learn to all keys, after the others have run."""
        query, key, value = states
        others = Others(self.rows, tuple(part.detach() for part in states), self.ran)
        # What the others draw (dropout of adapters) leaves the rest as it is, also where they don't run to the end.
        with torch.no_grad(), torch.random.fork_rng([query.device.index] if query.is_cuda else []):
            try:
                self.output = self.run(replace(request, beside=others))
            except Captured:
                if not self.ran:
                    raise
        self.ran = True
        key, value = (torch.cat(pair, dim=2) for pair in zip(others.keys, (key, value), strict=True))
        bias = request.key_bias.gather(1, self.rows.order)
        request = replace(request, beside=None, tap=None, watch=None, key_bias=bias)
        return attention(query, key, value, self.rows.mask(mask, query.dtype), **{**kwargs, REQUEST: request})

    def join(self, layer: nn.Module, own: Tensor) -> Tensor:
        """The layer's states of all rows."""
        if self.output is None:
            raise unsupported(f"{type(layer).__name__} hands its keywords to no attention function")
        output, self.output = self.output, None
        return self.rows.join(own, output)


@dataclass
class Others:
    """The other rows at their attention: they leave their keys and values for the rows that learn.

    `own`: queries, keys and values of the rows that learn. `ran`: the attention itself isn't wanted.
    """

    rows: Rows
    own: tuple[Tensor, ...]
    ran: bool
    keys: tuple[Tensor, ...] = ()

    def attend(self, attention: Callable, states: tuple[Tensor, ...], mask: Any, request: Request, kwargs: dict):
        """Attention as it is without a split, over all rows in their order; these rows of it."""
        self.keys = states[1:]
        if self.ran:
            raise Captured
        pairs = zip(self.own, states, strict=True)
        joined = (self.rows.join(*(x.transpose(1, 2) for x in pair)).transpose(1, 2) for pair in pairs)
        output, weights = attention(*joined, mask, **{**kwargs, REQUEST: replace(request, beside=None)})
        return take(self.rows.others, output), weights


def take(rows: Slices, values: Shaped[Tensor, "batch columns ..."]) -> Shaped[Tensor, "batch some ..."]:
    """Values of some rows, whatever there is of each."""
    return values.flatten(0, 1).index_select(0, _flat(rows)).unflatten(0, rows.columns.shape)


def _flat(rows: Slices) -> Tensor:
    starts = torch.arange(len(rows.columns), device=rows.columns.device)[:, None] * rows.length
    return (rows.columns + starts).flatten()


def _run(layer: nn.Module, args: tuple, kwargs: dict[str, Any], request: Request) -> Tensor:
    output = plain_forward(layer)(*args, **{**kwargs, REQUEST: request})
    return output[0] if isinstance(output, tuple) else output
