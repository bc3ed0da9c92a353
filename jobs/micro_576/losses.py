"""Forward and losses of pretraining: answers, what each patch shows, and the shape of the cloud of visual tokens.

The decoder learns from answers alone: no attention is ever supervised. Labels of patches teach the tower, through
linear read-outs that are thrown away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from jobs.micro_576.batches import FIRST_PATCH, NAMES, NONE, PATCH_CLASSES, PIXELS, PREFIX, Batch, tokenizer
from lit_prune.micro.model import EOS
from lit_prune.micro.model_576 import WIDTH

PATCH_WEIGHT = {"colour": 1.0, "shape": 1.5, "pattern": 1.0, "figure": 1.0, "figure_odd": 1.0, "dot": 0.7}
PATCH_WEIGHT |= {"direction": 1.0, "row": 0.4, "column": 0.4}
GROUND_WEIGHT = {"texture": 1.0, "ground": 0.7}
PLACE_WEIGHT = {"own_row": 0.3, "own_column": 0.3}
RARE = ("figure", "figure_odd", "dot", "direction")  # on few patches: those and all others weigh the same
PIXEL_WEIGHT = 1.0
LIKENESS, LENGTH = 0.2, 2.0  # mean cosine among an image's tokens, and root mean square of a token, that cost nothing


class PatchHeads(nn.Module):
    """Linear read-outs of the visual tokens at the decoder's input. Thrown away at the end.

    They make what a patch shows readable by a dictionary that the decoder never sees. Texture, ground and pixels of
    every patch are read out to the end of training, so that the tower can't map background to a single token.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in PATCH_CLASSES.items()})
        self.pixels = nn.Linear(WIDTH, PIXELS)
        self.words = nn.Parameter(torch.tensor([5.0, -2.0]))  # scale and bias of the words' presence

    def forward(self, visual: Tensor, labels: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Losses by name, and accuracies by label. visual float[batch, 576, d]."""
        tokens = self.norm(visual.float())
        on_object = labels["colour"] > 0
        objects, accuracy = tokens.new_zeros(()), {}
        for name, weight in PATCH_WEIGHT.items():
            logits, target = self.patch[name](tokens), labels[name]
            each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=NONE, reduction="none")
            counted = target > 0 if name in RARE else on_object
            if counted.any():
                objects = objects + weight * 0.5 * each[counted].mean()
            if name not in ("row", "column"):
                objects = objects + weight * 0.5 * each[~counted].mean()
            accuracy[name] = (logits.argmax(-1) == target)[counted].float().mean().item()
        ground = tokens.new_zeros(())
        for name, weight in (GROUND_WEIGHT | PLACE_WEIGHT).items():
            logits, target = self.patch[name](tokens), labels[name]
            ground = ground + weight * F.cross_entropy(logits.transpose(1, 2), target, ignore_index=NONE)
            accuracy[name] = (logits.argmax(-1) == target)[target != NONE].float().mean().item()
        pixels = PIXEL_WEIGHT * F.mse_loss(self.pixels(tokens), labels["pixels"]) / labels["pixels"].var()
        return {"objects": objects, "ground": ground, "pixels": pixels}, accuracy

    def presence(self, visual: Tensor, embeddings: Tensor, names: Tensor) -> Tensor:
        """Image-level likeness of words and tokens: the largest cosine to a word says whether the scene has it.

        Knows which words are true of an image, as a caption does, and no place; CLIP's towers come with as much.
        """
        cosine = F.normalize(visual.float(), dim=-1) @ F.normalize(embeddings[name_ids()].float(), dim=-1).T
        scale, bias = self.words
        return F.binary_cross_entropy_with_logits(scale * (cosine.amax(1) * 4 + bias), names)


def name_ids() -> list[int]:
    """Token ids of `NAMES`."""
    return tokenizer().convert_tokens_to_ids(list(NAMES))


def cloud_loss(visual: Tensor) -> dict[str, Tensor]:
    """Hinges on an image's tokens, whatever they show: a common direction, and a length beside which words vanish."""
    visual = visual.float()
    likeness = F.normalize(visual, dim=-1).mean(1).square().sum(-1)
    length = visual.square().mean(-1).sqrt()
    return {"alike": F.relu(likeness - LIKENESS).mean(), "long": F.relu((length / LENGTH).log()).mean()}


def see(model: LlavaForConditionalGeneration, pixels: Tensor, frozen: bool = False) -> Tensor:
    """Visual tokens as they enter the decoder, float[batch, 576, d]; a `frozen` tower gets no gradient."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        seen = model.model.vision_tower(pixels).last_hidden_state
    return model.model.multi_modal_projector(seen[:, 1:])


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Causal attention in the prefix, masked rows after it: half of the work of one full mask.

    In float32, without the autocast that would undo it: on CPUs the backward pass of this kernel takes three times as
    long in bfloat16.
    """
    query, key, value = query.float(), key.float(), value.float()
    options = {"scale": module.scaling, "dropout_p": 0.0}
    with torch.autocast("cpu", enabled=False):
        prefix = F.scaled_dot_product_attention(
            query[:, :, :PREFIX], key[:, :, :PREFIX], value[:, :, :PREFIX], is_causal=True, **options
        )
        text = F.scaled_dot_product_attention(query[:, :, PREFIX:], key, value, attn_mask=attention_mask, **options)
    return torch.cat([prefix, text], 2).transpose(1, 2).contiguous(), None


PACKED = "micro_576_packed"
AttentionInterface.register(PACKED, packed_attention)


def read(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor, attention: str = PACKED) -> Tensor:
    """Last hidden states float[batch, length, d] of the decoder over a packed batch, by this attention function."""
    decoder = model.model.language_model
    embeddings = model.get_input_embeddings()(batch.input_ids)
    embeddings = torch.cat([embeddings[:, :FIRST_PATCH], visual.to(embeddings.dtype), embeddings[:, PREFIX:]], 1)
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, attention
    try:
        return decoder(
            inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
    finally:
        decoder.config._attn_implementation = before


def answer_loss(model: LlavaForConditionalGeneration, hidden: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Cross entropy on the answers, and the share of answer tokens before the end whose best guess is right."""
    asked = labels != NONE
    logits, wanted = model.lm_head(hidden[asked]).float(), labels[asked]
    right = (logits.argmax(-1) == wanted)[wanted != EOS]
    return F.cross_entropy(logits, wanted), right.float().mean().item()


# Figures of the gates that training logs


@torch.no_grad()
def background_likeness(visual: Tensor, on_object: Tensor) -> float:
    """Mean cosine among an image's background tokens, over pairs of different ones."""
    found = []
    for tokens, objects in zip(F.normalize(visual.float(), dim=-1), on_object, strict=True):
        unit = tokens[~objects]
        count = len(unit)
        found.append(((unit.sum(0).square().sum() - count) / (count * (count - 1))).item())
    return sum(found) / len(found)


def auc(scores: Tensor, wanted: Tensor) -> float:
    """Probability that a wanted entry has a higher score than another; ties count half. Both of one dimension."""
    order = scores.sort().values.contiguous()
    ranks = (torch.searchsorted(order, scores) + torch.searchsorted(order, scores, right=True) + 1).double() / 2
    good, bad = int(wanted.sum()), int((~wanted).sum())
    return float((ranks[wanted].sum() - good * (good + 1) / 2) / (good * bad))
