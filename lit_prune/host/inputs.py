"""Columns of a forward's inputs: which are real, visual, text, and which predict an answer."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.errors import LitPruneError
from lit_prune.host.cache import CACHE, padding
from lit_prune.host.compat import ENCODED
from lit_prune.host.lengths import Lengths
from lit_prune.host.parts import INPUTS, ModelParts
from lit_prune.host.pictures import join_tiles, sizes_of, split
from lit_prune.host.plans import Plans
from lit_prune.host.session import Session
from lit_prune.host.state import Attended, Forward, Packed


@dataclass(frozen=True)
class Visual:
    """Visual columns of a forward, `starts` of what is pruned as one image, and the rest per sample (batch,).

    `separate`: images and videos; `videos`: visual tokens of videos. `passed`: modalities that have pixels.
    """

    columns: Bool[Tensor, "batch columns"]
    starts: Bool[Tensor, "batch columns"]
    separate: Int[Tensor, " batch"]
    videos: Int[Tensor, " batch"]
    passed: list[str]


def begin(
    kwargs: dict, parts: ModelParts, session: Session, plans: Plans, real: Tensor | None, apart: bool = False
) -> Forward | None:
    """A Forward from the keyword arguments of a `*ForConditionalGeneration`, or None if there is nothing to do.

    `real`: which columns so far are no padding (batch, columns), those of `input_ids` last; None: all are. `apart`: the
    frames of a video are pruned as images are. Raises `LitPruneError` for pixels whose tokens the prompts don't have.
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        return None
    valid = torch.ones_like(ids, dtype=torch.bool) if real is None else real[:, -ids.shape[1] :].bool()
    step = ids.shape[1] == 1 and kwargs.get("labels") is None and session.record is None
    if step and not passed_modalities(kwargs, parts):
        return _step(session, valid)
    found = _visual(kwargs, ids, valid, parts, apart)
    visual, starts = found.columns, found.starts
    labels, known = kwargs.get("labels"), _prompt_length(kwargs, ids)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    answers = columns >= known if labels is None else labels != -100
    prompt = valid & (answers.long().cumsum(1) == 0)
    after_image = visual.flip(1).long().cumsum(1).flip(1) == 0
    text = prompt & ~visual & after_image
    total = visual.sum(1)
    answer_mask = _answer_mask(valid, visual, labels, ids.shape[1] - known + 1, kwargs.get("logits_to_keep", 0))
    # The one look at the device: everything that later layers need to know of lengths, at once.
    sums = (total, starts.sum(1), found.separate, valid.sum(1), text.sum(1), answer_mask.sum(1), found.videos)
    none = ([], [0], [], [], [0], [0], [])
    totals, images, separate, lengths, texts, predicting, videos = torch.stack(sums).tolist() if found.passed else none
    if session.prune:
        _check_placed(found.passed, sum(totals), sum(videos), parts)
    record = session.record if session.record is not None and not session.record.begun else None
    if record is not None:
        record.begun, record.trace.total_visual = True, total
        if session.prune and any(totals):
            record.trace.budget = torch.tensor([plans.asked(n) for n in totals], dtype=torch.float64)
    forward = Forward(
        session=session,
        record=record,
        packed=Packed(columns, valid, visual, text, answer_mask, (visual.long().cumsum(1) - 1).clamp(min=0)),
        keys=Attended(start=None if real is None else padding(real)),
        seed=_seed(ids, prompt & ~visual),
        total=total,
        pictured=total > 0,
        length=ids.shape[1],
        counts=plans.counts(totals, separate) if session.prune and any(totals) else {},
    )
    if found.passed:
        forward.videos = found.videos if any(videos) else None
        forward.grid, forward.most_text = max(totals), max(texts)
        forward.most_answers, forward.all_answers = max(predicting), sum(predicting)
        forward.lengths = Lengths(totals, lengths)
    elif ids.shape[1] == 1:
        forward.most_answers = 1
    if max(images) > 1:
        forward.packed.image = (starts.long().cumsum(1) - 1).clamp(min=0)
        forward.sizes = total.new_zeros(len(images), max(images)).scatter_add(1, forward.packed.image, visual.long())
    return forward


def _step(session: Session, valid: Tensor) -> Forward:
    """The same, in few operations, for one text token per sample, which predicts an answer's."""
    none, place = torch.zeros_like(valid), torch.zeros_like(valid, dtype=torch.long)
    packed = Packed(place, valid, none, none, valid, place)
    rows, pictured = place[:, 0], none[:, 0]
    return Forward(session, packed, Attended(), seed=rows, total=rows, pictured=pictured, length=1, most_answers=1)


