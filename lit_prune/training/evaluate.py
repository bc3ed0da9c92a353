"""Evaluate one batch: the student against the teacher, and answers to prompts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_prune.evaluation import measuring
from lit_prune.evaluation.measuring import Measured
from lit_prune.host import Record, Session
from lit_prune.training.blank import has_image, with_blank
from lit_prune.vlm import VLM


@dataclass(frozen=True)
class Compared:
    """Student and teacher over one batch, and the student's answer states without repair (None: no repair adapter)."""

    student: Measured
    teacher: Measured
    unrepaired: dict[int, Tensor] | None


def compare_batch(vlm: VLM, batch: dict[str, Any], max_new_tokens: int, in_step: bool) -> Compared | None:
    """Measure the student, with and without repair, and the teacher; None for a batch without samples.

    Args:
        vlm: the model with a plug-in attached.
        batch: of a data module.
        max_new_tokens: longest answer.
        in_step: all ranks must run the same modules, so a batch without images gets a dummy image.
    """
    count = len(batch["ids"])
    if in_step and not has_image(batch):
        batch = with_blank(batch, vlm)
    elif not count:
        return None
    hints = batch.get("hints", {})
    with vlm.using(measuring.TEACHER):
        plain = vlm.encode_images(batch["inputs"])
    teacher, student = (
        measuring.measure(vlm, batch, session, max_new_tokens, in_step, plain=plain).first(count)
        for session in (measuring.TEACHER, Session(hints=hints))
    )
    unrepaired = None
    if vlm.plugin.repair is not None:
        bare = Record(keep_hidden=True)
        with vlm.using(Session(repair=False, hints=hints, record=bare)):
            vlm.model(**vlm.encode_images(batch["inputs"], plain), use_cache=False)
        unrepaired = bare.hidden
    return Compared(student, teacher, unrepaired) if count else None


def answer_batch(vlm: VLM, batch: dict[str, Any], max_new_tokens: int, in_step: bool) -> list[dict[str, str | None]]:
    """Answer a batch of prompts; each entry has the id, the answer, the question and the reference answer, if any.

    Arguments as those of `compare_batch`.
    """
    if in_step and not has_image(batch):
        batch = with_blank(batch, vlm)
    elif not batch["ids"]:
        return []
    limits = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with vlm.using(Session(hints=batch.get("hints", {}))):
        tokens = vlm.model.generate(**batch["prompts"], **limits, synced_gpus=in_step)
    texts = vlm.decode(tokens, batch["prompts"]["input_ids"].shape[1])
    # Not strict: a dummy sample has a text but no id.
    samples = zip(batch["ids"], texts, batch["questions"], batch["answers"], strict=False)
    keys = ("id", "answer", "question", "reference")
    return [dict(zip(keys, (str(i), text, asked, known or None), strict=True)) for i, text, asked, known in samples]
