"""What happens at the input and the output of every decoder layer of a pruned forward."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import LitPruneError
from lit_prune.host.attention import REQUEST, Request, Tap
from lit_prune.host.compat import cache_of, check_layer_call, check_layer_output
from lit_prune.host.idle import one_column, stretched
from lit_prune.host.plans import Plans
from lit_prune.host.positions import Renumbering
from lit_prune.host.proportional import ProportionalAttention, remember
from lit_prune.host.stages import Stages
from lit_prune.host.state import FORWARD, Forward
from lit_prune.ops import selection
from lit_prune.repair import RepairAdapter


class Layers:
    """Hooks of the decoder's layers; everything that changes is in the `Forward`, which arrives by keyword.

    The hooks are bound methods and partials of them, so that a model can be copied and pickled with its hooks.

    Args:
        stages: pruning layers, none without a method.
        runner: runs one stage.
        plans: is shown what a vision tower let through to layer 0; None where the method has no stages inside one.
        repair: adapter on late layers.
        feeds: {layer: (adapter, stage that feeds it)}.
        renumbering: gives tokens that are left new position ids, if that is asked.
        proportional: proportional attention, if it is on.
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        runner: Stages,
        plans: Plans | None,
        repair: RepairAdapter | None,
        feeds: dict[int, tuple[int, int]],
        renumbering: Renumbering | None,
        proportional: ProportionalAttention | None,
    ) -> None:
        self.stages, self.runner, self.plans = stages, runner, plans
        self.repair, self.feeds, self.renumbering, self.proportional = repair, feeds, renumbering, proportional

    def hook(self, layers: nn.ModuleList) -> Iterator[RemovableHandle]:
        """Add the hooks, and give their handles."""
        for index, layer in enumerate(layers):
            yield layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            yield layer.register_forward_hook(partial(self._after, index), with_kwargs=True)

    # -- the input --------------------------------------------------------------------------------------------------

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        check_layer_call(module, args, kwargs, forward.columns.shape[1], rope=forward.rope is None)
        forward.reached = True
        if forward.session.idle(index):
            forward.trace_layer(None)
            return one_column(args, kwargs)
        hidden, kwargs = self._at_prefix(index, args[0], forward), dict(kwargs)
        if index in self.stages:
            hidden = self._stage(index, module, hidden, forward, kwargs)
        self._pass_on(index, forward, kwargs)
        forward.trace_layer(hidden)
        return (hidden, *args[1:]), kwargs

    @staticmethod
    def _at_prefix(index: int, hidden: Tensor, forward: Forward) -> Tensor:
        """States that another forward left at this layer's input, or these, left for it."""
        prefix = forward.session.prefix
        if prefix is None or index != prefix.layer:
            return hidden
        if prefix.states is None:
            prefix.states = hidden
        return prefix.states

    def _stage(self, index: int, module: nn.Module, hidden: Tensor, forward: Forward, kwargs: dict) -> Tensor:
        """Drop tokens, where this forward carries images, and note what later forwards have to know."""
        if self.renumbering is not None:
            self.renumbering.enter(forward, kwargs)
        if forward.counts:
            hidden = self.runner.run(index, module, hidden, forward, kwargs)
            if self.plans is not None and index == 0 and forward.sizes is not None:
                self.plans.check_arrived(forward.counts, forward.alive, forward.sizes)
        if self.renumbering is not None:
            self.renumbering.leave(index, hidden, forward)
        if forward.cache_state is not None:
            self._remember(index, hidden, forward, kwargs)
        return hidden

    def _remember(self, index: int, hidden: Tensor, forward: Forward, kwargs: dict) -> None:
        """Grow the cache's record of real columns from this stage on, and build the mask of its layers."""
        state, cache = forward.cache_state, cache_of(kwargs)
        past = state.valid.get(index)
        remember(index, forward, 0 if past is None else past.shape[1])
        state.valid[index] = forward.valid if past is None else torch.cat([past, forward.valid], dim=1)
        padded = forward.padded
        if past is not None:
            # A decoding step feeds one real token per sample; of more at once only the device knows.
            padded = state.padded[index] if forward.length == 1 else (state.padded[index] or None)
        state.padded[index] = padded
        if forward.counts:
            state.soft = forward.session.soft
            state.essence.update(forward.essence)
            state.pictured = forward.pictured
        if forward.restaged or past is not None:
            # The decoder's own mask fits the columns of layer 0, so these layers take theirs, also where it is None.
            forward.restaged = True
            forward.mask = self.runner.mask(hidden, state.valid[index], cache, index, padded)

    def _pass_on(self, index: int, forward: Forward, kwargs: dict) -> None:
        """Give a layer the mask, rotary embeddings, bias and tap of this forward."""
        if forward.restaged:
            # Positions are in the rotary embeddings; ids with gaps would be read as packed sequences.
            kwargs.update(attention_mask=forward.mask, position_ids=None)
        elif forward.mask is not None:
            kwargs["attention_mask"] = forward.mask
        if forward.rope is not None:
            kwargs["position_embeddings"] = forward.rope
        forward.tap = None
        if forward.counts and index + 1 in self.stages and self.reads_previous(self.stages.index(index + 1)):
            rows, mask = self.runner.rows(forward, self.stages.index(index + 1))
            cache = cache_of(kwargs)
            forward.tap = Tap(rows, mask, forward.valid, 0 if cache is None else int(cache.get_seq_length(index)))
        if index in forward.session.watch and forward.record is not None and forward.grid:
            forward.tap = Tap(*selection.compact(forward.text, forward.most_text), forward.valid)
        if forward.key_bias is not None and self.runner.config._attn_implementation == "eager":
            raise LitPruneError("eager attention takes no bias per key; load the model with attn_implementation='sdpa'")
        if forward.tap is not None or forward.key_bias is not None or forward.past_bias is not None:
            kwargs[REQUEST] = Request(forward.key_bias, forward.tap, forward.past_bias)

    def reads_previous(self, stage: int) -> bool:
        """Whether a stage reads the attention of the layer before its own."""
        asked = self.runner.reads(stage)
        return asked is not None and asked.layer == "previous"

    # -- the output -------------------------------------------------------------------------------------------------

    def _after(self, index: int, module: nn.Module, args: tuple, kwargs: dict, output):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        check_layer_output(module, output)
        if forward.session.idle(index):
            return stretched(output, forward.columns.shape[1])
        repaired = self._repair(index, output, forward)
        record = forward.record
        if record is not None and record.keeps(index):
            record.hidden[index] = forward.at_answers(repaired)
        if record is not None and index in forward.session.watch and forward.tap is not None:
            columns, real = selection.compact(forward.visual, forward.most_visual)
            record.attention[index] = forward.on_grid(forward.tap.scores.gather(1, columns), columns, real, 0.0)
        return None if repaired is output else repaired

    def _repair(self, index: int, output: Tensor, forward: Forward) -> Tensor:
        if index not in self.feeds or not forward.session.repair:
            return output
        adapter, stage = self.feeds[index]
        essence = forward.essence.get(stage)
        if essence is None:
            return output
        answer_mask = forward.answer_mask & forward.pictured[:, None]
        if forward.record is not None and forward.counts:
            trace = forward.record.trace
            trace.repaired = answer_mask.sum(1)
            trace.repair_stages = tuple(sorted({stage for _, stage in self.feeds.values()}))
        return self.repair(output, essence, answer_mask, adapter, forward.most_answers)
