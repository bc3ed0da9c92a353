"""One pruning stage at the input of a decoder layer: score, select, then drop or mask."""

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from lit_prune import selection
from lit_prune.host.attention import row_attention
from lit_prune.host.places import query_key
from lit_prune.host.state import Forward, StageRecord
from lit_prune.pruners.base import Context, Kept, Pruner
from lit_prune.repair import RepairAdapter


class Stages:
    """The stages of one pruner in one decoder. Everything that changes is in the `Forward`.

    Args:
        pruner: the method.
        repair: adapter that is fed by the stages, if any.
        layers: pruning layers in this decoder.
        config: the decoder's, for its masks.
    """

    def __init__(
        self, pruner: Pruner, repair: RepairAdapter | None, layers: tuple[int, ...], config: PreTrainedConfig
    ) -> None:
        self.pruner, self.repair, self.layers, self.config = pruner, repair, layers, config

    def run(self, index: int, module: nn.Module, hidden: Tensor, forward: Forward, kwargs: dict) -> Tensor:
        """Score, select, and drop (or mask) the visual tokens at the input of one layer."""
        stage = self.layers.index(index)
        rope = forward.rope if forward.restaged else kwargs["position_embeddings"]
        normed = module.input_layernorm(hidden)
        columns, real = selection.compact(forward.visual)
        rows, row_mask = selection.compact(self.rows(forward))
        alive = forward.alive.gather(1, columns) & real
        attention = self._attention(module, normed, rope, rows, row_mask, forward)
        context = Context(
            stage=stage,
            visual=selection.gather_rows(normed, columns),
            alive=alive,
            ordinal=forward.ordinal.gather(1, columns) * real,
            text=selection.gather_rows(normed, rows),
            text_mask=row_mask,
            visual_embeds=None if forward.embeds is None else selection.gather_rows(forward.embeds, columns),
            text_embeds=None if forward.embeds is None else selection.gather_rows(forward.embeds, rows),
            attention=None if attention is None else attention.gather(1, columns),
            count=forward.counts[index],
            total=forward.total,
            seed=forward.seed,
            hints=_per_row(forward.session.hints, columns.shape[0]),
            images=forward.images(columns, real),
        )
        kept = self.pruner.prune(context)
        reads = None if self.pruner.attention is None else self.pruner.attention.layer
        forward.trace_stage(index, reads, row_mask.sum(1), kept.keep.sum(1))
        self._leave_essence(stage, context, kept, forward)
        self._note(index, columns, context, kept, forward)
        return self._apply(hidden, rope, columns, real, alive, kept, forward)

    def _attention(
        self, module: nn.Module, normed: Tensor, rope: tuple, rows: Tensor, row_mask: Tensor, forward: Forward
    ) -> Tensor | None:
        """Attention rows of the stage's own layer, computed ahead, or those tapped in the layer before."""
        if self.pruner.attention is None:
            return None
        if self.pruner.attention.layer == "previous":
            return forward.tap.scores
        with torch.no_grad():
            cos, sin = (part.expand(normed.shape[0], -1, -1) for part in rope)
            row_rope = (selection.gather_rows(cos, rows), selection.gather_rows(sin, rows))
            query, key = query_key(module, selection.gather_rows(normed, rows), normed, row_rope, (cos, sin))
            # In soft mode the tokens pruned so far are still keys, as the layer itself will see them.
            scaling = module.self_attn.scaling
            return row_attention(query, key, rows, row_mask, forward.valid, scaling, forward.key_bias)

    def _leave_essence(self, stage: int, context: Context, kept: Kept, forward: Forward) -> None:
        if self.repair is None or not forward.session.repair or stage not in self.repair.stages:
            return
        gate = kept.keep.float() if kept.gate is None else kept.gate
        forward.essence[stage] = self.repair.essence(
            context.visual, context.ordinal, context.alive, gate, context.total
        )

    @staticmethod
    def _note(index: int, columns: Tensor, context: Context, kept: Kept, forward: Forward) -> None:
        """Record the outcome on the image's grid; gates multiply from stage to stage."""
        record = forward.record
        if record is None:
            return
        gate = kept.keep if kept.gate is None else kept.gate
        gate = forward.on_grid(gate.float(), columns, context.alive, 0.0)
        forward.cumulative = gate if forward.cumulative is None else forward.cumulative * gate
        marks = forward.on_grid(kept.keep, columns, context.alive, 0.0)
        scores = None
        if kept.scores is not None:
            scores = forward.on_grid(kept.scores.float(), columns, context.alive, float("-inf"))
        record.stages.append(StageRecord(index, marks, forward.cumulative, scores))

    def _apply(
        self, hidden: Tensor, rope: tuple, columns: Tensor, real: Tensor, alive: Tensor, kept: Kept, forward: Forward
    ) -> Tensor:
        dropped = torch.zeros_like(forward.valid).scatter(1, columns, alive & ~kept.keep)
        self._add_bias(columns, real, alive, kept, forward)
        if forward.session.soft:
            forward.gone = dropped if forward.gone is None else forward.gone | dropped
            dropped = self._hopeless(columns, alive, kept, forward)
        if not bool(dropped.any()):
            return hidden
        packed, _ = forward.pack(dropped)
        cos, sin = (part.expand(hidden.shape[0], -1, -1) for part in rope)
        forward.rope = (selection.gather_rows(cos, packed), selection.gather_rows(sin, packed))
        forward.restaged = True
        forward.mask = None
        hidden = selection.gather_rows(hidden, packed)
        if forward.cache_state is None:
            forward.mask = self.mask(hidden, forward.valid, None, 0)
        return hidden

    def _hopeless(self, columns: Tensor, alive: Tensor, kept: Kept, forward: Forward) -> Tensor:
        """Soft mode: columns ranked so far behind the kept ones that they are dropped for good, if that is asked."""
        none = torch.zeros_like(forward.valid)
        if forward.session.spare is None or kept.scores is None:
            return none
        images, kept_here = forward.images(columns, alive), kept.keep.sum(1, keepdim=True)
        if images is not None:
            kept_here = images.spread(images.sum(kept.keep.long()))
        contenders = (kept_here * forward.session.spare).ceil()
        far = alive & ~kept.keep & (selection.rank(kept.scores.detach(), alive, images) >= contenders)
        return none.scatter(1, columns, far)

    @staticmethod
    def _add_bias(columns: Tensor, real: Tensor, alive: Tensor, kept: Kept, forward: Forward) -> None:
        """Log of the gate per key: hides dropped tokens in soft mode, and carries gradients in both."""
        soft = forward.session.soft
        if kept.gate is None and not soft:
            return
        if not soft and not kept.gate.requires_grad:
            return
        gate = kept.keep.float() if kept.gate is None else kept.gate.float()
        if forward.session.gate_clip is not None:
            gate = selection.clip_gradient(gate, forward.session.gate_clip)
        bias = selection.log_gate(gate, forward.session.eps) * alive
        zeros = torch.zeros(forward.valid.shape, dtype=bias.dtype, device=bias.device)
        bias = zeros.scatter_add(1, columns, bias * real)
        forward.key_bias = bias if forward.key_bias is None else forward.key_bias + bias

    def rows(self, forward: Forward) -> Tensor:
        """Columns whose attention the pruner asked for."""
        if self.pruner.attention is None or self.pruner.attention.rows == "question":
            return forward.text
        last = forward.text.flip(1).long().cumsum(1).flip(1) == 1
        return forward.text & last

    def mask(self, hidden: Tensor, valid: Tensor, cache: Cache | None, index: int) -> Tensor | None:
        """Attention mask of the layers from `index` on, sized by that layer's own cache; None where none is needed."""
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            position_ids=None,
            layer_idx=index,
        )


def _per_row(hints: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Hints of each row: beams and several answers to one prompt repeat a sample."""
    return {name: hint.repeat_interleave(max(1, rows // len(hint)), 0) for name, hint in hints.items()}
