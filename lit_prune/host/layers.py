"""Hooks at the input and the output of every decoder layer of a pruned forward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import LitPruneError
from lit_prune.host.attention import REQUEST, Request, Tap, wrapped
from lit_prune.host.checks import check_layer_call, check_layer_output
from lit_prune.host.compat import cache_of, parameters
from lit_prune.host.devices import Devices, moved
from lit_prune.host.idle import one_column, stretched
from lit_prune.host.masks import Masks, Span
from lit_prune.host.packing import Folded
from lit_prune.host.plans import Plans
from lit_prune.host.positions import Renumbering
from lit_prune.host.proportional import ProportionalAttention, remember
from lit_prune.host.reading import Handed
from lit_prune.host.session import Entering
from lit_prune.host.slicing import Slices
from lit_prune.host.stages import Stages
from lit_prune.host.state import FORWARD, Forward
from lit_prune.host.streams import gained, mean_stream
from lit_prune.ops import selection
from lit_prune.repair import RepairAdapter

PADDING = "conv_mask"  # keyword under which layers take which columns are real, beside an attention mask


class Layers:
    """Hooks of the decoder's layers; everything that changes is in the `Forward`, which arrives by keyword.

    The hooks are bound methods and partials of them, so that a model can be copied and pickled with its hooks.

    Args:
        stages: pruning layers, none without a method.
        runner: runs one stage.
        masks: the masks of layers that follow a stage.
        rotary: the decoder's rotary embeddings.
        plans: is shown what a vision tower let through to layer 0; None where the method has no stages inside one.
        repair: adapter on late layers.
        feeds: {layer: (adapter, stage that feeds it)}.
        renumbering: gives tokens that are left new position ids, if that is asked.
        proportional: proportional attention, if it is on.
        devices: the device of each layer, where they are on several.
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        runner: Stages,
        masks: Masks,
        rotary: nn.Module | None,
        plans: Plans | None,
        repair: RepairAdapter | None,
        feeds: dict[int, tuple[int, int]],
        renumbering: Renumbering | None,
        proportional: ProportionalAttention | None,
        devices: Devices | None = None,
    ) -> None:
        self.devices = devices
        self.stages, self.runner, self.masks, self.plans = stages, runner, masks, plans
        self.repair, self.feeds, self.renumbering, self.proportional = repair, feeds, renumbering, proportional
        self.tapped = {self.attention(layer - 1, -1): i for i, layer in enumerate(stages) if self.reads_previous(i)}
        # Flash attention would read ids with gaps as packed sequences; positions are in the rotary embeddings.
        self.reads_positions = "flash" not in masks.config._attn_implementation
        self.modules: list[nn.Module] = []
        self.rotary, self.width = rotary, masks.config.hidden_size

    def attention(self, index: int, step: int) -> int:
        """The nearest layer with attention, from one on, upwards or downwards; that one itself if there is none."""
        kinds, place = self.masks.kinds, index
        while 0 <= place < len(kinds) and not kinds[place].attends:
            place += step
        return place if 0 <= place < len(kinds) else index

    def hook(self, layers: nn.ModuleList) -> Iterator[RemovableHandle]:
        """Add the hooks, and give their handles."""
        self.modules = list(layers)
        for index, layer in enumerate(layers):
            yield layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            yield layer.register_forward_hook(partial(self._after, index), with_kwargs=True)

    # -- the input --------------------------------------------------------------------------------------------------

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        """Step 3, in each layer: drop tokens where a stage begins, and cut the layer's arguments to what is left."""
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        if self.devices is not None:
            args, kwargs = self._arrive(index, args, kwargs, forward)
        if forward.settled and index > 0:
            return self._step(index, module, args, kwargs, forward)
        rope = forward.keys.rope is None and bool(forward.counts or forward.cache_state)
        check_layer_call(module, args, kwargs, forward.packed.columns.shape[1], self._lengths(forward), rope)
        forward.reached = True
        if forward.awaits is not None:
            forward.take_embeds(mean_stream(args[0], self.width))
        if forward.session.idle(index):
            forward.trace_layer(None)
            return one_column(args, kwargs, forward.length)
        hidden = args[0] if forward.deepstack is None else forward.deepstack.add(index, args[0], forward.packed.columns)
        hidden = self._derived(index, self._at_prefix(index, hidden, forward), forward)
        if index in self.stages:
            hidden = self._stage(index, module, hidden, forward, args[1:], kwargs)
        rest, kwargs = self._cut(index, hidden, forward, args[1:], kwargs)
        if forward.keys.packs and (index in self.stages or forward.keys.layout is None):
            forward.lay_out(one_row=not self.reads_positions)
        self._ask(index, forward, kwargs)
        rows = forward.learning_rows()
        forward.trace_layer(hidden)
        if rows is not None:
            rows.check(self.masks.config._attn_implementation, forward.keys.packs, module)
            args, kwargs, forward.keys.beside = rows.split(module, (hidden, *rest), kwargs)
            return args, kwargs
        if (layout := forward.keys.layout) is not None:
            kwargs = layout.arguments(kwargs, hidden, flash=not self.reads_positions)
            return (layout.fold(hidden), *(Folded(layout).of(value) for value in rest)), kwargs
        return (hidden, *rest), kwargs

    def _arrive(self, index: int, args: tuple, kwargs: dict, forward: Forward) -> tuple[tuple, dict[str, Any]]:
        """A layer's arguments, and all that hooks share, on its device: accelerate moves them after this."""
        device = self.devices[index]
        forward.follow(device)
        take = forward.transfers.of
        rest = (value.to(device) if isinstance(value, Tensor) else take(value) for value in args)
        return tuple(rest), {name: value if name == FORWARD else take(value) for name, value in kwargs.items()}

    def _step(self, index: int, module: nn.Module, args: tuple, kwargs: dict, forward: Forward):
        """Step 3 in decoding, kept short: once tokens have left, a layer's cached keys differ from the decoder's."""
        hidden, keys = args[0], forward.keys
        if index in self.stages:
            hidden, keys.handed = self._stage(index, module, hidden, forward, args[1:], kwargs), {}
        if keys.span is None and keys.rope is None:
            return None
        if keys.past_bias is not None or forward.packed.key_bias is not None:
            rest, kwargs = self._cut(index, hidden, forward, args[1:], kwargs)
            self._ask(index, forward, kwargs)
            return (hidden, *rest), kwargs
        # Layers of a kind are handed the same objects, one after another, so that they get the same.
        values = (*args[1:], *kwargs.values())
        key = (self.masks.groups[index], *map(id, values))
        if key not in keys.handed:
            keys.handed[key] = (values, *self._cut(index, hidden, forward, args[1:], kwargs))
        _, rest, kwargs = keys.handed[key]
        return (hidden, *rest), dict(kwargs)

    @staticmethod
    def _lengths(forward: Forward) -> tuple[int, ...]:
        """Columns that a decoder may give rotary embeddings for: this forward's, or those of all keys."""
        state = forward.cache_state
        return (forward.length,) if state is None else (forward.length, state.seen)

    @staticmethod
    def _at_prefix(index: int, hidden: Tensor, forward: Forward) -> Tensor:
        """States that another forward left at this layer's input, or these, left for it."""
        prefix = forward.session.prefix
        if prefix is None or index != prefix.layer:
            return hidden
        if prefix.states is None:
            prefix.states = hidden
        return prefix.states

    @staticmethod
    def _derived(index: int, hidden: Tensor, forward: Forward) -> Tensor:
        """The states at a layer's input, recorded where gradients are to be taken by them."""
        record = forward.record
        if record is None or index not in forward.session.derive:
            return hidden
        if not hidden.requires_grad:
            leaf = hidden.detach().requires_grad_()
            hidden = leaf.view_as(leaf)  # no leaf: PyTorch's module tracker, as in its FLOP counter, takes none
        record.entering[index] = Entering(hidden, *selection.compact(forward.packed.visual, forward.most_visual))
        return hidden

    def _stage(
        self, index: int, module: nn.Module, hidden: Tensor, forward: Forward, rest: tuple, kwargs: dict
    ) -> Tensor:
        """Drop tokens, where this forward carries images, and note what later forwards have to know."""
        if self.renumbering is not None:
            self.renumbering.enter(forward, kwargs)
        if forward.counts:
            reader = self.modules[self.attention(index, 1)]
            handed = Handed(reader, partial(self._arguments, index, hidden, forward, rest, kwargs))
            hidden = self.runner.run(index, module, hidden, forward, handed)
            if self.plans is not None and index == 0 and forward.sizes is not None:
                self.plans.check_arrived(forward.counts, forward.alive, forward.sizes)
        if self.renumbering is not None:
            self.renumbering.leave(index, hidden, forward)
        if forward.cache_state is not None:
            self._remember(index, forward)
        return hidden

    def _arguments(self, index: int, hidden: Tensor, forward: Forward, rest: tuple, kwargs: dict) -> dict[str, Any]:
        """Arguments, by name, of the layer that a stage reads, beside its states and over this forward's columns alone.

        A recurrence has no attention to read: the next layer's that has stands for it, at the stage's own states.
        """
        reader = self.attention(index, 1)
        mask = kwargs.get("attention_mask")
        if reader != index and not (self.masks.own and isinstance(mask, Tensor) and mask.ndim == 2):
            mask = None  # made for another kind of layer
        if forward.cache_state is not None and forward.cache_state.seen > forward.length:
            mask = None  # of cached columns too
        if reader != index and kwargs.get("position_embeddings") is None and self.rotary is not None:
            kwargs = {**kwargs, "position_embeddings": self._rope(reader, hidden, kwargs)}
        rest, kwargs = self._sliced(forward, rest, kwargs)
        names = list(parameters(type(self.modules[reader]).forward))[2 : 2 + len(rest)]
        own = {name: value for name, value in kwargs.items() if name not in (FORWARD, REQUEST)}
        own["attention_mask"] = None  # causal over the real columns: rows are read so anyway
        if not self.masks.kinds[reader].plain:
            count, whole = forward.packed.columns.shape[1], forward.keys.slices is None and mask is not None
            span = Span(forward.packed.valid, forward.packed.columns, count, forward.keys.start, None, whole)
            own["attention_mask"] = self.masks.of(reader, hidden, span, mask, None)
        return {**dict(zip(names, rest, strict=True)), **own}

    def _rope(self, reader: int, hidden: Tensor, kwargs: dict) -> Any:
        """The rotary embeddings that a decoder would give a layer, where it gives them to that layer's kind alone."""
        kinds = {"layer_type": self.masks.config.layer_types[reader]}
        given = {name: value for name, value in kinds.items() if name in parameters(type(self.rotary).forward)}
        return moved(self.rotary(hidden, kwargs["position_ids"], **given), hidden.device)

    def _remember(self, index: int, forward: Forward) -> None:
        """Grow the cache's record of its columns from this stage on: the keys of the layers that follow."""
        state = forward.cache_state
        # Which columns this stage's layers have cached: the first time those of this forward, then these behind them.
        past = state.valid.get(index)
        remember(index, forward, 0 if past is None else past.shape[1])
        columns = forward.packed.columns + (state.seen - forward.length)
        if past is None:
            state.valid[index], state.columns[index], state.first[index] = (
                forward.packed.valid,
                columns,
                columns.shape[1],
            )
        else:
            state.valid[index] = torch.cat([past, forward.packed.valid], dim=1)
            state.columns[index] = torch.cat([state.columns[index], columns], dim=1)
            forward.keys.key_slices = Slices(state.columns[index], state.seen)
        # Filler among them decides whether attention needs a mask at all.
        padded = forward.padded
        if past is not None:
            # A decoding step feeds one real token per sample; of more at once only the device knows.
            padded = state.padded[index] if forward.length == 1 else (state.padded[index] or None)
        state.padded[index] = padded
        # What decoding steps need of this prefill.
        if forward.counts:
            state.soft = forward.session.soft
            state.essence.update(forward.essence)
            state.pictured = forward.pictured
        if state.start is None:
            state.start = forward.keys.start
        if forward.keys.slices is not None or past is not None:
            # The decoder's own mask fits the columns of layer 0, so these layers take theirs, also where it is None.
            whole = past is None and forward.keys.slices is None
            keys = (state.valid[index], state.columns[index], state.first[index])
            forward.keys.enter(Span(*keys, state.start, padded, whole))

    def _cut(
        self, index: int, hidden: Tensor, forward: Forward, rest: tuple, kwargs: dict
    ) -> tuple[tuple, dict[str, Any]]:
        """A layer's arguments at the columns that are left, with the mask of their keys."""
        rest, kwargs = self._sliced(forward, rest, kwargs)
        if forward.keys.span is not None:
            kwargs["attention_mask"] = self._mask(index, hidden, forward, kwargs)
            if not self.reads_positions:
                kwargs["position_ids"] = None
            if PADDING in kwargs and forward.length > 1 and forward.keys.span.padded is not False:
                kwargs[PADDING] = forward.packed.valid.long()
        return rest, kwargs

    @staticmethod
    def _sliced(forward: Forward, rest: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]]:
        """A value with a row per token, at the columns that are left."""
        kwargs, untouched = dict(kwargs), (FORWARD, "attention_mask")
        if forward.keys.slices is not None:
            rest = tuple([forward.keys.slices.of(value) for value in rest])
            kwargs = forward.keys.slices.named(kwargs, untouched)
        if forward.keys.key_slices is not None:
            kwargs = forward.keys.key_slices.named(kwargs, untouched)
        if forward.keys.rope is not None:
            kwargs["position_embeddings"] = forward.keys.rope
        return rest, kwargs

    def _mask(self, index: int, hidden: Tensor, forward: Forward, kwargs: dict) -> Any:
        """The mask of a layer, built once for all layers of its kind between two stages."""
        group = self.masks.groups[index]
        if group not in forward.keys.masks:
            by_bias = forward.cache_state is None and forward.packed.key_bias is not None
            forward.keys.masks[group] = self.masks.of(
                index, hidden, forward.keys.span, kwargs.get("attention_mask"), cache_of(kwargs), by_bias
            )
        return forward.keys.masks[group]

    def _ask(self, index: int, forward: Forward, kwargs: dict) -> None:
        """Ask a layer's attention for what a stage or a caller wants to read, and hand it a bias."""
        forward.keys.watched, tap = None, None
        limited = not self.masks.kinds[index].plain
        if forward.counts and (stage := self.tapped.get(index)) is not None:
            rows, mask = self.runner.rows(forward, stage)
            cache = cache_of(kwargs)
            past = 0 if cache is None else int(cache.get_seq_length(index))
            tap = forward.keys.taps[stage] = Tap(rows, mask, forward.packed.valid, past, limited)
        if index in forward.session.watch and forward.record is not None and forward.grid:
            forward.keys.watched = Tap(
                *selection.compact(forward.packed.text, forward.most_text), forward.packed.valid, limited=limited
            )
        if forward.packed.key_bias is not None and not wrapped(name := self.masks.config._attn_implementation):
            raise LitPruneError(f"{name} attention takes no bias per key; load with attn_implementation='sdpa'")
        asked = (forward.packed.key_bias, tap, forward.keys.past_bias, forward.keys.watched)
        if any(part is not None for part in asked):
            kwargs[REQUEST] = Request(*asked, layout=forward.keys.layout)

    def reads_previous(self, stage: int) -> bool:
        """True if a stage reads the attention of the layer before its own."""
        asked = self.runner.reads(stage)
        return asked is not None and asked.layer == "previous"

    # -- the output -------------------------------------------------------------------------------------------------

    def _after(self, index: int, module: nn.Module, args: tuple, kwargs: dict, output):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None or (forward.settled and index not in self.feeds):
            return None
        check_layer_output(module, output)
        if self.devices is not None:
            forward.follow((output[0] if isinstance(output, tuple) else output).device)
        if isinstance(output, tuple):
            states = self._leave(index, module, output[0], forward)
            return None if states is output[0] else (states, *output[1:])
        states = self._leave(index, module, output, forward)
        return None if states is output else states

    def _leave(self, index: int, module: nn.Module, output: Tensor, forward: Forward) -> Tensor:
        """A layer's states, repaired, and what a caller wants to know of them."""
        if forward.keys.beside is not None:
            output, forward.keys.beside = forward.keys.beside.join(module, output), None
        if forward.keys.layout is not None and not forward.session.idle(index):
            output = forward.keys.layout.unfold(output)
        if forward.session.idle(index):
            return stretched(output, forward.packed.columns.shape[1])
        before = mean_stream(output, self.width)
        after = self._repair(index, before, forward)
        repaired = output if after is before else gained(output, before, after)
        record = forward.record
        if record is not None and record.keeps(index):
            record.hidden[index] = forward.at_answers(after)
        if record is not None and index in forward.session.watch and forward.keys.watched is not None:
            columns, real = selection.compact(forward.packed.visual, forward.most_visual)
            record.attention[index] = forward.on_grid(
                forward.keys.watched.scores.gather(1, columns), columns, real, 0.0
            )
        return repaired

    def _repair(self, index: int, output: Tensor, forward: Forward) -> Tensor:
        if index not in self.feeds or not forward.session.repair:
            return output
        adapter, stage = self.feeds[index]
        essence = forward.essence.get(stage)
        if essence is None:
            return output
        answer_mask = forward.packed.answer_mask & forward.pictured[:, None]
        if forward.record is not None and forward.counts:
            trace = forward.record.trace
            trace.repaired = answer_mask.sum(1)
            trace.repair_stages = tuple(sorted({stage for _, stage in self.feeds.values()}))
        return self.repair(output, essence, answer_mask, adapter, forward.most_answers)
