"""Records of encoded samples, of skipped ones, and of an index batch."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Sample:
    """One encoded record.

    `prompt` is the number of tokens before the last answer, `record` its index in its source and `file` its file there,
    `source` the source's name in a mixture, `cut` the number of turns removed for length, `unread` its keys that look
    like images but are not read. `skill` is None if the record has none; `regions` are its boxes on the grid of its
    visual tokens, None without boxes or if the grid isn't known.
    """

    inputs: dict[str, Tensor]
    prompt: int
    id: str | int
    answer: str
    question: str
    skill: str | None
    boxes: list
    record: int
    cut: int = 0
    source: str = ""
    file: str = ""
    unread: tuple[str, ...] = ()
    regions: Tensor | None = None

    def digest(self) -> str:
        """SHA-256 of the encoded inputs."""
        found = hashlib.sha256()
        for name, value in sorted(self.inputs.items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


class Skipped(NamedTuple):
    """A bad sample. Its `record`, the index in its source, tells it apart: other samples may have the same id."""

    file: str
    sample: str | int
    reason: str
    record: int


@dataclass
class Fetched:
    """The result of one index batch.

    `replaced` counts replacements of bad samples, `failure` is the reason why a training batch could not be filled,
    `place` the position in a `Stream`.
    """

    samples: list[Sample]
    skipped: list[Skipped]
    replaced: int = 0
    failure: str | None = None
    place: tuple | None = None
