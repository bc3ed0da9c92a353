"""An answer token by token, with the time to its first token."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from lit_prune.evaluation.measuring import now
from lit_prune.vlm import VLM


@dataclass(frozen=True)
class Progress:
    """An answer so far: its text, its tokens, and the seconds that it and its first token took."""

    text: str
    tokens: int
    first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole time, prefill included, as in `lit-prune bench`."""
        return self.tokens / self.seconds


class _Cancelled(Exception):
    """Nobody reads the answer any more."""


class _Streamer:
    """What `generate()` hands each token to, on the thread that it runs on."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Tensor, float] | BaseException | None] = SimpleQueue()
        self.cancelled, self._prompt = False, True

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, or the next token, on the CPU."""
        if self.cancelled:
            raise _Cancelled
        if not self._prompt:
            self.queue.put((value.reshape(-1), time.perf_counter()))
        self._prompt = False

    def end(self) -> None:
        """Take the end."""
        self.queue.put(None)


@torch.inference_mode()
def _generate(vlm: VLM, inputs: Mapping[str, Any], max_new_tokens: int, streamer: _Streamer) -> None:
    config = copy.copy(vlm.model.generation_config)
    config.update(max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None)
    try:
        vlm.model.generate(**inputs, generation_config=config, streamer=streamer)
    except BaseException as error:
        streamer.queue.put(error)


def stream(vlm: VLM, inputs: Mapping[str, Any], max_new_tokens: int) -> Iterator[Progress]:
    """The greedy answer to one prompt, as it grows; by what is attached, under the session that this is called in.

    Times start when the inputs are encoded and on the device: vision tower, prefill, decoding. Whoever stops reading
    stops the generation. Raises what `generate()` raises.
    """
    streamer, ids = _Streamer(), []
    start = now(vlm.model.device)
    worker = Thread(target=_generate, args=(vlm, inputs, max_new_tokens, streamer), daemon=True)
    worker.start()
    first: float | None = None
    try:
        while (item := streamer.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            token, moment = item
            first = moment - start if first is None else first
            ids.append(token)
            yield Progress(vlm.decode(torch.cat(ids)[None], 0)[0], len(ids), first, moment - start)
    finally:
        streamer.cancelled = True
        worker.join()
