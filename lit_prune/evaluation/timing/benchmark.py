"""Time a model, plain and pruned, in one process on one set of weights.

A round measures every method at every batch size once: the prefill with precomputed image features, the plain model cut
to the same lengths, and a whole request from pixels to the last token. Each round starts with the next method, so that
none always follows the same one. Attaching and detaching plug-ins is not timed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lit_prune.cost.flops import decoder_total, price
from lit_prune.cost.sizes import USUAL
from lit_prune.cost.trace import Trace
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.timing.clocks import Clock, noisy, spread
from lit_prune.evaluation.timing.prompts import SEED, Prompt, decode, prefill, random_prompt
from lit_prune.host import Record, Session
from lit_prune.host.cache import stored_bytes
from lit_prune.host.cut import cut_to
from lit_prune.host.parts import find
from lit_prune.ops.budget import Budget, as_json
from lit_prune.plugin import Plugin, unpruned
from lit_prune.vlm import VLM


@dataclass(frozen=True)
class Method:
    """A plug-in at a budget; by default the full model."""

    name: str
    plugin: Plugin = field(default_factory=unpruned)
    keep: Budget | None = None

    def prunes(self, depth: int) -> bool:
        """False for the full model."""
        return bool(self.plugin.pruner.stages(depth))


@dataclass
class Times:
    """Seconds of one method at one batch size, one entry for each round."""

    prefill: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Ran:
    """Costs of one prefill: FLOPs of the batch, bytes in its cache, lengths at each decoder layer, tokens per stage."""

    flops: float | None  # None: the model's arithmetic isn't known
    kv_bytes: int
    visual: float
    lengths: list[int]
    kept: dict[int, float]


class Benchmark:
    """Times, FLOPs, cache and memory of several methods.

    Args:
        vlm: the model; plug-ins are attached to it in turn, and it is left plain.
        methods: rows of each batch size; the full model is prepended if missing.
        batch_sizes: numbers of prompts at once.
        text_tokens: of each prompt, beside its image's.
        new_tokens: answered in each request, at least 2.
        clock: see `clock_for`.
        image: height and width in pixels of each prompt's image, for models whose images differ.
    """

    def __init__(
        self,
        vlm: VLM,
        methods: Sequence[Method],
        batch_sizes: Sequence[int],
        text_tokens: int,
        new_tokens: int,
        clock: Clock,
        image: tuple[int, int] = USUAL,
    ) -> None:
        if new_tokens < 2 or text_tokens < 2 or not batch_sizes or min(batch_sizes) < 1:
            raise LitPruneError("bench needs text_tokens and new_tokens of at least 2 and batch sizes of at least 1")
        depth = find(vlm.model).dims.depth
        if all(method.prunes(depth) for method in methods):
            methods = [Method("full"), *methods]
        if len({method.name for method in methods}) < len(methods):
            raise LitPruneError("two methods have the same name; give NAME=PATH")
        self.vlm, self.methods, self.batch_sizes = vlm.detach(), list(methods), list(dict.fromkeys(batch_sizes))
        self.dims = find(vlm.model).dims
        self.text_tokens, self.new_tokens, self.clock, self.image = text_tokens, new_tokens, clock, image
        self.prompts: dict[int, Prompt] = {}
        self.ran: dict[tuple[int, str], Ran] = {}
        self.times: dict[tuple[int, str], Times] = {}
        self.too_large: list[tuple[int, str]] = []

    def order(self, turn: int) -> Iterator[tuple[int, Method]]:
        """Batch sizes and methods of a round, in order."""
        shift = turn % len(self.methods)
        for batch in self.batch_sizes:
            for method in (*self.methods[shift:], *self.methods[:shift]):
                yield batch, method

    @torch.inference_mode()
    def run(
        self, repeats: int, warmup: int = 1, time_limit: float | None = None, tick: Callable[[], None] = lambda: None
    ) -> bool:
        """Measure `repeats` rounds after `warmup` unmeasured ones; False if `time_limit` seconds ended it early."""
        deadline = None if time_limit is None else time.monotonic() + time_limit
        for turn in range(-warmup, repeats):
            for batch, method in self.order(turn):
                if deadline is not None and time.monotonic() > deadline:
                    return False
                self._try(batch, method, measured=turn >= 0)
                tick()
        return True

    def _try(self, batch: int, method: Method, measured: bool) -> None:
        key = (batch, method.name)
        if key in self.too_large:
            return
        try:
            self._measure(batch, method, self.times.setdefault(key, Times()) if measured else Times())
        except torch.OutOfMemoryError:
            self.too_large.append(key)
            self.times.pop(key, None)
            torch.cuda.empty_cache()

    def _measure(self, batch: int, method: Method, times: Times) -> None:
        """One turn of one method at one batch size."""
        model = self.vlm.model
        self._prompts_of(batch)
        if (batch, method.name) not in self.ran:
            self.ran[batch, method.name] = self._inspect(method, self.prompts[batch])
        with self._attached(method):
            prompt = self._prompt(method, self.prompts[batch])
            times.prefill.append(self.clock(lambda: prefill(model, prompt.features))[0])
            _reset_peak(model.device)
            first, (token, cache) = self.clock(lambda: prefill(model, prompt.pixels))
            rest, _ = self.clock(partial(decode, model, token, cache, self.new_tokens - 1))
        times.first.append(first)
        times.decode.append(rest / (self.new_tokens - 1))
        times.peak_bytes = _peak(model.device, times.peak_bytes)
        del cache
        if method.prunes(self.dims.depth):
            features = self.prompts[batch].features
            with cut_to(model, self.ran[batch, method.name].lengths, features["input_ids"].shape[1]):
                times.cut.append(self.clock(lambda: prefill(model, features))[0])

    def _prompts_of(self, batch: int) -> Prompt:
        if batch not in self.prompts:
            self.prompts[batch] = random_prompt(self.vlm, batch, self.text_tokens, self.image)
        return self.prompts[batch]

    @property
    def visual(self) -> int:
        """Visual tokens of each prompt."""
        return self._prompts_of(self.batch_sizes[0]).visual

    def _prompt(self, method: Method, prompt: Prompt) -> Prompt:
        """With features of the method's own making, where it prunes inside the vision tower."""
        return replace(prompt, features=self.vlm.encode_images(prompt.pixels, prompt.features))

    @contextmanager
    def _attached(self, method: Method, recording: bool = False) -> Iterator[None]:
        """Inside, the method is attached; the full model is timed without any hooks, and has some for a recording."""
        if not recording and not method.prunes(self.dims.depth):
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.vlm.attach(method.plugin, keep=method.keep)
        try:
            yield
        finally:
            self.vlm.detach()

    def _inspect(self, method: Method, prompt: Prompt) -> Ran:
        """Run one prefill twice: recorded, and for the cache that it leaves."""
        record, model = Record(), self.vlm.model
        with self._attached(method, recording=True):
            prompt = self._prompt(method, prompt)
            with self.vlm.using(Session(record=record)):
                prefill(model, prompt.features)
            _, cache = prefill(model, prompt.features)
        size = self.vlm.size
        parts = None if size is None else price(record.trace, size, method.plugin.pruner, method.plugin.repair)
        return Ran(
            flops=None if parts is None else (decoder_total(parts) + parts["lm_head"]).sum().item(),
            kv_bytes=sum(stored_bytes(layer) for layer in cache.layers),
            visual=record.trace.average_visual().mean().item(),
            lengths=_widths(record.trace),
            kept={stage.layer: stage.kept.sum(1).double().mean().item() for stage in record.stages},
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table so far: a row for each batch size and method that was measured; times in ms."""
        full = next(method.name for method in self.methods if not method.prunes(self.dims.depth))
        rows = []
        for batch, method in ((batch, method) for batch in self.batch_sizes for method in self.methods):
            times = self.times.get((batch, method.name))
            if times is not None and times.decode:
                reference = self.times.get((batch, full))
                rows.append(self._row(batch, method, times, self.ran.get((batch, full)), reference))
        return rows

    def _row(
        self, batch: int, method: Method, times: Times, full: Ran | None, reference: Times | None
    ) -> dict[str, Any]:
        ran = self.ran[batch, method.name]
        prefill_s, first, decode_s = (float(np.median(t)) for t in (times.prefill, times.first, times.decode))
        gains = dict.fromkeys(("speedup", "flops_ratio", "efficiency", "ttft_speedup", "decode_speedup"))
        if full is not None and reference is not None and reference.decode:
            gains["speedup"] = float(np.median(reference.prefill)) / prefill_s
            if ran.flops is not None:
                gains["flops_ratio"] = full.flops / ran.flops
                gains["efficiency"] = gains["speedup"] / gains["flops_ratio"]
            gains["ttft_speedup"] = float(np.median(reference.first)) / first
            gains["decode_speedup"] = float(np.median(reference.decode)) / decode_s
        overhead, overhead_spread = _overhead(times)
        spreads = {"spread": spread(times.prefill), "ttft_spread": spread(times.first)}
        spreads["decode_spread"] = spread(times.decode)
        return {
            "method": method.name,
            "keep": as_json(method.plugin.keep) if method.prunes(self.dims.depth) else None,
            "batch": batch,
            "prefill_ms": 1e3 * prefill_s,
            "ttft_ms": 1e3 * first,
            "decode_ms_per_token": 1e3 * decode_s,
            "tokens_per_s": batch * self.new_tokens / (first + decode_s * (self.new_tokens - 1)),
            **gains,
            "overhead": overhead,
            "overhead_spread": overhead_spread,
            "flops": ran.flops,
            "kv_bytes": ran.kv_bytes,
            "peak_memory_bytes": times.peak_bytes,
            "avg_visual_tokens": ran.visual,
            "kept": ran.kept,
            **spreads,
            "noisy": any(noisy(value) for value in spreads.values()),
            "n": len(times.decode),
        }


def _overhead(times: Times) -> tuple[float | None, float | None]:
    """Share of a pruned prefill that the plain model, cut to its lengths, does without: median, interquartile range."""
    if not times.cut:
        return None, None
    shares = [1.0 - cut / pruned for pruned, cut in zip(times.prefill, times.cut, strict=False)]
    low, middle, high = np.percentile(shares, [25, 50, 75])
    return float(middle), float(high - low)


def _widths(trace: Trace) -> list[int]:
    """Columns at each decoder layer: those of the sample that keeps most."""
    return [int(lengths.max()) for lengths in trace.queries]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device, before: int | None) -> int | None:
    """Largest allocation since the last reset or `before`, weights included; None where PyTorch keeps no count."""
    return max(before or 0, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
