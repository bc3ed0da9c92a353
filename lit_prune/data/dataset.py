"""Encode the samples of a source and collate batches, with bad samples replaced or left out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lit_prune.data import regions
from lit_prune.data.conversation import (
    IGNORED,
    TOKEN_KEYS,
    TooLong,
    encode_conversation,
    read_conversation,
)
from lit_prune.data.records import similar_keys
from lit_prune.data.samples import Fetched, Sample, Skipped
from lit_prune.data.sources import ImageFile, Source, sample_name
from lit_prune.errors import BadSample, LitPruneError, in_words
from lit_prune.files.images import MAX_PIXELS, decode_image, padded_to_square

Mode = Literal["train", "eval", "predict"]
MOST_REPLACEMENTS = 1000  # this many bad samples in a row are a broken data set
# Inputs that are no list of images: patches of all images in one strip (MiniCPM-V), beside the sizes that cut it up,
# and the numbers of the patches that a visual token pools, among those of all samples (Molmo 2).
STRIPS = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
NUMBERED = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
LONGEST_REASON = 500  # characters; an "image path" may be the image itself in base64


class InstructDataset(Dataset):
    """Records of a source with their images, encoded by the model's processor. Can be pickled.

    Args:
        source: see `open_source`.
        processor: see `encode`.
        max_length: most tokens a sample may have, or None.
        mode: "train" replaces a bad sample by the next good one of the source, so that batches keep their size; "eval"
            leaves it out; so does "predict", which needs no answers.
        max_pixels: see `decode_image`.
        too_long: see `encode`; in evaluation and prediction a sample that is too long is always left out.
        square: colour with which images are padded to a square; None leaves their shape.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        max_length: int | None = None,
        mode: Mode = "train",
        max_pixels: int = MAX_PIXELS,
        too_long: TooLong = "skip",
        square: tuple[int, int, int] | None = None,
    ):
        self.source, self.processor, self.square = source, processor, square
        self.too_long: TooLong = too_long if mode == "train" else "skip"
        self.max_length, self.mode, self.max_pixels = max_length, mode, max_pixels
        self.view: Callable[[Image.Image], Image.Image] | None = None  # changes each image, not its size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Encode a record.

        Raises:
            BadSample: the record or its images can't be read or encoded; names file and sample.
            LitPruneError: the source itself can't be read any more.
        """
        name: str | int = index
        try:
            record = self.source[index]
            name = sample_name(record, index)
            return self._encode(record, name, index)
        except BadSample as error:
            raise BadSample(self.source.file_of(index), name, _shortened(error.reason)) from error
        except LitPruneError:
            raise
        except BaseException as error:  # templates, tokenizers and processors raise anything on odd input
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's is no Exception
                raise
            raise BadSample(self.source.file_of(index), name, _shortened(in_words(error))) from error

    def __getitems__(self, indices: list[int]) -> Fetched:
        """Fetch the samples of an index batch; called by the data loader in place of `__getitem__`."""
        fetched = Fetched([], [])
        try:
            for index in indices:
                self._fetch(index, fetched)
        except LitPruneError as error:  # travels with the batch: raised in a worker it would arrive as a traceback
            fetched.failure = str(error)
        return fetched

    def _fetch(self, index: int, fetched: Fetched) -> None:
        tries = min(len(self), MOST_REPLACEMENTS) if self.mode == "train" else 1
        for offset in range(tries):
            record = (index + offset) % len(self)
            try:
                fetched.samples.append(self[record])
                fetched.replaced += offset > 0
                return
            except BadSample as error:
                fetched.skipped.append(Skipped(*error.args, record))
        if self.mode == "train":
            raise LitPruneError(f"{tries} bad samples in a row; the last: {error_text(fetched.skipped[-1])}")

    def _encode(self, record: dict, name: str | int, index: int) -> Sample:
        answered = self.mode != "predict"
        conversation = read_conversation(record, answered)
        images = [self._decode(image) for image in self.source.images(index, record)]
        weighted = self.mode == "train"  # in evaluation every answer is one to compare with
        encoded = encode_conversation(
            self.processor, conversation, images, self.max_length, self.too_long, weighted=weighted
        )
        cut = conversation.answers - len(encoded.ends) if answered else 0
        if cut:
            conversation = conversation.first(conversation.answers - cut)
        boxes, shown = regions.boxes_of(record), None
        if self.mode != "train" and record.get("boxes") is not None:
            shown = regions.sample_regions(self.processor, encoded.inputs, [image.size for image in images], boxes)
        return Sample(
            inputs=encoded.inputs,
            prompt=encoded.prompt,
            id=name,
            answer=conversation.answer,
            question=conversation.question,
            skill=_skill(record),
            boxes=boxes,
            record=index,
            cut=cut,
            file=self.source.file_of(index),
            unread=() if images else tuple(similar_keys(record)),
            regions=shown,
        )

    def _decode(self, image: ImageFile) -> Image.Image:
        with image.open() as file:
            decoded = decode_image(file, image.name, self.max_pixels)
        whole = decoded if self.square is None else padded_to_square(decoded, self.square)
        return whole if self.view is None else self.view(whole)


def _shortened(reason: str) -> str:
    """Shorten to at most 500 characters, from both ends."""
    half = LONGEST_REASON // 2 - 3
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:half]} ... {reason[-half:]}"


def _skill(record: dict) -> str | None:
    """Skill of a record, on one line; None if missing or NaN."""
    skill = record.get("skill")
    if skill is None or skill != skill:
        return None
    return " ".join(str(skill).split()) or None


class Collate:
    """Collate the samples of an index batch; see `InstructData` for the layout. Can be pickled.

    A sample that can't be batched with the others, for example because of its shapes, is a bad one. In training another
    sample of the batch replaces it. With `digests` the batch has one of each sample, of all that the model is given.
    """

    def __init__(self, pad_id: int, mode: Mode, digests: bool = False):
        self.digests = digests
        self.padding = {"input_ids": pad_id, "labels": IGNORED}  # anything else is padded with 0
        self.mode = mode

    def __call__(self, fetched: Fetched) -> dict[str, Any]:
        try:
            return self._batch(fetched)
        except Exception as error:
            return self._batch(self._without_misfits(fetched, error))

    def _without_misfits(self, fetched: Fetched, error: Exception) -> Fetched:
        """Keep the largest group of samples that can be batched, found one by one; the others are bad samples."""
        samples = fetched.samples
        fitting: list[Sample] = []
        for first in samples:
            group = self._grown([first], samples) if self._fits([first]) else []
            fitting = max(fitting, group, key=len)
            if len(fitting) > len(samples) // 2:
                break
        chosen = {id(sample) for sample in fitting}
        wrong = [sample for sample in samples if id(sample) not in chosen]
        reason = f"does not fit into a batch with the others: {_shortened(in_words(error))}"
        skipped = [Skipped(sample.file, sample.id, reason, sample.record) for sample in wrong]
        found = replace(fetched, samples=fitting, skipped=[*fetched.skipped, *skipped])
        if self.mode == "train" and fitting:
            found.samples = [fitting[number % len(fitting)] for number in range(len(samples))]
            found.replaced += len(wrong)
        elif self.mode == "train":
            found.failure = fetched.failure or f"no sample of a batch can be used; the last: {error_text(skipped[-1])}"
        return found

    def _grown(self, group: list[Sample], samples: list[Sample]) -> list[Sample]:
        for sample in samples:
            if sample is not group[0] and self._fits([*group, sample]):
                group = [*group, sample]
        return group

    def _fits(self, samples: list[Sample]) -> bool:
        try:
            self._batch(Fetched(samples, []))
        except Exception:  # any is why the whole batch failed
            return False
        return True

    def _batch(self, fetched: Fetched) -> dict[str, Any]:
        samples = fetched.samples
        batch: dict[str, Any] = {
            "inputs": self._inputs(samples),
            "ids": [s.id for s in samples],
            "answers": [s.answer for s in samples],
            "questions": [s.question for s in samples],
            "skills": [s.skill for s in samples],
            "boxes": [s.boxes for s in samples],
            "records": [s.record for s in samples],
            "sources": [s.source for s in samples],
            "skipped": fetched.skipped,
            "replaced": fetched.replaced,
            "cut": sum(s.cut for s in samples),
        }
        if self.digests:
            batch["digests"] = [s.digest() for s in samples]
        if fetched.failure:
            batch["failure"] = fetched.failure
        if fetched.place:
            batch["place"] = fetched.place
        if unread := {key: (sample.file, sample.id) for sample in samples for key in sample.unread}:
            batch["unread"] = unread
        if self.mode != "train":
            batch["prompts"] = self._prompts(samples, batch["inputs"])
            if hints := regions.joined([s.regions for s in samples]):
                batch["hints"] = hints
        return batch

    def _inputs(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Prompts with answers, padded on the right; pixel values of all images in sample order."""
        keys = dict.fromkeys(key for s in samples for key in s.inputs)  # a text has no pixel values
        return {key: self._join(key, [s.inputs for s in samples if key in s.inputs]) for key in keys}

    def _join(self, key: str, given: list[dict[str, Tensor]]) -> Tensor:
        values = [inputs[key] for inputs in given]
        if key in TOKEN_KEYS:
            return pad_sequence(values, batch_first=True, padding_value=self.padding.get(key, 0))
        if key in STRIPS and STRIPS[key] in given[0]:
            return torch.cat(values, dim=-1)
        if key in NUMBERED:
            values = renumbered(values, [inputs[NUMBERED[key]] for inputs in given])
        return concatenate(values)

    def _prompts(self, samples: list[Sample], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prompts alone, padded on the left; images are those of the inputs."""
        prompts = {key: value for key, value in inputs.items() if key not in TOKEN_KEYS}
        for key in TOKEN_KEYS:
            if key in inputs and key != "labels":
                values = [s.inputs[key][: s.prompt] for s in samples]
                fill = self.padding.get(key, 0)
                prompts[key] = pad_sequence(values, batch_first=True, padding_value=fill, padding_side="left")
        return prompts


def concatenate(values: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; other dimensions (images with fewer tiles) are zero-padded at the end."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    whole = values[0].new_zeros(sum(len(value) for value in values), *largest)
    row = 0
    for value in values:
        whole[(slice(row, row + len(value)), *(slice(size) for size in value.shape[1:]))] = value
        row += len(value)
    return whole


def renumbered(values: Sequence[Tensor], patches: Sequence[Tensor]) -> list[Tensor]:
    """Numbers of patches, counted through all samples; `patches` (crops, patches, ...) are each sample's; -1: none."""
    before = accumulate((part.shape[0] * part.shape[1] for part in patches), initial=0)
    return [torch.where(value < 0, value, value + count) for value, count in zip(values, before, strict=False)]


def pad_token(processor: Any) -> int:
    """Padding token: the tokenizer's padding token, else its end-of-sequence token, else 0."""
    tokenizer = processor.tokenizer
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def error_text(skipped: Skipped) -> str:
    """Describe a skipped sample."""
    return str(BadSample(skipped.file, skipped.sample, skipped.reason))
