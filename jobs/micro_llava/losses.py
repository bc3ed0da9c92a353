"""Forward and losses of pretraining: answers, patch labels, late attention grounding, and the word leak."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from jobs.micro_llava.batches import FIRST_PATCH, NONE, PREFIX, Batch
from lit_prune.micro.drawing import COLOURS, SHAPES
from lit_prune.micro.model import WIDTH, build_tokenizer
from lit_prune.micro.world import GRID

# Which heads of which decoder layer learn where to look. Nothing before layer 5: pruners act at layers 1 to 5 and must
# not find the answer in the attention there; everything is read by layer 8, so that few visual tokens are needed later.
GROUNDING = {"words": (5, (0, 1)), "phrases": (6, (0, 1)), "count": (7, (0,)), "answer": (8, (0,))}
MORE_GROUNDING = {"phrases": (7, (1,))}  # once more, to read what the objects are after layer 6 found where they are
SUPERVISED_LAYERS = (5, 6, 7, 8)
PATCH_CLASSES = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "digit": 11,
    "anchor": 2,
    "row": GRID - 1,
    "column": GRID - 1,
}
PATCH_WEIGHT = {"colour": 1.0, "shape": 1.5, "digit": 1.5, "anchor": 0.5, "row": 0.5, "column": 0.5}
OBJECT_SHARE = 0.5  # weight of the patches on objects; the background, four times as many, takes the rest
_IDS = build_tokenizer().convert_tokens_to_ids
NAMES = _IDS([*COLOURS, *SHAPES])


class PatchHeads(nn.Module):
    """Linear read-outs of the visual tokens at the decoder's input, and of the class token. Thrown away at the end.

    They take the place of an alignment with the word embeddings, which no real LLaVA has: what a patch shows becomes
    readable, but by a dictionary that the decoder never sees.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in PATCH_CLASSES.items()})
        self.present = nn.Linear(WIDTH, len(COLOURS) + len(SHAPES))

    def forward(self, tokens: Tensor, pooled: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and the accuracy on objects by label. tokens float[batch, 144, d], pooled float[batch, d]."""
        tokens = self.norm(tokens)
        loss = 0.5 * F.binary_cross_entropy_with_logits(self.present(pooled), labels["present"])
        on_object = labels["colour"] > 0
        accuracy = {}
        for name, head in self.patch.items():
            logits, target = head(tokens), labels[name]
            each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=NONE, reduction="none")
            on, off = each[on_object].mean(), each[~on_object].mean()
            loss = loss + PATCH_WEIGHT[name] * (OBJECT_SHARE * on + (1 - OBJECT_SHARE) * off)
            counted = on_object & (target > 0) if name == "digit" else on_object
            accuracy[name] = (logits.argmax(-1) == target)[counted].float().mean().item()
        return loss, accuracy


def _tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, tap=None, **kwargs):
    """The library's attention; with `tap` it also stores the query and key of the layers that are keys of `tap`."""
    if tap is not None and module.layer_idx in tap:
        tap[module.layer_idx] = (query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("micro_tapped", _tapped_attention)


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Visual tokens as they enter the decoder, float[batch, 144, d], and the pooled class token, float[batch, d]."""
    seen = model.model.vision_tower(pixels)
    return model.model.multi_modal_projector(seen.last_hidden_state[:, 1:]), seen.pooler_output


def read(
    model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor, tap: dict | None = None, **kwargs
) -> Tensor:
    """Last hidden states float[batch, length, d] of the decoder over a packed batch."""
    embeddings = model.get_input_embeddings()(batch.input_ids)
    embeddings = torch.cat([embeddings[:, :FIRST_PATCH], visual, embeddings[:, PREFIX:]], 1)
    mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min)
    model.model.language_model.config._attn_implementation = "micro_tapped"
    return model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=batch.positions,
        use_cache=False,
        tap=tap,
        **kwargs,
    ).last_hidden_state


def answer_loss(model: LlavaForConditionalGeneration, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy on the answers, and bool[answer positions]: whether the best token is the right one."""
    asked = labels != NONE
    logits = model.lm_head(hidden[asked])
    return F.cross_entropy(logits, labels[asked]), logits.argmax(-1) == labels[asked]


def attention_rows(query: Tensor, key: Tensor, mask: Tensor, heads: tuple[int, ...]) -> Tensor:
    """log softmax of q k^T over all allowed columns, float[batch, heads, length, PREFIX]."""
    heads = list(heads)
    logits = query[:, heads] @ key[:, heads].transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask, float("-inf"))
    return logits[..., :PREFIX] - logits.logsumexp(-1, keepdim=True)


def grounding_loss(batch: Batch, tap: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Per kind of row: minus the log of the attention mass on the target; for counts the full cross entropy."""
    losses = {}
    for extra, table in enumerate((GROUNDING, MORE_GROUNDING)):
        for name, (layer, heads) in table.items():
            rows = attention_rows(*tap[layer], batch.mask, heads)
            b, position, target = batch.rows[name]
            found = rows[b, :, position].clamp(min=-30)  # float[rows, heads, PREFIX]
            if name == "count":
                loss = -(target[:, None] * found).sum(-1).mean()
            else:
                loss = -(found + torch.where(target > 0, 0.0, float("-inf"))[:, None]).logsumexp(-1).mean()
            losses[name + "+" * extra] = loss
    return losses


def word_leak(visual: Tensor, embeddings: Tensor, patches: dict[str, Tensor]) -> Tensor:
    """Mean squared correlation, over a batch's patches, of cosines (visual token, word) with what the patches show.

    Zero when the cosine at the decoder's input says nothing about which word names a patch, nor (for any word) about
    whether there is an object at all. Scale free, so that making all cosines small does not satisfy it.
    """
    cosine = F.normalize(visual.flatten(0, 1), dim=-1) @ F.normalize(embeddings, dim=-1).T  # patches x words
    colour, shape = patches["colour"].flatten(), patches["shape"].flatten()
    named = torch.cat([F.one_hot(colour, len(COLOURS) + 1)[:, 1:], F.one_hot(shape, len(SHAPES) + 1)[:, 1:]], 1).float()
    is_object = (colour > 0).float()[:, None]
    return _correlation(cosine[:, NAMES], named).square().mean() + _correlation(cosine, is_object).square().mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0) + 1e-12).sqrt()


@torch.no_grad()
def asked_recall(scores: Tensor, asked: Tensor, keep: int = 8) -> float:
    """Mean share of min(keep, asked) patches asked about that are among the `keep` best. Both [questions, 144]."""
    best = torch.zeros_like(asked).scatter_(1, scores.topk(keep, 1).indices, True)
    counted = asked.any(1)
    found = (best & asked).sum(1)[counted] / asked.sum(1)[counted].clamp(max=keep)
    return found.float().mean().item()
