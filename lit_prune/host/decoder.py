"""Stages and repair on the decoder layers of an unmodified transformers model, by hooks.

A pre-hook on every layer shortens the hidden states where a stage says so and hands later layers the mask and the
rotary embeddings that fit; a hook behind the layers repairs answer positions; the last hook scatters the states back to
the original length, so that labels, losses and `generate()` need no change.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_prune import selection
from lit_prune.budget import Budget
from lit_prune.errors import LitPruneError
from lit_prune.host import places
from lit_prune.host.attention import REQUEST, Request, Tap, wrap_attention
from lit_prune.host.cache import CACHE, CacheState, chosen_cache, only_new, real_columns, refuse_chunks
from lit_prune.host.compat import cache_of
from lit_prune.host.idle import one_column, stretched
from lit_prune.host.inputs import begin
from lit_prune.host.mass import MassGivenBack
from lit_prune.host.options import HostOptions
from lit_prune.host.plans import Plans
from lit_prune.host.positions import Renumbering
from lit_prune.host.session import Session
from lit_prune.host.sizes import vision_trace
from lit_prune.host.stages import Stages
from lit_prune.host.state import FORWARD, Forward
from lit_prune.host.vision import TowerHost
from lit_prune.pruners.base import Pruner
from lit_prune.repair import RepairAdapter


class DecoderHost:
    """A pruner and a repair adapter attached to one model; `detach()` leaves no trace.

    Args:
        model: a `*ForConditionalGeneration`, never modified beyond its hooks.
        pruner: the method; `None` hosts nothing but records (the teacher's side).
        repair: adapter on late layers, fed by the pruner's stages.
        keep: budget of each sample (one prompt, whatever its number of images or crops): visual tokens averaged over
            the decoder layers' inputs, or a schedule {layer: count}. Samples with fewer keep all.
        options: settings that every method has alike.

    Raises:
        LitPruneError: stages where this model can't drop tokens, a budget that can't be met, another host on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner | None,
        repair: RepairAdapter | None,
        keep: Budget,
        options: HostOptions = HostOptions(),  # noqa: B008 (frozen)
    ) -> None:
        self.places = places.find(model)
        if any(part._compiled_call_impl for part in (model, self.places.decoder, *self.places.layers)):
            raise LitPruneError(
                "this model was compiled by its own compile(), which ignores hooks that come later, silently: load it "
                "again and compile with VLM.compile() instead"
            )
        hooks = self.places.decoder._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), DecoderHost) for hook in hooks):
            raise LitPruneError("something is attached to this model already: detach it first, one model has one host")
        dims = self.places.dims
        self.pruner, self.repair, self.keep = pruner, repair, keep
        self.session = Session()
        self.tower: TowerHost | None = None
        self.plans: Plans | None = None
        self.stages = pruner.stages(dims.depth) if pruner is not None else ()
        self.renumbering = Renumbering(self.places.decoder) if options.positions == "renumbered" else None
        self.mass = MassGivenBack(options.mass) if options.mass != "none" else None
        self.feeds = repair.feeds(self.stages, dims.depth) if repair is not None and pruner is not None else {}
        if pruner is not None:
            places.check_stages(model.config, self.stages)
            self.schedule = pruner.nominal_schedule(keep, dims)
            previous = [stage for stage in range(len(self.stages)) if self._reads_previous(stage)]
            if previous and self.stages[previous[0]] == 0:
                raise LitPruneError("pruning layer 0 can't read the attention of the layer before it; start at 1")
            if previous and model.config._attn_implementation == "eager":
                raise LitPruneError("eager attention can't be read; load the model with attn_implementation='sdpa'")
            if self.mass is not None and model.config._attn_implementation == "eager":
                raise LitPruneError("mass: eager attention takes no bias per key; load the model with sdpa attention")
            self._attach_tower(model)
            tower = self.tower and self.tower.tower
            self.plans = Plans(pruner, keep, dims.depth)
            self.runner = Stages(pruner, repair, self.stages, self.places.decoder.config, tower, self.mass)
        wrap_attention()
        self.handles = self._hook(model)

    def _attach_tower(self, model: nn.Module) -> None:
        if not self.pruner.acts_in_tower:
            return
        if self.stages[0] != 0:
            raise LitPruneError("a pruner with stages in the vision tower needs its first decoder stage at layer 0")
        self.tower = TowerHost(places.tower(model), self.pruner, self.keep, lambda: self.session)

    def _hook(self, model: nn.Module) -> list:
        handles = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            self.places.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            self.places.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
        ]
        for index, layer in enumerate(self.places.layers):
            handles.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(index), with_kwargs=True))
        return handles

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.tower is not None:
            self.tower.detach()

    @contextmanager
    def using(self, session: Session) -> Iterator[Session]:
        """Run the forwards inside under another session (teacher, soft masks, recording, hints)."""
        before, self.session = self.session, session
        try:
            yield session
        finally:
            self.session = before

    # -- the model and its decoder ------------------------------------------------------------------------------

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict):
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        cache = cache_of(kwargs)
        if hasattr(cache, CACHE):
            getattr(cache, CACHE).follow(cache)
        real = real_columns(kwargs, cache)
        if hasattr(cache, CACHE):
            kwargs = only_new(kwargs, getattr(cache, CACHE), real)
        session = self.session if self.pruner is not None else Session(False, False, record=self.session.record)
        if session.prune and kwargs.get("inputs_embeds") is not None:
            raise LitPruneError("inputs_embeds don't tell which tokens are visual: give input_ids, or detach")
        forward = begin(kwargs, self.places, session, self.plans, real)
        if forward is not None and forward.counts and cache is not None and not hasattr(cache, CACHE):
            setattr(cache, CACHE, CacheState.of(cache, real, forward.valid, self.stages))
        if forward is not None and forward.record is not None:
            forward.record.trace.vision = vision_trace(module.config, kwargs, forward.total)
        if forward is not None and session.answers_only:
            labels = kwargs.pop("labels", None)
            if forward.record is not None and labels is not None:
                forward.record.targets = forward.at_gate(labels.roll(-1, 1))
        return args, kwargs if forward is None else {**kwargs, FORWARD: forward}

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        kwargs = dict(kwargs)
        cache = chosen_cache(module, forward.session, kwargs)
        if cache is not None and (forward.counts or hasattr(cache, CACHE)):
            if not hasattr(cache, CACHE):
                setattr(cache, CACHE, CacheState())
            self._continue(forward, getattr(cache, CACHE), kwargs)
            if forward.counts:
                refuse_chunks()
        if self.pruner is not None and self.pruner.needs_embeds and forward.counts:
            forward.embeds = kwargs["inputs_embeds"]
        if forward.record is not None and forward.record.keep_embeds:
            columns, _ = selection.compact(forward.visual, forward.most_visual)
            forward.record.embeds = selection.gather_rows(kwargs["inputs_embeds"], columns)
        return args, kwargs

    def _continue(self, forward: Forward, state: CacheState, kwargs: dict) -> None:
        """Positions and mask of the first layer when a cache that was pruned at layer 0 is continued."""
        if state.seen and state.soft:
            raise LitPruneError(
                "this cache was filled under soft masks, which hide tokens in one forward only: those that follow "
                "would see them again; generate outside of Session(soft=True)"
            )
        forward.cache_state = state
        if not forward.counts:
            forward.essence, forward.pictured = state.essence, state.pictured
        if state.seen and 0 in state.valid:
            if kwargs.get("position_ids") is None:
                new = torch.arange(forward.length, device=forward.valid.device) + state.seen
                kwargs["position_ids"] = new[None]
            kwargs["attention_mask"] = torch.cat([state.valid[0], forward.valid], dim=1)
        state.seen += forward.length
        positions = kwargs.get("position_ids")
        if 0 in self.stages and positions is not None and positions.ndim == 3:
            state.lag = positions[-1, 0, -1] + 1 - state.seen

    def _leave_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is not None and forward.session.answers_only:
            output.last_hidden_state = forward.at_gate(output.last_hidden_state)[None]
            return output
        if forward is None or forward.columns.shape[1] == forward.length:
            return None
        states = output.last_hidden_state * forward.valid[..., None].to(output.last_hidden_state.dtype)
        output.last_hidden_state = selection.put_rows(states, forward.columns, forward.length)
        return output

    # -- layers -------------------------------------------------------------------------------------------------

    def _before(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            forward: Forward | None = kwargs.get(FORWARD)
            if forward is None:
                return None
            if forward.session.idle(index):
                forward.trace_layer(None)
                return one_column(args, kwargs)
            hidden, kwargs = self._at_prefix(index, args[0], forward), dict(kwargs)
            if index in self.stages:
                hidden = self._stage(index, module, hidden, forward, kwargs)
            self._pass_on(index, forward, kwargs)
            forward.trace_layer(hidden)
            return (hidden, *args[1:]), kwargs

        return hook

    @property
    def shared(self) -> int:
        """Decoder layers that the plug-in leaves alone: below layer `shared` a forward with it equals one without."""
        if not self.stages:
            return 0
        return self.stages[0] - self._reads_previous(0)

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
            if self.tower is not None and index == 0 and forward.sizes is not None:
                self.plans.check_arrived(forward.counts, forward.alive, forward.sizes)
        if self.renumbering is not None:
            self.renumbering.leave(index, hidden, forward)
        if forward.cache_state is not None:
            self._remember(index, hidden, forward, kwargs)
        return hidden

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
        if forward.counts and index + 1 in self.stages and self._reads_previous(self.stages.index(index + 1)):
            rows, mask = self.runner.rows(forward, self.stages.index(index + 1))
            cache = cache_of(kwargs)
            forward.tap = Tap(rows, mask, forward.valid, 0 if cache is None else int(cache.get_seq_length(index)))
        if index in forward.session.watch and forward.record is not None and forward.grid:
            forward.tap = Tap(*selection.compact(forward.text, forward.most_text), forward.valid)
        if forward.key_bias is not None and self.places.decoder.config._attn_implementation == "eager":
            raise LitPruneError("eager attention takes no bias per key; load the model with attn_implementation='sdpa'")
        if forward.tap is not None or forward.key_bias is not None or forward.past_bias is not None:
            kwargs[REQUEST] = Request(forward.key_bias, forward.tap, forward.past_bias)

    def _reads_previous(self, stage: int) -> bool:
        asked = self.pruner.reads(stage)
        return asked is not None and asked.layer == "previous"

    def _after(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            forward: Forward | None = kwargs.get(FORWARD)
            if forward is None:
                return None
            if forward.session.idle(index):
                return stretched(output, forward.columns.shape[1])
            repaired = self._repair(index, output, forward)
            record = forward.record
            if record is not None and record.keeps(index):
                record.hidden[index] = forward.at_gate(repaired)
            if record is not None and index in forward.session.watch and forward.tap is not None:
                columns, real = selection.compact(forward.visual, forward.most_visual)
                record.attention[index] = forward.on_grid(forward.tap.scores.gather(1, columns), columns, real, 0.0)
            return None if repaired is output else repaired

        return hook

    def _repair(self, index: int, output: Tensor, forward: Forward) -> Tensor:
        if index not in self.feeds or not forward.session.repair:
            return output
        adapter, stage = self.feeds[index]
        essence = forward.essence.get(stage)
        if essence is None:
            return output
        gate = forward.gate & forward.pictured[:, None]
        if forward.record is not None and forward.counts:
            trace = forward.record.trace
            trace.repaired = gate.sum(1)
            trace.repair_stages = tuple(sorted({stage for _, stage in self.feeds.values()}))
        return self.repair(output, essence, gate, adapter, forward.most_gate)

    def _remember(self, index: int, hidden: Tensor, forward: Forward, kwargs: dict) -> None:
        """Grow the cache's record of real columns from this stage on, and build the mask of its layers."""
        state, cache = forward.cache_state, cache_of(kwargs)
        past = state.valid.get(index)
        if self.mass is not None:
            self.mass.remember(index, forward, 0 if past is None else past.shape[1])
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
