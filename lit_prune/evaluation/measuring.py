"""One batch of one method, measured: answers, states, lengths. Shared by validation, test and comparison."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_prune.cost.flops import decoder_total, kv_bytes, price
from lit_prune.evaluation.metrics import Consistency
from lit_prune.host import Record, Session
from lit_prune.host.parts import INPUTS
from lit_prune.pruners.base import UNPRUNED
from lit_prune.vlm import VLM

IGNORED = -100  # the label of a position that predicts no answer token, as in PyTorch
TEACHER = Session(prune=False, repair=False)


@dataclass
class Measured:
    """What one method did with a batch: texts, states on answer positions, and its costs per sample."""

    texts: list[str]
    hidden: dict[int, Tensor]
    visual: Tensor  # visual tokens averaged over the decoder layers' inputs
    flops: Tensor | None  # decoder prefill with all that pruning adds; None: the model's arithmetic isn't known
    parts: dict[str, Tensor]  # FLOPs part by part, as far as they are known
    kv_bytes: Tensor | None
    stages: dict[int, Tensor]  # {pruning layer: (batch, N)} visual tokens still there after that stage
    per_layer: Tensor  # (decoder layers, batch) visual tokens at each layer's input
    total: Tensor  # visual tokens of the prompt
    embeds: Tensor  # (batch, N, width) visual tokens as they enter the decoder; where the tower dropped one, anything
    logits: Tensor | None = None  # (answer positions, vocabulary), row by row over the batch; if asked for
    positions: Tensor | None = None  # (batch,) how many of them each sample has
    seconds: float = 0.0  # wall-clock time of generating the whole batch's answers from encoded images

    @property
    def kept(self) -> dict[int, Tensor]:
        """Visual tokens kept at each stage."""
        return {layer: there.sum(1) for layer, there in self.stages.items()}

    @property
    def last(self) -> Tensor | None:
        """Visual tokens, (batch, N), still there after the last stage; None: nothing was dropped."""
        return self.stages[max(self.stages)].bool() if self.stages else None

    def first(self, count: int) -> "Measured":
        """Of the first samples alone; any after them have no answer positions."""
        names = ("texts", "visual", "flops", "kv_bytes", "total", "embeds")
        rows = {name: value[:count] for name in names if (value := getattr(self, name)) is not None}
        parts = {name: flops[:count] for name, flops in self.parts.items()}
        stages = {layer: there[:count] for layer, there in self.stages.items()}
        return replace(self, **rows, parts=parts, stages=stages, per_layer=self.per_layer[:, :count])


@torch.no_grad()
def measure(
    vlm: VLM,
    batch: dict[str, Any],
    session: Session,
    max_new_tokens: int,
    together: bool = False,
    keep_logits: bool = False,
    plain: dict[str, Any] | None = None,
) -> Measured:
    """Answer the prompts of a batch greedily and run its answers through the model, under one session.

    The states are those of the forward over prompt and right answer, on the positions that predict answer tokens, so
    that methods are compared on the same text. `together`: ranks answer for as long as any of them does. `keep_logits`:
    the logits of those positions too. `plain`: the batch's inputs with the plain model's image features, for methods
    that don't prune inside the vision tower.
    """
    states, prefill = Record(keep_hidden=True, keep_embeds=True), Record()
    with vlm.using(replace(session, record=prefill)):
        encoded = vlm.encode_images(batch["inputs"], plain)
    with vlm.using(replace(session, record=states)):
        output = vlm.model(**encoded, use_cache=False)
    logits, positions = _answer_logits(output.logits, encoded["labels"]) if keep_logits else (None, None)
    del output
    prompts = {**encoded, **batch["prompts"]}
    prompts = {k: v for k, v in prompts.items() if k in batch["prompts"] or k == "mm_encoder_outputs"}
    if "mm_encoder_outputs" in prompts:
        prompts = {name: value for name, value in prompts.items() if name not in INPUTS.values()}
    with vlm.using(replace(session, record=prefill)):
        limits = {"max_new_tokens": max_new_tokens, "do_sample": False}
        start = now(vlm.model.device)
        tokens = vlm.model.generate(**prompts, **limits, synced_gpus=together)
        seconds = now(vlm.model.device) - start
    method = vlm.plugin.pruner if session.prune else UNPRUNED
    repair = vlm.plugin.repair if session.prune and session.repair else None
    size = vlm.size
    parts = {} if size is None else price(prefill.trace, size, method, repair)
    return Measured(
        texts=vlm.decode(tokens, batch["prompts"]["input_ids"].shape[1]),
        hidden=states.hidden,
        visual=prefill.trace.average_visual(),
        flops=None if size is None else decoder_total(parts),
        parts=parts,
        kv_bytes=None if size is None else kv_bytes(prefill.trace, size, vlm.model.dtype.itemsize),
        stages={stage.layer: stage.kept for stage in prefill.stages},
        per_layer=torch.stack(prefill.trace.visual),
        total=prefill.trace.total_visual,
        embeds=states.embeds,
        logits=logits,
        positions=positions,
        seconds=seconds,
    )


def now(device: torch.device) -> float:
    """Wall-clock seconds once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _answer_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Logits of the positions that predict answer tokens, row by row, and how many each row has.

    None of a model whose logits don't stand for the tokens of the prompt one by one.
    """
    if logits.shape[:2] != labels.shape:
        return None, None
    predicting = labels[:, 1:] != IGNORED
    return logits[:, :-1][predicting], predicting.sum(1)


def divergences(measured: Measured, teacher: Measured) -> list[float | None]:
    """KL(teacher || method) of the next-token distributions, nats, averaged over each sample's answer positions.

    Both see the same prefix, the prompt and the right answer. None for a sample without such positions, or where there
    are no logits.
    """
    if measured.logits is None or teacher.logits is None:
        return [None] * len(measured.texts)
    student, full = (each.logits.float().log_softmax(-1) for each in (measured, teacher))
    values = (full.exp() * (full - student)).sum(-1).clamp(min=0)
    samples = values.split(teacher.positions.tolist())
    return [each.mean().item() if len(each) else None for each in samples]


def confidences(measured: Measured) -> list[float | None]:
    """Probability of the first token that each sample's answer begins with, in [0, 1]: the most likely one, greedily.

    None for a sample without answer positions, or where there are no logits.
    """
    if measured.logits is None:
        return [None] * len(measured.texts)
    counts = measured.positions.tolist()
    starts = [sum(counts[:row]) for row in range(len(counts))]
    known = [row for row, count in enumerate(counts) if count]
    first = measured.logits[[starts[row] for row in known]].float().softmax(-1).amax(-1).tolist()
    found = dict(zip(known, first, strict=True))
    return [found.get(row) for row in range(len(counts))]


def add_consistency(metric: Consistency, measured: Measured, teacher: Measured) -> None:
    """Add a batch to kappa: the plain model's visual tokens, and those that the method left to the last layers.

    Both as they enter the decoder: what a method did to them in the vision tower counts, such as merging.
    """
    real = torch.arange(teacher.embeds.shape[1], device=teacher.total.device) < teacher.total[:, None]
    metric.update(teacher.embeds, real if measured.last is None else measured.last & real, real, measured.embeds)


def matches(texts: list[str], answers: list[str]) -> list[bool]:
    """Exact match after lower-casing and stripping spaces and a final full stop."""
    return [_plain(text) == _plain(answer) for text, answer in zip(texts, answers, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
