"""Sessions: a caller's settings for its forwards, and what they record for it."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lit_prune.cost.trace import Trace
from lit_prune.host.idle import Prefix
from lit_prune.ops.moments import SampleMoments


@dataclass(frozen=True)
class StageRecord:
    """A stage's outcome on the image's own grid of N tokens, for losses and pictures.

    `kept` is cumulative, `gate` too; `scores` are those of the tokens then alive (-inf elsewhere). Gate and scores
    carry gradients in training. `count` are the tokens that the budget plans for each sample.
    """

    layer: int
    kept: Tensor
    gate: Tensor
    scores: Tensor | None
    count: Tensor | None = None


@dataclass(frozen=True)
class Entering:
    """States at a decoder layer's input, all columns of them, and where each sample's visual tokens stand there."""

    states: Tensor
    columns: Tensor
    real: Tensor


@dataclass
class Record:
    """Collects what the first forward inside a session did (of `generate`, the prefill); the caller owns it.

    `hidden[layer]` is (answer positions, width) after the layer, repaired where it is, row by row over the batch; of
    all layers with `keep_hidden=True`, else of those that it names. `targets` are the tokens that these positions are
    to predict, where labels were given and the session is `answers_only`; `answers` their number in each sample.
    `per_sample[layer]`, where they stand for `hidden`, are the moments of each sample's answer positions.
    `attention[layer]`, of watched layers, is (batch, N): mean over heads and question tokens. `entering[layer]`, of
    layers that the session derives by, are the states that gradients can be taken by; `saliency[layer]`, (batch, N), is
    what a caller made of these. With `keep_embeds`, `embeds` (batch, N, width) are the visual tokens as they enter the
    decoder. `memory` is what stages inside the vision tower left in `VisionContext.memory`.
    """

    keep_hidden: bool | frozenset[int] = False
    keep_embeds: bool = False
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    entering: dict[int, Entering] = field(default_factory=dict)
    saliency: dict[int, Tensor] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    embeds: Tensor | None = None
    targets: Tensor | None = None
    answers: Tensor | None = None
    per_sample: dict[int, SampleMoments] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    begun: bool = False

    def keeps(self, layer: int) -> bool:
        """True if the answer states behind a layer are wanted."""
        return self.keep_hidden if isinstance(self.keep_hidden, bool) else layer in self.keep_hidden


@dataclass(frozen=True)
class Awaited:
    """Who waits for the embeddings of a forward: a method (`packed`), a caller's record (`recorded`)."""

    packed: bool
    recorded: bool


@dataclass(frozen=True)
class Session:
    """Settings of the forwards inside `host.using(...)`.

    `adapt`: LoRA adapters act, where tokens are pruned too; the plain model never has them.
    `soft` masks instead of dropping: the sequence keeps its length and gradients reach dropped tokens too. With
    `backward`: soft mode, rows that gradients return through: `all`, or those `kept` alone, the others running without
    autograd, see `lit_prune.host.beside`. With
    `contenders` only the best `contenders` times as many tokens as are kept stay in the sequence; the rest is dropped.
    `gate_clip` bounds the norm of the gradient that each sample's gate gets at each stage: the derivative of putting a
    dropped token back is unbounded, since it stands against the few tokens that were kept.
    `gate_centre` subtracts from that gradient, and from the repair adapter's, its mean over the sample's tokens at the
    stage, weighed by `Kept.slope`: what it says about their number. Gates in a `record` aren't affected.
    `watch` names decoder layers whose attention from the question to the visual tokens is recorded. `derive` names
    decoder layers whose input states are recorded for gradients: autograd's graph begins at the first of them.
    `answers_only`: the model gives logits of the positions that predict answer tokens alone, (1, answer positions,
    vocabulary) row by row over the batch, and no loss. `pack`: samples share rows in the decoder's layers, see
    `lit_prune.host.packing`; without a cache only. `prefix`: states to leave or to start from. `stop`: decoder
    layers from here on idle, so that nothing behind them means anything. Both without a cache only.
    """

    prune: bool = True
    repair: bool = True
    adapt: bool = True
    soft: bool = False
    contenders: float | None = None
    backward: Literal["all", "kept"] = "all"
    gate_clip: float | None = None
    gate_centre: bool = False
    eps: float = 1e-8
    hints: dict[str, Tensor] = field(default_factory=dict)
    record: Record | None = None
    watch: tuple[int, ...] = ()
    derive: tuple[int, ...] = ()
    answers_only: bool = False
    pack: bool = False
    prefix: Prefix | None = None
    stop: int | None = None

    @property
    def leaves_out(self) -> bool:
        """True if some layers may idle."""
        return self.prefix is not None or self.stop is not None

    def idle(self, layer: int) -> bool:
        """True if a decoder layer's work is left out."""
        started = self.prefix is not None and self.prefix.states is not None
        return (started and layer < self.prefix.layer) or (self.stop is not None and layer >= self.stop)
