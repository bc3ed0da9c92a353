"""Parts that both pretraining recipes use: packed questions, batches made ahead, optimizers, the learning rate."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.micro.model import PAD

NONE = -100  # label that counts nowhere


def pack(prefix: list[int], texts: list[list[tuple[list[int], list[int]]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, position ids, segments and labels, each int[batch, length], of images with all their questions.

    The questions of an image follow its `prefix` one after the other, each numbered from the prefix on. Segments are 0
    in the prefix, 1, 2, ... in the questions, -1 in padding.

    Args:
        prefix: token ids that every image begins with, its visual tokens among them.
        texts: of each image, (prompt, answer) of each question, as token ids.
    """
    first = len(prefix)
    length = first + max(sum(len(p) + len(a) - 1 for p, a in image) for image in texts)
    shape = (len(texts), length)
    ids, positions = np.full(shape, PAD), np.zeros(shape, np.int64)
    segments, labels = np.full(shape, -1), np.full(shape, NONE)
    ids[:, :first] = prefix
    positions[:, :first] = range(first)
    segments[:, :first] = 0
    for b, image in enumerate(texts):
        start = first
        for number, (prompt, answer) in enumerate(image, 1):
            tokens = prompt + answer[:-1]
            stop = start + len(tokens)
            ids[b, start:stop] = tokens
            positions[b, start:stop] = np.arange(first, first + len(tokens))
            segments[b, start:stop] = number
            labels[b, stop - len(answer) : stop] = answer
            start = stop
    return tuple(map(torch.from_numpy, (ids, positions, segments, labels)))


def prefetch(make: Callable[[int], Any], steps: range, ahead: int = 3) -> Iterator[Any]:
    """The batches of these steps, made by a thread; an exception in the thread is raised here."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                put(make(step))
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer: a silent end would hang it
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def make_optimizers(
    model: nn.Module, heads: nn.Module, muon: float, adam: float, tower: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, read-outs, norms and biases.

    `tower`: share of these learning rates that the vision tower has.
    """
    groups = [{share: [] for share in (1.0, tower)} for _ in range(2)]
    groups[1][1.0] += heads.parameters()
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        groups[0 if matrix else 1][tower if "vision_tower" in name else 1.0].append(parameter)
    muons, adams = (
        [{"params": params, "lr": share * rate} for share, params in found.items()]
        for found, rate in zip(groups, (muon, adam), strict=True)
    )
    optimizers = [
        torch.optim.Muon(muons, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adams, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def learning_share(step: int, steps: int, flat: float = 0.6, warmup: int = 30) -> float:
    """Warm-up, flat, then a cosine down to 2 % of the learning rate; `flat` 1: no cosine."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step / steps - flat) / (1 - flat) if flat < 1 else -1
    return 1.0 if done < 0 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
