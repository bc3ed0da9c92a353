"""Stages inside the vision tower, by hooks: patches that leave are never computed again.

The rest of the model expects a feature per patch, so the places of dropped patches come back behind the tower as rows
of zeros. That is all that tells later parts what was dropped, and it survives whatever happens to features on their way
(beams, crops, caching): the projector runs on the other rows only, and the decoder drops rows of zeros at its layer 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.cost.trace import TowerTrace
from lit_prune.errors import LitPruneError
from lit_prune.host.compat import bidirectional_mask, check_tower, keep_hooks_out_of_checkpoints
from lit_prune.host.parts import Tower
from lit_prune.host.session import Session
from lit_prune.ops import selection
from lit_prune.ops.budget import Budget
from lit_prune.pruners.base import PruningMethod, VisionContext

PASS = "lit_prune_tower"  # keyword under which a TowerPass travels to the tower's layers
PACKED = "lit_prune_packed"  # attribute of features on their way through the projector


@dataclass
class TowerPass:
    """One forward of the tower; (tiles, patches now), packed along with the states, class token apart."""

    ordinal: Tensor | None = None
    real: Tensor | None = None
    mask: Tensor | None = None
    sizes: Tensor | None = None  # patches that each one stands for, where a stage merged and said so
    before: Tensor | None = None  # input of the layer before the next stage
    side: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    lengths: list[Tensor] = field(default_factory=list)
    scored: int = 0  # tokens projected once more for the stages so far
    rated: int = 0  # tokens whose attention they read
    stages: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # patches that each stage found and kept


class TowerHost:
    """A pruner's stages inside one vision tower.

    Args:
        tower: where its parts are.
        pruner: the method, whose `tower` acts inside.
        keep: budget of a sample; its tiles share evenly what reaches the decoder.
        session: gives the session that a forward runs under.
    """

    def __init__(self, tower: Tower, pruner: PruningMethod, keep: Budget, session: Callable[[], Session]) -> None:
        self.tower, self.pruner, self.session = tower, pruner.tower, session
        size = tower.size
        leaving = pruner.leaving(size.share(keep), size.side**2)
        self.schedule = self.pruner.vision_schedule(leaving, size.side**2, size.features)
        self.side = self.pruner.image_side(leaving, size.side)
        check_tower(tower.layers)

    def hook(self) -> Iterator[RemovableHandle]:
        """Add the hooks, and give their handles."""
        yield self.tower.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield self.tower.module.register_forward_hook(self._leave, with_kwargs=True)
        yield self.tower.projector.register_forward_pre_hook(self._enter_projector)
        yield self.tower.projector.register_forward_hook(self._leave_projector)
        for index, layer in enumerate(self.tower.layers):
            yield layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict):
        if not self.session().prune:
            return None
        keep_hooks_out_of_checkpoints(self.tower.layers)
        kwargs, state = dict(kwargs), TowerPass(side=self.side)
        if self.side < self.tower.size.side:
            args, kwargs = _smaller(args, kwargs, self.side * module.config.patch_size)
        return args, {**kwargs, PASS: state}

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        state: TowerPass | None = kwargs.get(PASS)
        if state is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != PASS}
        hidden, *rest = args
        if index < self.tower.size.features:  # layers behind the features run too, but no stage is theirs
            hidden = self._stage(index, hidden, state) if index in self.schedule else hidden
            state.before = hidden if index + 1 in self.schedule else None
        state.lengths.append(self._present(hidden, state))
        if state.mask is not None:
            rest = [state.mask, *rest[1:]]
        return (hidden, *rest), kwargs

    def _present(self, hidden: Tensor, state: TowerPass) -> Tensor:
        if state.real is None:
            return torch.full(hidden.shape[:1], hidden.shape[1], device=hidden.device)
        return state.real.sum(1) + self.tower.size.prefix

    def _begin(self, state: TowerPass, patches: Tensor) -> None:
        """Note where the patches are, unless an earlier place of the tower has."""
        if state.ordinal is None:
            state.ordinal = _grid(patches.shape[0], state.side, self.tower.size.side, patches.device)
            state.real = torch.ones_like(state.ordinal, dtype=torch.bool)

    def _stage(self, index: int, hidden: Tensor, state: TowerPass) -> Tensor:
        """Score, select, merge and pack the patches at one place of the tower."""
        head, patches = hidden[:, : self.tower.size.prefix], hidden[:, self.tower.size.prefix :]
        self._begin(state, patches)
        if self.schedule[index] >= patches.shape[1]:
            return hidden
        kept = self.pruner.prune_vision(self._context(index, patches, state))
        if kept.states is not None:
            patches = torch.where(kept.mask[..., None], kept.states.to(patches.dtype), patches)
        state.stages.append((state.real.sum(1), kept.mask.sum(1)))
        columns, state.real = selection.compact(kept.mask)
        state.ordinal = state.ordinal.gather(1, columns)
        sizes = state.sizes if kept.sizes is None else kept.sizes
        state.sizes = None if sizes is None else sizes.gather(1, columns)
        hidden = torch.cat([head, selection.gather_rows(patches, columns)], 1)
        state.mask = self._mask(hidden, state) if index < self.tower.size.features else None
        return hidden

    def _mask(self, hidden: Tensor, state: TowerPass) -> Tensor | None:
        """Mask of the tower's later layers: hides filler, and adds log(size) where patches stand for several."""
        prefix, full = self.tower.size.prefix, bool(state.real.all())
        if state.sizes is not None:
            if self.tower.module.config._attn_implementation not in ("sdpa", "eager"):
                raise LitPruneError(
                    f"{type(self.pruner).__name__} adds log(size) to attention inside the vision tower, which "
                    f"{self.tower.module.config._attn_implementation} attention can't: load with "
                    f"attn_implementation='sdpa'"
                )
            bias = state.sizes.log().to(hidden).masked_fill(~state.real, torch.finfo(hidden.dtype).min)
            return torch.nn.functional.pad(bias, (prefix, 0))[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        if full:
            return None
        return bidirectional_mask(
            self.tower.module.config, hidden, torch.nn.functional.pad(state.real, (prefix, 0), value=True)
        )

    def _context(self, index: int, patches: Tensor, state: TowerPass) -> VisionContext:
        keys = values = attention = None
        if state.before is not None:
            keys, values, attention = self._read(self.tower.layers[index - 1], state)
        return VisionContext(
            stage=list(self.schedule).index(index),
            states=patches,
            keys=keys,
            values=values,
            attention=attention,
            alive=state.real,
            ordinal=state.ordinal,
            count=torch.full(patches.shape[:1], self.schedule[index], device=patches.device),
            side=self.tower.size.side,
            heads=self.tower.layers[0].self_attn.num_heads,
            sizes=state.sizes,
            memory=state.memory,
        )

    def _read(self, layer: nn.Module, state: TowerPass) -> tuple[Tensor, Tensor | None, Tensor]:
        """Keys and values of the patches in the layer just run, and its attention to them, projected once more.

        Not every family hands keywords down to its attention function, where queries and keys could be read for free.
        """
        own, prefix, normed = layer.self_attn, self.tower.size.prefix, layer.layer_norm1(state.before)
        state.scored += self.tower.size.read(normed.shape[1] - prefix, self.pruner.needs_values)
        state.rated += normed.shape[1]
        keys = own.k_proj(normed)
        values = own.v_proj(normed[:, prefix:]) if self.pruner.needs_values else None
        query = own.q_proj(normed[:, :1] if prefix else normed).mean(1)
        split = keys.unflatten(2, (own.num_heads, -1))
        logits = torch.einsum("bhd,bnhd->bhn", query.unflatten(1, (own.num_heads, -1)), split).float() * own.scale
        if state.sizes is not None:
            logits = logits + torch.nn.functional.pad(state.sizes.log(), (prefix, 0))[:, None]
        valid = torch.nn.functional.pad(state.real, (prefix, 0), value=True)
        attention = logits.masked_fill(~valid[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1)
        return keys[:, prefix:], values, attention[:, prefix:]

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """The last stage, behind the layer that gives the features, and their places back."""
        state: TowerPass | None = kwargs.get(PASS)
        if state is None:
            return None
        features = output.hidden_states[self.tower.size.features]
        if self.tower.size.features in self.schedule:
            features = self._stage(self.tower.size.features, features, state)
        if state.side < self.tower.size.side:
            self._begin(state, features)
        self._note(features, state)
        if state.ordinal is None or features.shape[1] == self.tower.size.prefix + self.tower.size.side**2:
            return None
        states = list(output.hidden_states)
        states[self.tower.size.features] = self._places_back(features, state)
        output.hidden_states = tuple(states)
        return output

    def _note(self, features: Tensor, state: TowerPass) -> None:
        record = self.session().record
        if record is None or record.trace.tower is not None:
            return
        tiles = torch.ones(features.shape[:1], dtype=torch.long, device=features.device)
        # transformers runs the layers behind the features too; they see no fewer tokens than the features have.
        record.trace.tower = TowerTrace(
            patches=tiles * state.side**2,
            tokens=state.lengths,
            projected=self._present(features, state) - self.tower.size.prefix,
            scored=tiles * state.scored,
            rated=tiles * state.rated,
            stages=state.stages,
        )

    def _places_back(self, features: Tensor, state: TowerPass) -> Tensor:
        head, patches = features[:, : self.tower.size.prefix], features[:, self.tower.size.prefix :]
        patches = patches * state.real[..., None].to(patches.dtype)
        return torch.cat([head, selection.put_rows(patches, state.ordinal, self.tower.size.side**2)], 1)

    @staticmethod
    def _enter_projector(module: nn.Module, args: tuple):
        features = args[0]
        there = (features != 0).any(-1)
        if bool(there.all()):
            return None
        columns, real = selection.compact(there)
        packed = selection.gather_rows(features, columns)
        # The hook behind the projector gets this very tensor again: what it needs rides along.
        setattr(packed, PACKED, (columns, real, features.shape[1]))
        return (packed, *args[1:])

    @staticmethod
    def _leave_projector(module: nn.Module, args: tuple, output: Tensor):
        if not hasattr(args[0], PACKED):
            return None
        columns, real, length = getattr(args[0], PACKED)
        return selection.put_rows(output * real[..., None].to(output.dtype), columns, length)


def absent(embeds: Tensor, newline: Tensor | None) -> Tensor:
    """Which embeddings stand for patches that the tower dropped, and, in their samples, line breaks of rows."""
    gone = (embeds == 0).all(-1)
    if newline is None:
        return gone
    return gone | ((embeds == newline.to(embeds)).all(-1) & gone.any(1, keepdim=True))


def _grid(tiles: int, side: int, full: int, device: torch.device) -> Tensor:
    """Place of each patch of a `side` x `side` grid on the grid of `full` x `full`: the nearest."""
    steps = ((torch.arange(side, device=device) + 0.5) * full / side).long()
    return (steps[:, None] * full + steps).flatten().expand(tiles, -1).contiguous()


def _smaller(args: tuple, kwargs: dict, size: int) -> tuple[tuple, dict]:
    """The tower's arguments with images scaled down and position embeddings that follow."""
    pixels = kwargs.pop("pixel_values", None)
    pixels = args[0] if pixels is None else pixels
    pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return (pixels, *args[1:]), {**kwargs, "interpolate_pos_encoding": True}
