"""One batch of one method, measured: answers, states, lengths. Shared by validation, test and comparison."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_prune.cost.flops import decoder_total, kv_bytes, price
from lit_prune.evaluation.metrics import Consistency
from lit_prune.host import Record, Session
from lit_prune.host.parts import INPUTS, unwrap
from lit_prune.vlm import VLM

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


def encode_images(vlm: VLM, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with the images already through vision tower and projector, so that several forwards share that work.

    Pruned there, if the session that this is called under prunes with a method of the tower.
    """
    model = unwrap(vlm.model)
    encoded, rest = {}, dict(inputs)
    for modality, pixels in INPUTS.items():
        if inputs.get(pixels) is None:
            continue
        encode = getattr(model.base_model, f"get_{modality}_features")
        asked = {name: inputs[name] for name in inspect.signature(encode).parameters if inputs.get(name) is not None}
        asked[pixels] = rest.pop(pixels).to(model.dtype)
        with torch.no_grad():
            encoded[modality] = encode(**asked, return_dict=True)
    return {**rest, "mm_encoder_outputs": encoded} if encoded else inputs


@torch.no_grad()
def measure(vlm: VLM, batch: dict[str, Any], session: Session, max_new_tokens: int, together: bool = False) -> Measured:
    """Answer the prompts of a batch greedily and run its answers through the model, under one session.

    The states are those of the forward over prompt and right answer, on the positions that predict answer tokens, so
    that methods are compared on the same text. `together`: ranks answer for as long as any of them does.
    """
    states, prefill = Record(keep_hidden=True, keep_embeds=True), Record()
    with vlm.using(replace(session, record=prefill)):
        encoded = encode_images(vlm, batch["inputs"])
    with vlm.using(replace(session, record=states)):
        vlm.model(**encoded, use_cache=False)
    prompts = {**encoded, **batch["prompts"]}
    prompts = {k: v for k, v in prompts.items() if k in batch["prompts"] or k == "mm_encoder_outputs"}
    if "mm_encoder_outputs" in prompts:
        prompts = {name: value for name, value in prompts.items() if name not in INPUTS.values()}
    with vlm.using(replace(session, record=prefill)):
        limits = {"max_new_tokens": max_new_tokens, "do_sample": False}
        tokens = vlm.model.generate(**prompts, **limits, synced_gpus=together)
    pruned = vlm.plugin if session.prune else None
    repair = None if pruned is None or not session.repair else pruned.repair
    size = vlm.size
    parts = {} if size is None else price(prefill.trace, size, None if pruned is None else pruned.pruner, repair)
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
    )


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
