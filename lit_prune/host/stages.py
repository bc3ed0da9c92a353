"""One pruning stage at the input of a decoder layer: score, select, then drop or mask."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from lit_prune.host.attention import row_attention, row_mean
from lit_prune.host.compat import causal_mask
from lit_prune.host.lengths import on_device
from lit_prune.host.parts import Tower, plain_keys, query_key
from lit_prune.host.proportional import ProportionalAttention
from lit_prune.host.session import StageRecord
from lit_prune.host.state import Forward
from lit_prune.host.vision import absent
from lit_prune.ops import selection
from lit_prune.pruners.base import Context, Kept, Pruner
from lit_prune.repair import RepairAdapter

HIDDEN = -1e4  # bias of a key that nobody may see: far below any product of gates, and finite in half precision


@dataclass(frozen=True)
class Read:
    """What a stage reads off the frozen model: attention to every column, row by row too, and keys."""

    attention: Tensor | None = None
    each: Tensor | None = None
    keys: Tensor | None = None


class Stages:
    """The stages of one pruner in one decoder. Everything that changes is in the `Forward`.

    Args:
        pruner: the method.
        repair: adapter that is fed by the stages, if any.
        layers: pruning layers in this decoder.
        config: the decoder's, for its masks.
        tower: the vision tower, if the pruner has stages inside it.
        proportional: proportional attention, if it is on.
    """

    def __init__(
        self,
        pruner: Pruner,
        repair: RepairAdapter | None,
        layers: tuple[int, ...],
        config: PreTrainedConfig,
        tower: Tower | None = None,
        proportional: ProportionalAttention | None = None,
    ) -> None:
        self.proportional = proportional
        self.pruner, self.repair, self.layers, self.config, self.tower = pruner, repair, layers, config, tower

    def run(self, index: int, module: nn.Module, hidden: Tensor, forward: Forward, kwargs: dict) -> Tensor:
        """Score, select, and drop (or mask) the visual tokens at the input of one layer."""
        stage = self.layers.index(index)
        rope = kwargs["position_embeddings"] if forward.rope is None else forward.rope
        normed = module.input_layernorm(hidden)
        columns, real = selection.compact(forward.visual, forward.most_visual)
        asked = self.pruner.reads(stage)
        rows, row_mask = self.rows(forward, stage)
        dead = None
        if stage == 0 and self.tower is not None:
            dead = forward.visual & absent(hidden, self.tower.newline)
            forward.gone = dead
        alive = forward.alive.gather(1, columns) & real
        read = self._read(stage, module, normed, rope, rows, row_mask, forward)
        context = Context(
            stage=stage,
            visual=selection.gather_rows(normed, columns),
            alive=alive,
            ordinal=forward.ordinal.gather(1, columns) * real,
            text=selection.gather_rows(normed, rows),
            text_mask=row_mask,
            visual_embeds=None if forward.embeds is None else selection.gather_rows(forward.embeds, columns),
            text_embeds=None if forward.embeds is None else selection.gather_rows(forward.embeds, rows),
            attention=None if read.attention is None else read.attention.gather(1, columns),
            count=on_device(forward.counts[index], hidden.device),
            total=forward.total,
            seed=forward.seed,
            hints=_per_row(forward.session.hints, columns.shape[0]),
            images=forward.images(columns, real),
            states=selection.gather_rows(hidden, columns) if self.pruner.needs_states else None,
            visual_keys=None if read.keys is None else selection.gather_rows(read.keys, columns),
            text_keys=None if read.keys is None else selection.gather_rows(read.keys, rows),
            row_attention=None
            if read.each is None
            else read.each.gather(2, columns[:, None].expand(-1, rows.shape[1], -1)),
        )
        kept = self.pruner.prune(context)
        reads = None if asked is None else asked.layer
        needs_keys, sized = self.pruner.needs_keys, self.proportional is not None
        forward.trace_stage(index, reads, row_mask.sum(1), kept.mask.sum(1), needs_keys, sized)
        self._leave_essence(stage, context, kept, forward)
        self._note(index, columns, context, kept, forward)
        if kept.states is not None:
            changed = torch.where(kept.mask[..., None], kept.states.to(hidden.dtype), context.states)
            hidden = hidden.scatter(1, columns[..., None].expand_as(changed), changed)
        exact = forward.counts[index] if self.pruner.exact(stage) and not forward.session.soft else None
        return self._apply(hidden, rope, columns, real, alive, kept, forward, dead, exact)

    def _read(
        self,
        stage: int,
        module: nn.Module,
        normed: Tensor,
        rope: tuple,
        rows: Tensor,
        row_mask: Tensor,
        forward: Forward,
    ) -> "Read":
        """Attention rows and keys of the stage's own layer, computed ahead, or rows tapped in the layer before."""
        asked = self.pruner.reads(stage)
        keys = plain_keys(module, normed) if self.pruner.needs_keys else None
        if asked is None:
            return Read(keys=keys)
        if asked.layer == "previous":
            return Read(forward.tap.scores, keys=keys)
        with torch.no_grad():
            cos, sin = (part.expand(normed.shape[0], -1, -1) for part in rope)
            row_rope = (selection.gather_rows(cos, rows), selection.gather_rows(sin, rows))
            query, key = query_key(module, selection.gather_rows(normed, rows), normed, row_rope, (cos, sin))
            # In soft mode the tokens pruned so far are still keys, as the layer itself will see them.
            scaling = module.self_attn.scaling
            each = row_attention(query, key, rows, forward.valid, scaling, forward.key_bias)
            return Read(row_mean(each, row_mask), each if asked.each else None, keys)

    def _leave_essence(self, stage: int, context: Context, kept: Kept, forward: Forward) -> None:
        if self.repair is None or not forward.session.repair or stage not in self.repair.stages:
            return
        gate = kept.mask.float() if kept.gate is None else kept.gate
        forward.essence[stage] = self.repair.essence(
            context.visual, context.ordinal, context.alive, gate, context.total
        )

    @staticmethod
    def _note(index: int, columns: Tensor, context: Context, kept: Kept, forward: Forward) -> None:
        """Record the outcome on the image's grid; gates multiply from stage to stage."""
        record = forward.record
        if record is None:
            return
        gate = kept.mask if kept.gate is None else kept.gate
        gate = forward.on_grid(gate.float(), columns, context.alive, 0.0)
        forward.cumulative = gate if forward.cumulative is None else forward.cumulative * gate
        marks = forward.on_grid(kept.mask, columns, context.alive, 0.0)
        scores = None
        if kept.scores is not None:
            scores = forward.on_grid(kept.scores.float(), columns, context.alive, float("-inf"))
        record.stages.append(StageRecord(index, marks, forward.cumulative, scores))

    def _apply(
        self,
        hidden: Tensor,
        rope: tuple,
        columns: Tensor,
        real: Tensor,
        alive: Tensor,
        kept: Kept,
        forward: Forward,
        dead: Tensor | None,
        exact: list[int] | None,
    ) -> Tensor:
        leaving = dropped = torch.zeros_like(forward.valid).scatter(1, columns, alive & ~kept.mask)
        self._add_bias(columns, real, alive, kept, forward)
        if forward.session.soft:
            forward.gone = dropped if forward.gone is None else forward.gone | dropped
            dropped = self._hopeless(columns, alive, kept, forward)
        if dead is not None:  # what the tower dropped goes for good, also where the rest is masked softly
            dropped, leaving = dead if dropped is None else dropped | dead, leaving | dead
            forward.gone = forward.gone if forward.session.soft else None
        there = dropped is not None and forward.shorten(dropped, exact)
        if not there and not forward.session.soft:
            return hidden
        forward.move_up(leaving)
        if self.proportional is not None:
            self.proportional.resize(hidden, columns, alive, kept.mask, forward, dead)
        if not there:
            if forward.cache_state is None:
                forward.restaged = True
                self._hide_padding(hidden, forward)
            return hidden
        packed = forward.pack(dropped)
        cos, sin = (part.expand(hidden.shape[0], -1, -1) for part in rope)
        forward.rope = (selection.gather_rows(cos, packed), selection.gather_rows(sin, packed))
        forward.restaged = True
        forward.mask = None
        hidden = selection.gather_rows(hidden, packed)
        if forward.cache_state is None:
            self._hide_padding(hidden, forward)
        return hidden

    def _hide_padding(self, hidden: Tensor, forward: Forward) -> None:
        """Hide padding and filler from the layers that follow, by a mask, or by the bias if keys carry one anyway.

        A mask of booleans, where there is one, becomes a float mask of seq x seq in every layer, which autograd keeps.
        """
        if forward.key_bias is None:
            forward.mask = self.mask(hidden, forward.valid, None, 0, forward.padded)
        else:
            forward.key_bias = forward.key_bias.masked_fill(~forward.valid, HIDDEN)
            forward.mask = self.mask(hidden, forward.valid, None, 0, False)

    def _hopeless(self, columns: Tensor, alive: Tensor, kept: Kept, forward: Forward) -> Tensor | None:
        """Soft mode: columns ranked so far behind the kept ones that they are dropped for good, if that is asked."""
        if forward.session.contenders is None or kept.scores is None:
            return None
        images, kept_here = forward.images(columns, alive), kept.mask.sum(1, keepdim=True)
        if images is not None:
            kept_here = images.spread(images.sum(kept.mask.long()))
        most = (kept_here * forward.session.contenders).ceil()
        far = alive & ~kept.mask & (selection.rank(kept.scores.detach(), alive, images) >= most)
        return torch.zeros_like(forward.valid).scatter(1, columns, far)

    @staticmethod
    def _add_bias(columns: Tensor, real: Tensor, alive: Tensor, kept: Kept, forward: Forward) -> None:
        """Log of the gate per key: hides dropped tokens in soft mode, and carries gradients in both."""
        soft = forward.session.soft
        if kept.gate is None and not soft:
            return
        if not soft and not kept.gate.requires_grad:
            return
        gate = kept.mask.float() if kept.gate is None else kept.gate.float()
        if forward.session.gate_clip is not None:
            gate = selection.clip_gradient(gate, forward.session.gate_clip)
        bias = selection.log_gate(gate, forward.session.eps) * alive
        zeros = torch.zeros(forward.valid.shape, dtype=bias.dtype, device=bias.device)
        bias = zeros.scatter_add(1, columns, bias * real)
        forward.key_bias = bias if forward.key_bias is None else forward.key_bias + bias

    def rows(self, forward: Forward, stage: int) -> tuple[Tensor, Tensor]:
        """Columns whose attention the pruner asked for at a stage, and which of them are real."""
        asked = self.pruner.reads(stage)
        if asked is None or asked.rows == "question":
            return selection.compact(forward.text, forward.most_text)
        last = forward.text.flip(1).long().cumsum(1).flip(1) == 1
        return selection.compact(forward.text & last, None if forward.most_text is None else min(1, forward.most_text))

    def mask(
        self, hidden: Tensor, valid: Tensor, cache: Cache | None, index: int, padded: bool | None
    ) -> Tensor | BlockMask | None:
        """Attention mask of the layers from `index` on, sized by that layer's own cache; None where none is needed.

        `padded` says whether some columns are filler; None: nobody knows, so the device is asked.
        """
        return causal_mask(self.config, hidden, None if padded is False else valid, cache, index, skip=not padded)


def _per_row(hints: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Hints of each row: beams and several answers to one prompt repeat a sample."""
    return {name: hint.repeat_interleave(max(1, rows // len(hint)), 0) for name, hint in hints.items()}
