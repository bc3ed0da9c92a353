"""Figures of a model that boxes are needed for: they measure, and teach nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from jobs.micro_576.batches import FIRST_PATCH, NONE, PREFIX, Batch
from jobs.micro_576.losses import auc, packed_attention, read
from lit_prune.data.regions import regions
from lit_prune.micro.questions_576 import Question
from lit_prune.micro.scenes_576 import GRID, IMAGE_SIZE

ASKED = 0.3  # share of a patch that a box covers from which the patch is asked about


def well_covered(cover: Tensor) -> Tensor:
    """bool[..., 576]: the patches that each box covers by 0.3 or more; its best-covered ones if there are none."""
    return (cover > 0) & (cover >= cover.amax(-1, keepdim=True).clamp(max=ASKED))


def asked_patches(question: Question) -> Tensor:
    """bool[576]: the patches of what a question asks about."""
    return well_covered(regions(question.boxes, (GRID, GRID), (IMAGE_SIZE, IMAGE_SIZE))).any(0)


@torch.no_grad()
def word_auc(model: LlavaForConditionalGeneration, visual: Tensor, batch: Batch) -> list[float]:
    """For each question with boxes: how well its words' largest cosine finds the patches asked about, 0.5 by chance."""
    embeddings = F.normalize(model.get_input_embeddings().weight.float(), dim=-1)
    cosines = F.normalize(visual.float(), dim=-1) @ embeddings.T
    found = []
    for b, asked in enumerate(batch.questions):
        for number, question in enumerate(asked, 1):
            wanted = asked_patches(question)
            if not wanted.any() or wanted.all():
                continue
            own = batch.segments[b, PREFIX:] == number
            answer = int((batch.labels[b, PREFIX:][own] >= 0).sum()) - 1  # answer tokens among the question's
            tokens = batch.input_ids[b, PREFIX:][own]
            found.append(auc(cosines[b][:, tokens[: len(tokens) - answer]].amax(-1), wanted))
    return found


@torch.no_grad()
def attention_auc(model: LlavaForConditionalGeneration, visual: Tensor, batch: Batch) -> list[list[float]]:
    """For each layer and question with boxes: how well attention finds the patches asked about, 0.5 by chance.

    Attention is that of the last prompt token, mean over the heads. `batch` has one image.
    """
    wanted, rows = [], []
    for number, question in enumerate(batch.questions[0], 1):
        patches = asked_patches(question)
        if patches.any() and not patches.all():
            own = (batch.segments[0] == number) & (batch.labels[0] != NONE)
            wanted.append(patches)
            rows.append(int(own.nonzero()[0, 0]) - PREFIX)
    found: list[list[float]] = []

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs):
        scores = query[0, :, PREFIX:][:, rows] @ key[0].transpose(1, 2) * module.scaling
        weights = scores.masked_fill(~attention_mask[0, :, rows], float("-inf")).softmax(-1).mean(0)
        seen = weights[:, FIRST_PATCH:PREFIX]
        found.append([auc(row, patches) for row, patches in zip(seen, wanted, strict=True)])
        return packed_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("micro_576_watched", watched)
    read(model, batch, visual, "micro_576_watched")
    return found
