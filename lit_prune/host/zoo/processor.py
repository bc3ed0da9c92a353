"""A processor for a tiny model: words of its small vocabulary, and noise for each image."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast

from lit_prune.host.zoo.inputs import PAD, image_token, marker, prompts, visual_tokens
from lit_prune.host.zoo.pixels import GRIDS, pixels_of
from lit_prune.host.zoo.shrink import VOCABULARY

WORDS = ("user", "assistant", "what", "is", "it", "?", "a", "b")
END, UNKNOWN, FIRST = 1, 2, 3  # ids: of the token that closes a turn, of other words, of the first of `WORDS`
IMAGE = "<image>"


class NoiseProcessor:
    """Text and images for a tiny model of the zoo, in the form of transformers' processors.

    An image's noise and size depend on the size of the picture it stands for, so that images differ. Text that isn't of
    `WORDS` is unknown. Every other id of the vocabulary has a word too, for what the model answers.
    """

    chat_template = "turns of words"  # for those who ask whether there is one; see `apply_chat_template`
    image_token = IMAGE

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.image_token_id = image_token(model.config)
        self.ends = [[int(end) for end in marker(model.config, which)] for which in ("start", "end")]
        self.image_token_ids = [self.image_token_id, *self.ends[0], *self.ends[1]]
        self.pixels, self.extra = pixels_of(kind, model), prompts(kind, model).extra
        self.lengths = [visual_tokens(kind, model, self.pixels([image], [1])) for image in range(len(GRIDS))]
        self.tokenizer = _tokenizer(self.image_token_id)

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = False, **_: Any) -> str:
        """Role, parts and an end for each turn."""
        turns = []
        for message in messages:
            # A word behind each image: classes without a token there would take two images for one.
            parts = (f"{IMAGE} it" if part["type"] == "image" else part["text"] for part in message["content"])
            turns += [message["role"], *parts, *(["</s>"] if message["role"] == "assistant" else [])]
        return " ".join([*turns, *(["assistant"] if add_generation_prompt else [])])

    def __call__(self, text: Sequence[str], images: Any = None, padding_side: str = "right", **_: Any) -> BatchFeature:
        """Ids with a run of image tokens for each image, and its noise; `images` flat, or a list for each text."""
        each = [image for entry in images or () for image in (entry if isinstance(entry, list) else [entry])]
        numbers, counts = [_number(image) for image in each], [one.count(IMAGE) for one in text]
        rows, left = [], iter(numbers)
        for one in text:
            ids: list[int] = []
            for token in self.tokenizer(one)["input_ids"]:
                ids += self._image(next(left)) if token == self.image_token_id else [token]
            rows.append(torch.tensor(ids))
        masks = [torch.ones_like(row) for row in rows]
        ids, mask = (pad_sequence(part, True, PAD, padding_side) for part in (rows, masks))
        found = {"input_ids": ids, "attention_mask": mask, **self.extra(ids, mask)}
        if numbers:
            found |= self.pixels(numbers, counts)
        return BatchFeature(found)

    def _image(self, number: int) -> list[int]:
        return [*self.ends[0], *[self.image_token_id] * self.lengths[number], *self.ends[1]]

    def batch_decode(self, sequences: Tensor, **options: Any) -> list[str]:
        """Words of generated ids."""
        return self.tokenizer.batch_decode(sequences, **options)


def _number(image: Image.Image) -> int:
    return sum(image.size) // 8 % len(GRIDS)


def _tokenizer(image: int) -> PreTrainedTokenizerFast:
    """Words separated by spaces."""
    named = {PAD: "<pad>", END: "</s>", UNKNOWN: "<unk>", image: IMAGE}
    named |= {FIRST + place: word for place, word in enumerate(WORDS)}
    vocabulary = {named.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
