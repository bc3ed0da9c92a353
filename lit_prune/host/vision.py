"""Stages inside the vision tower, by hooks: patches that leave are never computed again.

What is scored, dropped and merged are units: the patches that the model makes one visual token of. The rest of the
model expects a feature per patch, so the places of dropped patches come back behind the tower as rows of zeros. That is
all that tells later parts what was dropped, and it survives whatever happens to features on their way (beams, crops,
caching): mergers and projector run on the other rows only, and the decoder drops rows of zeros at its layer 0.
"""

from collections.abc import Callable, Iterator
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.cost.trace import TowerTrace
from lit_prune.errors import LitPruneError
from lit_prune.host.compat import keep_hooks_out_of_checkpoints, parameters
from lit_prune.host.session import Session
from lit_prune.host.towers import tail
from lit_prune.host.towers.cutting import cut, pairs
from lit_prune.host.towers.find import Tower
from lit_prune.host.towers.masks import tower_mask
from lit_prune.host.towers.opening import begin, smaller, stage_counts
from lit_prune.host.towers.reading import Read, attention_of, read_again, read_seen
from lit_prune.host.towers.state import TowerPass
from lit_prune.ops.budget import Budget, Schedule
from lit_prune.pruners.base import PruningMethod, VisionContext


class TowerHost:
    """A pruner's stages inside one vision tower.

    Args:
        tower: where its parts are.
        pruner: the method, whose `tower` acts inside.
        keep: budget of a sample; its tiles share evenly what reaches the decoder. Images of their own size get it each.
        session: gives the session that a forward runs under.

    Raises:
        LitPruneError: the method does what this tower's layers don't allow.
    """

    def __init__(self, tower: Tower, pruner: PruningMethod, keep: Budget, session: Callable[[], Session]) -> None:
        self.tower, self.method, self.pruner, self.keep, self.session = tower, pruner, pruner.tower, keep, session
        size = tower.size
        self.schedule = self._schedule(size.side**2)
        self.side = self.pruner.image_side(pruner.leaving(size.share(keep), size.side**2), size.side)
        # The pass of each thread, as long as its features are on their way to the decoder.
        self.passes: dict[int, TowerPass] = {}
        self.orders: dict[str, bool] = {}  # in which order this tower has its patches, once a pass has shown it
        self._check()

    @property
    def current(self) -> TowerPass | None:
        """The pass of this thread; requests may overlap in several."""
        return self.passes.get(get_ident())

    @current.setter
    def current(self, state: TowerPass | None) -> None:
        if state is None:
            self.passes.pop(get_ident(), None)
        else:
            self.passes[get_ident()] = state

    def _schedule(self, units: int) -> Schedule:
        """{layer: units kept} of a tile of so many."""
        leaving = self.method.leaving(self.tower.size.share(self.keep, units), units)
        return self.pruner.vision_schedule(leaving, units, self.tower.size.features)

    def _check(self) -> None:
        """Raise `LitPruneError` where the method needs what the tower doesn't do."""
        name, module = type(self.pruner).__name__, self.tower.module
        if self.pruner.sized and not self.tower.masked:
            raise LitPruneError(
                f"{name} adds log(size) to attention inside the vision tower, and the layers of "
                f"{type(module).__name__} take no mask that could carry it; use a method that returns no sizes, such "
                f"as VisionZip or DCP-Prune"
            )
        if self.side < self.tower.size.side and "interpolate_pos_encoding" not in parameters(type(module).forward):
            raise LitPruneError(
                f"{name} scales images down for the vision tower, and {type(module).__name__} doesn't interpolate its "
                f"position embeddings; use a method that drops patches inside the tower"
            )

    def hook(self) -> Iterator[RemovableHandle]:
        """Add the hooks, and give their handles."""
        tower = self.tower
        yield tower.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield tower.module.register_forward_hook(self._leave, with_kwargs=True)
        for index, layer in enumerate(tower.layers):
            yield layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            yield layer.register_forward_hook(partial(self._after, index))
            if index + 1 in self.schedule and not tower.clip_like:
                for kind, part in attention_of(layer)[1].items():
                    yield part.register_forward_hook(partial(self._see, kind))
        for module in tower.tail:
            yield module.register_forward_pre_hook(self._enter_tail)
            yield module.register_forward_hook(self._leave_tail)
        yield tower.decoder.register_forward_pre_hook(self._arrive, with_kwargs=True)

    # -- the tower ----------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict):
        self.current = None
        if not self.session().prune:
            return None
        keep_hooks_out_of_checkpoints(self.tower.layers)
        scale = self.side < self.tower.size.side
        self.current = TowerPass(
            inputs=[*args, *kwargs.values()],
            late=(self.tower.picks or self.tower.size.features < self.tower.size.layers)
            and kwargs.get("output_hidden_states") not in (None, False),
            scaled=scale,
        )
        if scale:
            return smaller(args, kwargs, self.side * self.tower.size.merge * self.tower.patch)
        return None

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        state = self.current
        if state is None or state.left:
            return None
        name = next(iter(parameters(type(module).forward).keys() - {"self"}), None) if not args else None
        hidden, rest = (args[0], args[1:]) if args else (kwargs[name], ())
        if state.tapped:
            hidden, state.tapped = state.again(hidden), False
        if index == 0:
            rope = kwargs.get("position_embeddings")
            begin(state, self.tower, hidden, rope, self.orders, self.side)
            state.counts = stage_counts(state, self.schedule, self._plan)
        if index < self.tower.size.features:  # layers behind the features run too, but no stage is theirs
            hidden = self._stage(index, hidden, state) if index in self.schedule else hidden
            state.before = hidden if index + 1 in self.schedule and self.tower.clip_like else None
        state.seen = {}
        state.lengths.append(state.present())
        rest, kwargs = self._cut(module, hidden, rest, dict(kwargs), state)
        if self.session().record is not None:
            state.pairs.append(pairs((*rest, *kwargs.values()), state))
        if not args:
            return (), {**kwargs, name: hidden}
        return (hidden, *rest), kwargs

    def _plan(self, units: int, frames: int) -> Schedule:
        """{layer: units kept} of a tile of so many; the frames of one video share its budget."""
        whole = self.tower.size.share(self.keep, units * frames)
        leaving = self.method.leaving(min(units, -(-whole // frames)), units)
        return self.pruner.vision_schedule(leaving, units, self.tower.size.features)

    def _stage(self, index: int, hidden: Tensor, state: TowerPass) -> Tensor:
        """Score, select, merge and pack the units at one place of the tower."""
        if bool((state.counts[index] >= state.real.sum(1)).all()):
            return hidden
        shape = hidden.shape
        hidden = hidden.view(1, *shape) if hidden.ndim == 2 else hidden
        units = state.units(hidden.reshape(-1, shape[-1])).flatten(2)
        kept = self.pruner.prune_vision(self._context(index, hidden, units, state))
        if kept.states is not None:
            hidden = state.merge(hidden, units, kept)
        state.stages.append((state.real.sum(1), kept.mask.sum(1)))
        hidden = state.pack(hidden, kept)
        return hidden[0] if len(shape) == 2 else hidden

    def _context(self, index: int, hidden: Tensor, units: Tensor, state: TowerPass) -> VisionContext:
        read, layers = Read(), self.tower.layers
        if index > 0 and self.tower.clip_like:
            ahead = self.pruner.reads_next and index < len(layers)
            layer, entered = (layers[index], hidden) if ahead else (layers[index - 1], state.before)
            read = read_again(layer, entered, state, self.tower.size.prefix, self.pruner)
            state.scored += self.tower.size.read(state.rows.shape[1] * state.members, self.pruner.needs_values)
            state.rated += state.before.shape[1]
        elif index > 0:
            read = read_seen(layers[index - 1], state, self.pruner)
            state.rated += state.present()
        return VisionContext(
            stage=list(self.schedule).index(index),
            states=units,
            keys=read.keys,
            values=read.values if self.pruner.needs_values else None,
            attention=read.attention,
            alive=state.real,
            ordinal=state.ordinal,
            count=state.counts[index],
            side=state.side,
            heads=read.heads,
            sizes=state.sizes,
            memory=state.memory,
        )

    def _cut(self, layer: nn.Module, hidden: Tensor, rest: tuple, kwargs: dict, state: TowerPass) -> tuple[tuple, dict]:
        """A layer's arguments at the rows that are left, with a mask of filler and sizes."""
        if state.columns is None or state.scaled:
            return rest, kwargs
        rest = tuple(cut(value, state.columns, state.there, state.extent) for value in rest)
        kwargs = {name: cut(value, state.columns, state.there, state.extent) for name, value in kwargs.items()}
        if state.sizes is None and not state.filled:
            return rest, kwargs
        taken = list(parameters(type(layer).forward))[2:]
        if "attention_mask" not in taken:
            raise LitPruneError(
                f"{type(self.pruner).__name__} keeps different numbers of patches of images of one batch, and the "
                f"layers of {type(self.tower.module).__name__} take no mask for that: give it one image at a time"
            )
        place = taken.index("attention_mask")
        given = rest[place] if place < len(rest) else kwargs.get("attention_mask")
        mask = tower_mask(self.tower.module.config, type(self.pruner).__name__, hidden, state, given)
        if place < len(rest):
            return (*rest[:place], mask, *rest[place + 1 :]), kwargs
        return rest, {**kwargs, "attention_mask": mask}

    def _see(self, kind: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Keep what a projection gives, for the stage behind its layer."""
        if self.current is not None and not self.current.left:
            self.current.seen[kind] = output

    def _after(self, index: int, module: nn.Module, args: tuple, output: Any):
        """Behind the last layer: the last stage, and all rows back."""
        state = self.current
        if state is None or state.left:
            return None
        state.past.append(None if state.columns is None else (state.columns, state.there))
        hidden = output[0] if isinstance(output, tuple) else output
        if index in self.tower.taps and index + 1 < len(self.tower.layers):
            state.merged.append(state.real.sum(1))
            if state.columns is None:
                return None
            state.tapped, whole = True, state.whole(hidden)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole
        if index + 1 < len(self.tower.layers) or state.late:
            return None
        if self.tower.size.features in self.schedule:
            hidden = self._stage(self.tower.size.features, hidden, state)
        self._note(state)
        if state.columns is None:
            return None
        state.left, state.final = True, state.whole(hidden)
        return (state.final, *output[1:]) if isinstance(output, tuple) else state.final

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any):
        """The last stage where features are recorded states of layers, with all rows back in each of them."""
        state, recorded = self.current, getattr(output, "hidden_states", None)
        if state is None or state.rows is None or recorded is None:
            return None
        at, states = self.tower.size.features, list(recorded)
        if state.late:
            if at in self.schedule:
                states[at] = self._stage(at, states[at], state)
            self._note(state)
            if state.columns is None:
                return None
            state.left, state.final = True, state.back(states[at])
        if state.columns is None:
            return None
        if state.late or states[at] is not output.last_hidden_state:
            states[at] = state.final
        for index in range(1, at):
            if isinstance(states[index], Tensor):
                states[index] = state.back(states[index], *(state.past[index - 1] or state.everything()))
        output.hidden_states = tuple(states)
        return output

    def _note(self, state: TowerPass) -> None:
        record = self.session().record
        if record is None or record.trace.tower is not None:
            return
        record.memory = state.memory
        tiles = torch.ones_like(state.present())
        final, taps = state.real.sum(1), self.tower.taps
        rows = sum(state.merged, final * (1 + len(taps) - len(state.merged))).double() / (1 + len(taps))
        # transformers runs the layers behind the features too; they see no fewer tokens than the features have.
        record.trace.tower = TowerTrace(
            patches=state.entered.to(tiles),
            tokens=state.lengths,
            projected=rows if taps else final,
            scored=tiles * state.scored,
            rated=tiles * state.rated,
            stages=state.stages,
            unit=state.members,
            pairs=None if any(layer is None for layer in state.pairs) else state.pairs,
        )

    # -- what follows -------------------------------------------------------------------------------------------

    def _enter_tail(self, module: nn.Module, args: tuple):
        return tail.enter(module, args) if self.current is not None and self.current.marked else None

    def _leave_tail(self, module: nn.Module, args: tuple, output: Tensor):
        return tail.leave(module, args, output) if self.current is not None and self.current.marked else None

    def _arrive(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The features are in the decoder's input: raise `LitPruneError` if none of those dropped is marked there."""
        state, self.current = self.current, None
        embeds = kwargs.get("inputs_embeds")
        if state is not None and state.left and embeds is not None and not bool((embeds == 0).all(-1).any()):
            raise LitPruneError(
                f"what follows the layers of {type(self.tower.module).__name__} mixes patches, so that none of the "
                f"dropped ones leaves the decoder's input; use a method of the decoder"
            )
