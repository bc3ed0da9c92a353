"""Stages and repair on the decoder of an unmodified transformers model, by hooks.

A pre-hook on every layer shortens the hidden states where a stage says so and hands later layers the mask and the
rotary embeddings that fit; a hook behind the layers repairs answer positions; the last hook scatters the states back to
the original length, so that labels, losses and `generate()` need no change.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_prune.cost.sizes import vision_trace
from lit_prune.errors import LitPruneError
from lit_prune.host import checks, compat, parts
from lit_prune.host.attention import wrap_attention, wrapped
from lit_prune.host.cache import CACHE, CacheState, chosen_cache, only_new, real_columns, refuse_chunks, refuse_paged
from lit_prune.host.compat import cache_of
from lit_prune.host.counting import Counter, counted, shared, unknown
from lit_prune.host.deepstack import Deepstack
from lit_prune.host.devices import check_devices, check_tower, devices_of, move, reachable
from lit_prune.host.inputs import begin, passed_modalities
from lit_prune.host.kinds import keys_chosen
from lit_prune.host.layers import Layers
from lit_prune.host.lora import LoRA
from lit_prune.host.masks import Masks
from lit_prune.host.options import HostOptions
from lit_prune.host.packing import check_packable
from lit_prune.host.pictures import keep_sizes
from lit_prune.host.plans import Plans
from lit_prune.host.positions import Renumbering
from lit_prune.host.proportional import ProportionalAttention
from lit_prune.host.session import Awaited, Session
from lit_prune.host.stages import Stages
from lit_prune.host.state import FORWARD, Forward
from lit_prune.host.towers.find import tower
from lit_prune.host.vision import TowerHost
from lit_prune.ops import selection
from lit_prune.ops.budget import Budget
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter

# Methods of `generate()` that no hook sees, which a host stands for on its model while it is attached.
REPLACED = ("_prefill", "_maybe_prepare_encoder_kwargs_for_generation")


class DecoderHost:
    """A pruner and a repair adapter attached to one model; `detach()` leaves no trace.

    A copy of the model, made by `copy.deepcopy` or by pickling, has a host of its own, outside of any session.

    Args:
        model: a `*ForConditionalGeneration`, never modified beyond its hooks and, on this object, `REPLACED`.
        pruner: the method; `Full` hosts nothing but records (the teacher's side).
        repair: adapter on late layers, fed by the pruner's stages.
        keep: budget of each sample (one prompt, whatever its number of images or crops): visual tokens averaged over
            the decoder layers' inputs, or a schedule {layer: count}. Samples with fewer keep all.
        options: settings that every method has alike.
        lora: adapters on its linear layers, which act where `Session.prune` is on.
        replaces: the host that is attached to the model now. It is detached last, and stays attached if anything fails.

    Raises:
        LitPruneError: stages where this model can't drop tokens, a budget that can't be met, another host on the model,
            a library or a model without what the hooks rely on.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: PruningMethod,
        repair: RepairAdapter | None,
        keep: Budget,
        options: HostOptions = HostOptions(),  # noqa: B008 (frozen)
        replaces: "DecoderHost | None" = None,
        lora: LoRA | None = None,
    ) -> None:
        self.lora, self.apart = lora, options.frames == "apart"
        self.model, self.parts = model, parts.find(model)
        self._check_free(replaces)
        dims = self.parts.dims
        self.pruner, self.repair, self.keep = pruner, repair, keep
        self.session = Session()
        self.walk = pruner.walk(dims.depth)
        self.stages = tuple(stage.layer for stage in self.walk)
        self.renumbering = Renumbering(self.parts.decoder) if options.positions == "renumbered" else None
        rule = options.proportional_attention
        self.proportional = None if rule == "none" else ProportionalAttention(rule)
        self.masks = Masks(self.parts.decoder.config, self.parts.kinds, compat.builds_masks(model))
        self.feeds = repair.feeds(self.stages, dims.depth) if repair is not None else {}
        parts.check_stages(model.config, self.stages)
        self._check_kinds()
        self.schedule = pruner.nominal_schedule(keep, dims)
        self.plans = Plans(pruner, keep, dims.depth)
        self.tower = self._tower_host()
        self.devices = devices_of(self.model, self.parts.norms)
        walk = self.walk
        if self.devices is not None:
            walk = tuple(replace(stage, pruner=reachable(stage.pruner, "prune", "exact")) for stage in walk)
            repair = repair and reachable(repair, "essence", "lost", "forward")
        parts_of_tower = self.tower and self.tower.tower
        runner = Stages(walk, repair, dims.width, parts_of_tower, self.proportional)
        plans = None if self.tower is None else self.plans
        self.layers = Layers(
            self.stages,
            runner,
            self.masks,
            getattr(self.parts.decoder, "rotary_emb", None),
            plans,
            repair,
            self.feeds,
            self.renumbering,
            self.proportional,
            self.devices,
        )
        self._check_attention()
        self.handles: list[RemovableHandle] = []
        try:
            self._hook()
        except BaseException:
            self.detach()
            raise
        if replaces is not None:
            replaces.detach()

    def _check_free(self, replaces: "DecoderHost | None") -> None:
        """Raise `LitPruneError` if hooks would be ignored, or would meet those of another host."""
        if any(part._compiled_call_impl for part in (self.model, self.parts.decoder, *self.parts.layers)):
            raise LitPruneError(
                "this model was compiled by its own compile(), which ignores hooks that come later, silently: load it "
                "again and compile with VLM.compile() instead"
            )
        if host_of(self.model) is not replaces:
            raise LitPruneError("something is attached to this model already: detach it first, one model has one host")

    def _check_kinds(self) -> None:
        """Raise `LitPruneError` where this attention function's masks can't be cut down."""
        limited = [i for i, kind in enumerate(self.parts.kinds) if kind.attends and not kind.plain]
        implementation = self.parts.decoder.config._attn_implementation
        if self.stages and limited and limited[-1] >= self.stages[0] and implementation not in ("sdpa", "eager"):
            raise LitPruneError(
                f"layers {limited} of this model attend to a window or to images in both directions, which "
                f"{implementation} can't follow once tokens are dropped; load it with attn_implementation='sdpa', or, "
                f"where prompts are shorter than the window, with sliding_window=None in its text_config"
            )

    @property
    def counted(self) -> int | None:
        """The stage whose layers the library counts cached columns by: those of the first layer with attention."""
        first = self.layers.attention(0, 1)
        return max((stage for stage in self.stages if stage <= first), default=None)

    def _tower_host(self) -> TowerHost | None:
        """Host of the stages inside the vision tower, where the method has some."""
        if self.pruner.tower is None:
            return None
        if self.stages[0] != 0:
            raise LitPruneError("a pruner with stages in the tower needs its first decoder stage at layer 0")
        found = tower(parts.unwrap(self.model), self.parts.decoder)
        check_tower(found.layers)
        return TowerHost(found, self.pruner, self.keep, self._session)

    def _check_attention(self) -> None:
        """Raise `LitPruneError` where attention can't be read, or biased, as the method asks."""
        wrap_attention()
        asked = {stage.layer: stage.pruner.reads(stage.index) for stage in self.walk}
        keys = {stage.layer for stage in self.walk if stage.pruner.needs_keys}
        own = [layer for layer, rows in asked.items() if layer in keys or (rows is not None and rows.layer == "own")]
        if self.devices is not None:
            check_devices(self.devices, {layer: self.layers.attention(layer, 1) for layer in own})
        own = [self.layers.attention(layer, 1) for layer in own]
        checks.check_decoder(self.model, self.parts.decoder, self.parts.layers, own)
        previous = [layer for layer, rows in asked.items() if rows is not None and rows.layer == "previous"]
        if 0 in previous:
            raise LitPruneError("pruning layer 0 can't read the attention of the layer before it; start at 1")
        implementation = self.parts.decoder.config._attn_implementation
        for layer in previous:
            self._check_previous(layer)
        captured = [layer for layer in own if not compat.projects(self.parts.layers[layer])]
        if (previous or captured) and not wrapped(implementation):
            raise LitPruneError(
                f"{implementation} attention can't be read; load the model with attn_implementation='sdpa', if its "
                f"class has it, or use a method that reads no attention, such as DivPrune"
            )
        if self.proportional is not None and self.proportional.rule == "attention" and None in asked.values():
            raise LitPruneError(
                "proportional_attention: attention needs a method that reads attention at each of its stages, such as "
                "FastV, and none in the vision tower; use proportional_attention: count"
            )
        if self.proportional is not None and not wrapped(implementation):
            raise LitPruneError(
                f"proportional_attention: {implementation} attention takes no bias per key; load with "
                f"attn_implementation='sdpa'"
            )

    def _check_previous(self, stage: int) -> None:
        """Raise `LitPruneError` if no attention reaches a stage that reads that of the layer before it."""
        layer = self.layers.attention(stage - 1, -1)
        if not self.parts.kinds[layer].attends:
            raise LitPruneError(
                f"no layer before {stage} has attention that could be read: layers 0 to {stage - 1} of this model are "
                f"recurrent or convolutional; prune later, or use a method that reads its own layer's attention"
            )
        if between := [other for other in self.stages if layer < other < stage]:
            raise LitPruneError(
                f"pruning before layer {stage} would read the attention of layer {layer}, the last before it that has "
                f"any, but layer {between[-1]} has dropped tokens since; leave out one of the two stages"
            )

    def _hook(self) -> None:
        decoder = self.parts.decoder
        self.handles.append(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        self.handles.append(self.model.register_forward_hook(self._leave_model, with_kwargs=True))
        # Also where the tower fails: what is counted from then on is nobody's.
        self.handles.append(self.model.register_forward_hook(self._end_count, with_kwargs=True, always_call=True))
        self.handles.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        self.handles.append(decoder.register_forward_hook(self._leave_decoder, with_kwargs=True))
        self.handles.extend(self.layers.hook(self.parts.layers))
        if self.tower is not None:
            self.handles.extend(self.tower.hook())
        if self.lora is not None:
            if self.devices is not None:
                self.lora.place(self.model)
            self.handles.extend(self.lora.hook(self.model, self._adapts))
        for name in REPLACED:  # last: while attaching fails, another host's stay
            setattr(parts.unwrap(self.model), name, getattr(self, name))

    def detach(self) -> None:
        """Remove every hook."""
        attributes = vars(parts.unwrap(self.model))
        for name in REPLACED:
            if getattr(attributes.get(name), "__self__", None) is self:  # else of the host that replaces this one
                del attributes[name]
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __deepcopy__(self, memo: dict) -> "DecoderHost":
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(self._state(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        compat.drop_capturing_hooks(self.model)
        return {**self._state(), "classes": compat.recording_classes(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a new process attention isn't wrapped yet, and the library has never made such a model."""
        compat.put_on_record(state.pop("classes"))
        vars(self).update(state)
        wrap_attention()

    def _state(self) -> dict[str, Any]:
        """State of a copy, which belongs to no session: what one collects is its caller's."""
        return {**vars(self), "session": Session()}

    @property
    def shared(self) -> int:
        """Decoder layers that the plug-in leaves alone: below layer `shared` a forward with it equals one without."""
        if not self.stages or self.lora is not None:
            return 0
        return self.layers.attention(self.stages[0] - 1, -1) if self.layers.reads_previous(0) else self.stages[0]

    @property
    def prunes_tower(self) -> bool:
        """True if a forward of the vision tower would drop patches now."""
        return self.tower is not None and self.session.prune

    @contextmanager
    def using(self, session: Session) -> Iterator[Session]:
        """Run the forwards inside under another session (teacher, soft masks, recording, hints)."""
        before, self.session = self.session, session
        try:
            yield session
        finally:
            self.session = before

    def _session(self) -> Session:
        return self.session

    def _adapts(self) -> bool:
        return self.session.prune and self.session.adapt

    # -- generate(), the model and its decoder ------------------------------------------------------------------

    def _prefill(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict, *args, **kwargs) -> Any:
        """Stands for the model's method of this name: no hook sees that `generate()` cuts a prompt into chunks.

        To a forward a chunk looks like a prompt, and before transformers 5.23 like one without an image.
        """
        model = parts.unwrap(self.model)
        if self.stages and self.session.prune and passed_modalities(model_kwargs, self.parts):
            refuse_chunks(generation_config)
        return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs: torch.Tensor, model_kwargs: dict, *args, **kwargs):
        """Stands for the model's method of this name, which encodes images and drops what tells their sizes."""
        model, given = parts.unwrap(self.model), {**model_kwargs, "input_ids": inputs}
        prepare = type(model)._maybe_prepare_encoder_kwargs_for_generation
        prepared = prepare(model, inputs, model_kwargs, *args, **kwargs)
        keep_sizes(prepared.get(compat.ENCODED) or {}, given, self.parts.ended_rows)
        return prepared

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict):
        """Step 1 of a forward: find the columns, plan the stages, and put the `Forward` among the keywords."""
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        refuse_paged(cache := cache_of(kwargs))
        # Beams may have reordered a cache that holds pruned columns, and `generate()` may feed columns it has again.
        if hasattr(cache, CACHE):
            getattr(cache, CACHE).follow(cache)
            if self.devices is not None and kwargs.get("input_ids") is not None:
                move(getattr(cache, CACHE), kwargs["input_ids"].device)
        real = real_columns(kwargs, cache)
        if hasattr(cache, CACHE):
            kwargs = only_new(kwargs, getattr(cache, CACHE), real)
        # Visual columns, budgets and counts per stage; None: nothing to do in this forward.
        plain = Session(False, False, record=self.session.record, pack=self.session.pack)
        session = self.session if self.stages else plain
        if session.prune and kwargs.get("inputs_embeds") is not None:
            raise LitPruneError("inputs_embeds don't tell which tokens are visual: give input_ids, or detach")
        forward = begin(kwargs, self.parts, session, self.plans, real, self.apart)
        if forward is not None:
            self._check_soft(forward)
            self._check_videos(forward)
        if forward is not None and forward.counts and cache is not None and not hasattr(cache, CACHE):
            setattr(cache, CACHE, CacheState.of(cache, real, forward.packed.valid, self.stages, self.counted))
        # What a caller wants to know: the tower's work, and answers alone in place of all logits.
        if forward is not None and forward.record is not None:
            forward.record.trace.vision = vision_trace(module.config, kwargs, forward.total, forward.videos)
            self._count_tower(module, kwargs, forward)
        if forward is not None and session.answers_only:
            labels = kwargs.pop("labels", None)
            if forward.record is not None and labels is not None:
                forward.record.targets = forward.at_answers(labels.roll(-1, 1))
                forward.record.answers = forward.packed.answer_mask.sum(1)
        return args, kwargs if forward is None else {**kwargs, FORWARD: forward}

    @staticmethod
    def _count_tower(module: nn.Module, kwargs: dict, forward: Forward) -> None:
        """Count what a tower of unknown arithmetic takes: until the decoder begins, or where it was encoded before."""
        if not forward.grid or not unknown(module.config):
            return
        if encoded := kwargs.get(compat.ENCODED):
            forward.record.trace.counted = shared(counted(encoded), forward.total)
        else:
            forward.counter = Counter()

    @staticmethod
    def _end_count(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is not None and forward.counter is not None:
            forward.record.trace.counted = shared(forward.counter.end(), forward.total)
            forward.counter = None

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict):
        """Step 2: the embeddings are there; choose the cache, and continue it where it was pruned before."""
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        self._end_count(module, args, kwargs)
        compat.keep_hooks_out_of_checkpoints(self.parts.layers)
        kwargs = dict(kwargs)
        if self.devices is not None:
            given = kwargs.get("inputs_embeds")
            forward.follow((kwargs["input_ids"] if given is None else given).device)
        cache = chosen_cache(module, forward.session, kwargs)
        if cache is not None and (forward.counts or hasattr(cache, CACHE)):
            if not hasattr(cache, CACHE):
                setattr(cache, CACHE, CacheState(counted=self.counted))
            self._continue(forward, getattr(cache, CACHE), kwargs)
        if forward.session.pack and cache is None:
            check_packable(self.masks)
            forward.keys.packs = True
        if forward.counts:
            forward.deepstack = Deepstack.taken(kwargs)
        session = forward.session
        forward.settled = (
            forward.cache_state is not None
            and not (forward.counts or session.watch or session.leaves_out)
            and forward.record is None
        )
        needed = forward.counts and any(stage.pruner.needs_embeds for stage in self.walk)
        forward.awaits = Awaited(bool(needed), forward.record is not None and forward.record.keep_embeds)
        # A decoder that embeds its tokens itself shows them to its first layer.
        if kwargs.get("inputs_embeds") is not None:
            forward.take_embeds(kwargs["inputs_embeds"])
        return args, kwargs

    def _check_soft(self, forward: Forward) -> None:
        """Raise `LitPruneError` where a token that attention doesn't see would still move a state, or other keys."""
        kinds, keys = self.parts.kinds, keys_chosen(self.parts.decoder.config)
        if forward.session.soft and forward.counts and keys is not None and keys < forward.length:
            raise LitPruneError(
                f"soft masks hide tokens from attention alone, and layers of this model choose the {keys} keys of each "
                f"token among all {forward.length} of the prompt: train it with model.train_mode: drop"
            )
        if forward.session.soft and forward.counts and any(kind.recurrent for kind in kinds[self.stages[0] :]):
            layers = [layer for layer, kind in enumerate(kinds) if kind.recurrent]
            raise LitPruneError(
                f"soft masks hide tokens from attention alone, and layers {layers} of this model are recurrent or "
                f"convolutional, which they would still move: train it with model.train_mode: drop"
            )

    def _check_videos(self, forward: Forward) -> None:
        """Raise `LitPruneError` where stages inside the tower would miss or spoil a video, or the model prunes it."""
        model = parts.unwrap(self.model)
        if forward.videos is not None and forward.counts and getattr(model, "video_pruning_rate", 0):
            raise LitPruneError(
                f"{type(model).__name__} drops tokens of videos itself (video_pruning_rate is "
                f"{model.video_pruning_rate}): set model.video_pruning_rate = 0, or detach"
            )
        if forward.videos is not None and self.prunes_tower and self.tower.tower.videos is not None:
            raise LitPruneError(
                f"{type(model).__name__}: its videos {self.tower.tower.videos}; use a method of the "
                f"decoder, such as FastV or DivPrune"
            )

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
        # The library counts the cached columns of one layer; where that one was pruned, positions follow what was fed.
        if state.seen and state.counted in state.valid:
            if kwargs.get("position_ids") is None:
                new = torch.arange(forward.length, device=forward.packed.valid.device) + state.seen
                kwargs["position_ids"] = new[None]
            kwargs["attention_mask"] = torch.cat([state.valid[state.counted], forward.packed.valid], dim=1)
        # M-RoPE's ids advance less than columns do: decoding needs the difference.
        state.seen += forward.length
        positions = kwargs.get("position_ids")
        if self.counted is not None and positions is not None and positions.ndim == 3:
            state.lag = positions[-1, 0, -1] + 1 - state.seen

    def _leave_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """Step 4, after the layers (`layers.py`): put the states that are left back at their columns, else zeros."""
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is not None:
            compat.need(output, f"the output of {type(module).__name__}", ("last_hidden_state",))
        if forward is not None and self.devices is not None:
            forward.follow(output.last_hidden_state.device)
        if forward is not None and forward.session.answers_only:
            output.last_hidden_state = forward.at_answers(output.last_hidden_state)[None]
            return output
        if forward is None or forward.packed.columns.shape[1] == forward.length:
            return None
        states = output.last_hidden_state * forward.packed.valid[..., None].to(output.last_hidden_state.dtype)
        output.last_hidden_state = selection.put_rows(states, forward.packed.columns, forward.length)
        return output

    def _leave_model(self, module: nn.Module, args: tuple, kwargs: dict, output):
        forward: Forward | None = kwargs.get(FORWARD)
        if forward is not None:
            checks.check_reached(module, forward.reached)
        if forward is not None and self.devices is not None and forward.record is not None:
            move(forward.record, kwargs["input_ids"].device)


def host_of(model: nn.Module) -> DecoderHost | None:
    """The host that is attached to a model."""
    for hook in parts.find(model).decoder._forward_pre_hooks.values():
        if isinstance(host := getattr(hook, "__self__", None), DecoderHost):
            return host
    return None