def _visual(kwargs: dict, ids: Tensor, valid: Tensor, parts: ModelParts, apart: bool) -> Visual:
    """The visual columns.

    By what is passed, not by ids alone: a decoding step may feed back a generated token with the image token's id.
    An image is a run of its tokens; where all images have one length, a run may hold several. `pictures.py` joins what
    text separates: the frames of a video, the rows and tiles of an image.
    """
    visual = starts = torch.zeros_like(valid)
    separate = videos = visual.sum(1)
    passed = passed_modalities(kwargs, parts)
    for modality in passed:
        mine = (ids == parts.tokens[modality]) & valid & ~visual
        if len(passed) > 1 and len(set(parts.tokens.values())) == 1:
            mine = mine & (_in_videos(ids, parts) ^ (modality == "image"))
        begins, number = split(mine, sizes_of(kwargs, modality, parts.ended_rows), modality == "video", apart)
        if modality == "image" and parts.named_tiles:
            begins = join_tiles(ids, begins)
            number = begins.sum(1)
        visual, starts, separate = visual | mine, starts | begins, separate + number
        videos = mine.sum(1) if modality == "video" else videos
    if passed and parts.image_length is not None:
        place = visual.long().cumsum(1) - 1
        inside = place - (place * starts).cummax(1).values
        starts = starts | (visual & (inside % parts.image_length == 0))
        separate = starts.sum(1)
    return Visual(visual, starts, separate, videos, passed)


def _in_videos(ids: Tensor, parts: ModelParts) -> Tensor:
    """Columns between the marks of a video."""
    if parts.video_marks is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    begun, ended = ((ids == mark).long().cumsum(1) for mark in parts.video_marks)
    return begun > ended


def _check_placed(passed: list[str], total: int, videos: int, parts: ModelParts) -> None:
    """Raise `LitPruneError` if pixels are passed and no token of the prompts stands for them."""
    placed = {"image": total - videos, "video": videos}
    for modality in passed:
        if not placed[modality]:
            raise LitPruneError(
                f"the model is handed {modality}s, and no token of its prompts stands for them (id "
                f"{parts.tokens[modality]}), so that nothing would be pruned: detach to run it as it is"
            )


def passed_modalities(kwargs: dict, parts: ModelParts) -> list[str]:
    """Modalities among `parts.tokens` of which keyword arguments carry pixels, or what the tower made of them."""
    encoded = kwargs.get(ENCODED) or {}
    given = {m for m, names in INPUTS.items() if any(kwargs.get(name) is not None for name in names)}
    return [m for m in parts.tokens if m in given or encoded.get(m) is not None]


def _prompt_length(kwargs: dict, ids: Tensor) -> int:
    """Columns of the prompt: all, except where `generate(use_cache=False)` feeds prompt and answer so far again.

    The prompt is remembered on the encoded image, which lives as long as that call to `generate()`.
    """
    encoded = next((out for out in (kwargs.get(ENCODED) or {}).values() if out is not None), None)
    if encoded is None or kwargs.get("use_cache") is not False or kwargs.get("labels") is not None:
        return ids.shape[1]
    prompt = getattr(encoded, CACHE, None)
    if prompt is None or not torch.equal(prompt, ids[:, : prompt.shape[1]]):
        prompt = ids
        setattr(encoded, CACHE, prompt)
    return prompt.shape[1]


def _answer_mask(
    valid: Tensor, visual: Tensor, labels: Tensor | None, last: int, logits_to_keep: int | Tensor
) -> Tensor:
    """Positions that predict answer tokens: before each label, else the `last` real columns.

    Without labels that is the prompt's last column, and what was answered since; assisted decoding asks for the logits
    of all its candidates, which follow an answer's start, so as many columns are repaired. A label right behind an
    image has none: the visual token that would predict it may be dropped.
    """
    if labels is not None:
        return pad(labels[:, 1:] != -100, (0, 1)) & valid & ~visual
    count = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > last else last
    from_end = valid.flip(1).long().cumsum(1).flip(1)
    return valid & (from_end <= count)


def _seed(ids: Tensor, prompt: Tensor) -> Tensor:
    """A number per sample from its prompt's text ids and their order: the same alone, in a batch, padded or not."""
    place = prompt.long().cumsum(1)
    mixed = (ids.long() * 1000003 + place * 8191) % 2147483647
    return (mixed * prompt * (place % 251 + 1)).sum(1) % 2147483647
