"""One pruning stage at the input of a decoder layer: score, select, then drop or mask."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_prune.host import gates
from lit_prune.host.attention import mask_rows, row_attention
from lit_prune.host.compat import pre_norm, projects
from lit_prune.host.lengths import on_device
from lit_prune.host.masks import Span
from lit_prune.host.proportional import ProportionalAttention, merged
from lit_prune.host.reading import Handed, own_keys, own_rows
from lit_prune.host.session import StageRecord
from lit_prune.host.state import Forward, Selected
from lit_prune.host.streams import gained, mean_stream, rows_at
from lit_prune.host.towers.find import Tower
from lit_prune.host.towers.tail import absent
from lit_prune.ops import selection
from lit_prune.pruners.base import AttentionRows, Context, Kept, Stage
from lit_prune.repair import RepairAdapter

HIDDEN = -1e4  # bias of a key that nobody may see: far below any product of gates, and finite in half precision


@dataclass(frozen=True)
class Read:
    """Readings of the frozen model for a stage: attention to every column, row by row too, and keys."""

    attention: Float[Tensor, "batch columns"] | None = None
    each: Float[Tensor, "batch rows columns"] | None = None
    keys: Float[Tensor, "batch columns inner"] | None = None


@dataclass(frozen=True)
class Seen:
    """Input of a stage: the visual columns (`real`: no filler; `alive`: not pruned yet), rows, readings."""

    columns: Int[Tensor, "batch visual"]
    real: Bool[Tensor, "batch visual"]
    alive: Bool[Tensor, "batch visual"]
    rows: tuple[Tensor, Tensor]
    read: Read


class Stages:
    """The stages of one method in one decoder. Everything that changes is in the `Forward`.

    Args:
        walk: the stages, each with the pruner that decides there.
        repair: adapter that is fed by the stages, if any.
        width: of the decoder's states.
        tower: the vision tower, if the pruner has stages inside it.
        proportional: proportional attention, if it is on.
    """

    def __init__(
        self,
        walk: tuple[Stage, ...],
        repair: RepairAdapter | None,
        width: int,
        tower: Tower | None = None,
        proportional: ProportionalAttention | None = None,
    ) -> None:
        self.walk, self.repair, self.width, self.tower = walk, repair, width, tower
        self.layers = tuple(stage.layer for stage in walk)
        self.proportional = proportional

    def run(self, index: int, module: nn.Module, hidden: Tensor, forward: Forward, handed: Handed) -> Tensor:
        """Score, select, and drop (or mask) the visual tokens at the input of one layer.

        `handed`: the layer whose attention is read, the stage's own if it has any.
        """
        stage = self.layers.index(index)
        # 1. Find the visual columns; those that the vision tower dropped arrive at the first stage as marks.
        columns, real = selection.compact(forward.packed.visual, forward.most_visual)
        dead = None
        if stage == 0 and self.tower is not None:
            dead = forward.packed.visual & absent(hidden, self.tower.newline)
            forward.packed.gone = dead
        alive = forward.alive.gather(1, columns) & real
        # 2. Read the frozen layer: its normed input, and the attention rows and keys that the method asked for.
        norm, states = pre_norm(module), mean_stream(hidden, self.width)
        normed = states if norm is None else norm(states)
        rows = self.rows(forward, stage)
        read = self._read(stage, hidden, normed, handed, rows, forward)
        # 3. Let the method decide.
        context = self._context(stage, states, normed, Seen(columns, real, alive, rows, read), forward)
        here = self.walk[stage]
        kept = here.pruner.prune(context)
        exact = forward.counts[index] if here.pruner.exact(here.index) else None
        selected = Selected(columns, real, alive, kept, dead, exact, context.attention)
        # 4. Note what was read and decided: for the price, for the repair adapter, for the record.
        self._trace(index, stage, rows, kept, forward, whole=not projects(handed.layer))
        repaired = gates.for_repair(kept, alive, forward)
        self._leave_essence(stage, context, real, repaired, forward)
        self._note(index, columns, context, kept, repaired, forward)
        # 5. Methods that merge give kept tokens new states.
        if kept.states is not None:
            changed = torch.where(kept.mask[..., None], kept.states.to(hidden.dtype), context.states)
            hidden = gained(hidden, states, states.scatter(1, columns[..., None].expand_as(changed), changed))
        # 6. Drop, or mask.
        return self._apply(hidden, selected, forward)

    def _read(
        self,
        stage: int,
        hidden: Tensor,
        normed: Tensor,
        handed: Handed,
        rows: tuple[Tensor, Tensor],
        forward: Forward,
    ) -> Read:
        """Attention rows and keys of the stage's own layer, computed ahead, or rows tapped in the layer before."""
        asked = self.reads(stage)
        keys = own_keys(handed, hidden, normed) if self.walk[stage].pruner.needs_keys else None
        if asked is None:
            return Read(keys=keys)
        if asked.layer == "previous":
            return Read(forward.keys.taps[stage].scores, keys=keys)
        columns, real = rows
        with torch.set_grad_enabled(asked.gradient and torch.is_grad_enabled()):
            own = own_rows(handed, hidden, normed, columns)
            limits = mask_rows(own.mask, columns, 0, own.key.shape[2])
            # In soft mode the tokens pruned so far are still keys, as the layer itself will see them.
            each = row_attention(
                own.query, own.key, columns, forward.packed.valid, own.scaling, forward.packed.key_bias, limits
            )
            return Read(selection.row_mean(each, real), each if asked.each else None, keys)

    def _context(self, stage: int, hidden: Tensor, normed: Tensor, seen: Seen, forward: Forward) -> Context:
        """The method's view: rows of visual columns and of text, cut out of states, embeddings and keys."""
        columns, (rows, row_mask), read = seen.columns, seen.rows, seen.read

        def visual(values: Tensor | None) -> Tensor | None:
            return None if values is None else selection.gather_rows(values, columns)

        def text(values: Tensor | None) -> Tensor | None:
            return None if values is None else selection.gather_rows(values, rows)

        each = read.each
        return Context(
            stage=self.walk[stage].index,
            visual=visual(normed),
            alive=seen.alive,
            ordinal=forward.packed.ordinal.gather(1, columns) * seen.real,
            text=text(normed),
            text_mask=row_mask,
            visual_embeds=visual(forward.packed.embeds),
            text_embeds=text(forward.packed.embeds),
            attention=None if read.attention is None else read.attention.gather(1, columns),
            count=on_device(forward.counts[self.layers[stage]], hidden.device),
            total=forward.total,
            seed=forward.seed,
            hints=_per_row(forward.session.hints, columns.shape[0]),
            images=forward.images(columns, seen.real),
            states=visual(hidden) if self.walk[stage].pruner.needs_states else None,
            visual_keys=visual(read.keys),
            text_keys=text(read.keys),
            row_attention=None if each is None else each.gather(2, columns[:, None].expand(-1, rows.shape[1], -1)),
        )

    def _trace(
        self, index: int, stage: int, rows: tuple[Tensor, Tensor], kept: Kept, forward: Forward, whole: bool
    ) -> None:
        """Note what the stage computed beside the method itself."""
        asked = self.reads(stage)
        needs_keys, sized = self.walk[stage].pruner.needs_keys, self.proportional is not None
        reads = None if asked is None else asked.layer
        forward.trace_stage(index, reads, rows[1].sum(1), kept.mask.sum(1), needs_keys, sized, whole)

    def _leave_essence(self, stage: int, context: Context, real: Tensor, kept: Kept, forward: Forward) -> None:
        """Cache where tokens were kept and what was lost, for the repair layers that this stage feeds."""
        repair = self.repair
        if repair is None or not forward.session.repair or stage > max(repair.stages):
            return
        alive, earlier = context.alive, None
        if repair.cumulative:
            # The gates of earlier stages, with their gradient; 0 for what they pruned.
            gates = forward.cumulative
            alive = alive.float() if gates is None else gates.gather(1, context.ordinal) * real
            earlier = forward.lost
        elif stage not in repair.stages:
            return
        gate = kept.mask.float() if kept.gate is None else kept.gate
        lost = repair.lost(context.visual, alive, gate, earlier)
        if stage in repair.stages:
            given = (context.visual, context.ordinal, alive, gate, context.total, lost)
            forward.essence[stage] = repair.essence(*given)
        if repair.cumulative:
            forward.lost = lost

    def _note(
        self, index: int, columns: Tensor, context: Context, kept: Kept, repaired: Kept, forward: Forward
    ) -> None:
        """Record the outcome on the image's grid; gates multiply from stage to stage."""
        record = forward.record
        if record is None and self.repair is None:
            return

        def cumulative(kept: Kept, earlier: Tensor | None) -> Tensor:
            gate = kept.mask if kept.gate is None else kept.gate
            gate = forward.on_grid(gate.float(), columns, context.alive, 0.0)
            return gate if earlier is None else earlier * gate

        forward.cumulative = cumulative(repaired, forward.cumulative)
        if record is None:
            return
        total = forward.cumulative
        if forward.session.gate_centre:  # the budget loss reads the record: its gradient passes as it is
            total = cumulative(kept, record.stages[-1].gate if record.stages else None)
        marks = forward.on_grid(kept.mask, columns, context.alive, 0.0)
        scores = None
        if kept.scores is not None:
            scores = forward.on_grid(kept.scores.float(), columns, context.alive, float("-inf"))
        record.stages.append(StageRecord(index, marks, total, scores, context.count))

    def _apply(self, hidden: Tensor, selected: Selected, forward: Forward) -> Tensor:
        """Shorten the states, and all that has a column for each of them, or hide the pruned columns as keys."""
        leaving = dropped = selected.dropped(forward.packed.valid)
        # In soft training nothing leaves, unless it has no chance to come back.
        soft = forward.session.soft
        if soft:
            known = forward.unmasked or forward.lengths
            forward.unmasked = known and known.after(selected.exact)
            forward.packed.gone = dropped if forward.packed.gone is None else forward.packed.gone | dropped
            dropped = gates.hopeless(selected, forward)
        gates.add_bias(selected, dropped, forward)
        dead = selected.dead
        if dead is not None:  # what the tower dropped goes for good, also where the rest is masked softly
            dropped, leaving = dead if dropped is None else dropped | dead, leaving | dead
            forward.packed.gone = forward.packed.gone if soft else None
        there = dropped is not None and forward.shorten(dropped, None if soft else selected.exact)
        if not there and not soft:
            return hidden
        forward.move_up(leaving)
        if selected.kept.sizes is not None:
            merged(selected, forward)
        elif self.proportional is not None:
            self.proportional.resize(mean_stream(hidden, self.width), selected, forward)
        if there:
            hidden = rows_at(hidden, forward.pack(dropped))
        if forward.cache_state is None:
            self._hide_padding(forward)
        return hidden

    @staticmethod
    def _hide_padding(forward: Forward) -> None:
        """Hide padding and filler from the layers that follow, by a mask, or by the bias if keys carry one anyway.

        A mask of booleans, where there is one, becomes a float mask of seq x seq in every layer, which autograd keeps.
        """
        if forward.packed.key_bias is not None:
            forward.packed.key_bias = forward.packed.key_bias.masked_fill(~forward.packed.valid, HIDDEN)
        whole = forward.keys.slices is None
        count = forward.packed.columns.shape[1]
        forward.keys.enter(
            Span(forward.packed.valid, forward.packed.columns, count, forward.keys.start, forward.padded, whole)
        )

    def reads(self, stage: int) -> AttentionRows | None:
        """Attention rows that the pruner of a stage asked for."""
        return self.walk[stage].pruner.reads(self.walk[stage].index)

    def rows(self, forward: Forward, stage: int) -> tuple[Tensor, Tensor]:
        """Columns whose attention the pruner asked for at a stage, and which of them are real."""
        asked = self.reads(stage)
        if asked is None or asked.rows == "question":
            return selection.compact(forward.packed.text, forward.most_text)
        last = forward.packed.text.flip(1).long().cumsum(1).flip(1) == 1
        return selection.compact(
            forward.packed.text & last, None if forward.most_text is None else min(1, forward.most_text)
        )


def _per_row(hints: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Hints of each row: beams and several answers to one prompt repeat a sample."""
    return {name: hint.repeat_interleave(max(1, rows // len(hint)), 0) for name, hint in hints.items()}
