"""One training step: teacher and student over a batch, and the losses between them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_prune.cost.trace import left_out
from lit_prune.evaluation import measuring
from lit_prune.host import Prefix, Record, Session, checkpointing
from lit_prune.ops.budget import Budget
from lit_prune.ops.moments import mean_over_ranks
from lit_prune.training.blank import has_image, with_blank
from lit_prune.training.losses import (
    Anneal,
    LossWeights,
    answer_loss,
    attention_loss,
    budget_share,
    distillation,
    repair_loss,
    saliency,
    saliency_loss,
    stagewise_distance,
    visual_share,
)
from lit_prune.training.teacher_cache import TeacherCache, take_moments
from lit_prune.vlm import VLM


@dataclass(frozen=True)
class StepKey:
    """Position of a step in a run: seed of its noise and dropout, and the share of all steps completed before it."""

    seed: int
    done: float


@dataclass(frozen=True)
class Step:
    """Result of a training step: the weighted total, each loss, and the records of student and teacher."""

    total: Tensor
    losses: dict[str, Tensor]
    student: Record
    teacher: Record


@dataclass(frozen=True)
class Teaching:
    """Training of the plug-in attached to `vlm`; the options are those of `PruneModule`."""

    vlm: VLM
    keep: Budget
    loss: LossWeights
    anneal: Anneal
    train_mode: Literal["soft", "drop"]
    contenders: float | None
    gate_clip: float | None
    checkpoint_activations: bool
    watch: tuple[int, ...]
    gate_centre: bool = False
    backward: Literal["all", "kept"] = "all"
    cache: TeacherCache | None = None

    def step(
        self,
        batch: dict[str, Any],
        key: StepKey,
        ranks: int = 1,
        in_step: bool = False,
        part: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> Step:
        """Compute the losses of one batch.

        Teacher and student share the image features and the decoder layers before the first stage. The teacher stops
        after the last layer that a loss reads, and only answer positions get logits.

        Args:
            batch: a batch with `inputs`, and `pack` if samples share rows. key: position of the step in the run.
            ranks: number of ranks over which gradients are averaged afterwards.
            in_step: all ranks must run the same modules.
            part: opens a named section of a profiler.
        """
        vlm, plugin = self.vlm, self.vlm.plugin
        if blank := in_step and not has_image(batch):
            batch = with_blank(batch, vlm)
        torch.manual_seed(key.seed)
        plugin.pruner.anneal(self.anneal.tau(key.done), self.anneal.noise_scale(key.done))
        plugin.pruner.relax(self.anneal.surplus(key.done))
        plain, pruned = (replace(session, pack=batch.get("pack", False)) for session in self.sessions(ranks))
        teacher, student = plain.record, pruned.record
        with part("teacher forward"), torch.no_grad(), vlm.using(plain):
            inputs = vlm.encode_images(batch["inputs"])
            known = self._known(batch, teacher)
            target = None if known else self._teach(inputs, teacher)
        with part("student forward"), vlm.using(pruned):
            inputs = vlm.encode_images(batch["inputs"], plain=inputs)
            with self._saving():
                logits = vlm.model(**inputs, use_cache=False).logits[0]
        with part("losses"):
            self._keep(batch, student, teacher, known)
            losses = self.losses(logits, target, student, teacher, key.done, blank)
            total = sum(getattr(self.loss, name) * value for name, value in losses.items())
        # Without an image no stage ran. DDP would wait for this rank's gradients: give every parameter one of zero.
        if not student.stages:
            total = total + 0.0 * sum(parameter.sum() for parameter in plugin.parameters())
        return Step(total, losses, student, teacher)

    def _teach(self, inputs: dict[str, Any], teacher: Record) -> Tensor:
        """The teacher's logits at answer positions; its record keeps no graph."""
        if not self.derive:
            return self.vlm.model(**inputs, use_cache=False).logits[0]
        with torch.enable_grad(), self._saving():
            logits = self.vlm.model(**inputs, use_cache=False).logits[0]
            teacher.saliency, teacher.entering = saliency(logits, teacher), {}
        teacher.hidden = {layer: states.detach() for layer, states in teacher.hidden.items()}
        teacher.attention = {layer: rows.detach() for layer, rows in teacher.attention.items()}
        return logits.detach()

    def _saving(self) -> AbstractContextManager:
        """Layers save for backward what the run asks for."""
        if not self.checkpoint_activations:
            return nullcontext()
        return checkpointing.checkpointed(self.vlm.model, self.vlm.host.shared)

    def _known(self, batch: dict[str, Any], teacher: Record) -> bool:
        """True if the cache gives the teacher's record all that a loss reads."""
        digests = None if self.cache is None else batch.get("digests")
        found = None if digests is None else self.cache.find(digests, self.vlm.model.device)
        if found is None:
            return False
        teacher.per_sample, rows = found
        attention = rows.pop("attention", None)
        teacher.attention = {} if attention is None else {self.watch[0]: attention}
        teacher.saliency = {layer: rows[f"saliency.{layer}"] for layer in self.derive}
        return True

    def _keep(self, batch: dict[str, Any], student: Record, teacher: Record, known: bool) -> None:
        """Complete the teacher's record where a cache is used, and keep in it what it didn't know."""
        if known:
            teacher.trace = left_out(student.trace)
        elif self.cache is not None:
            take_moments(teacher)
            if "digests" in batch:
                self.cache.add(batch["digests"], teacher)

    @property
    def learning(self) -> tuple[int, ...]:
        """Decoder layers of the stages whose scores are trained."""
        return tuple(stage.layer for stage in self.vlm.host.walk if next(stage.pruner.parameters(), None) is not None)

    @property
    def derive(self) -> tuple[int, ...]:
        """Decoder layers of the stages whose saliency in the teacher a loss reads."""
        return self.learning if self.loss.saliency else ()

    def sessions(self, ranks: int) -> tuple[Session, Session]:
        """Sessions of teacher and student, each with its own record."""
        host = self.vlm.host
        layers = frozenset(host.feeds) or frozenset([self.vlm.plugin.dims.depth - 1])
        teacher, student = Record(keep_hidden=layers), Record(keep_hidden=layers)
        common = {"answers_only": True, "prefix": Prefix(host.shared) if host.shared else None}
        whole = self.loss.distill or self.loss.saliency
        stop = None if whole else max(layers.union(self.watch)) + 1
        read = {"watch": self.watch, "derive": self.derive}
        plain = replace(measuring.TEACHER, record=teacher, stop=stop, **read, **common)
        # Gradients are averaged over ranks after backward, so here a sample's gradient is `ranks` times its final size.
        clip = None if self.gate_clip is None else self.gate_clip * ranks
        gates = {"contenders": self.contenders, "gate_clip": clip, "gate_centre": self.gate_centre}
        gates["backward"] = self.backward
        return plain, Session(record=student, soft=self.train_mode == "soft", **gates, **common)

    def losses(
        self, logits: Tensor, target: Tensor | None, student: Record, teacher: Record, done: float, blank: bool = False
    ) -> dict[str, Tensor]:
        """Losses by name, means over all ranks' samples or answer tokens; a dummy image (`blank`) doesn't count."""
        total, answers, plugin = student.trace.total_visual, len(student.targets), self.vlm.plugin
        losses = {"task": mean_over_ranks(answer_loss(logits, student.targets), answers)}
        if self.vlm.host.feeds:
            losses["repair"] = repair_loss(student, teacher, sorted(self.vlm.host.feeds), self.loss)
        if plugin.pruner.free:
            losses["budget"] = self._budget(student, done, (total > 0).sum() - int(blank))
        by_sample = {}
        if self.loss.attention:
            by_sample["attention"] = attention_loss(student, teacher, self.loss.sharpen)
        if self.loss.saliency:
            by_sample["saliency"] = saliency_loss(student, teacher)
        for name, value in by_sample.items():
            losses[name] = mean_over_ranks(0.0 * value if blank else value, len(total) - int(blank))
        if self.loss.distill:
            losses["distill"] = mean_over_ranks(distillation(logits, target), answers)
        return losses

    def _budget(self, student: Record, done: float, pictured: Tensor) -> Tensor:
        """Distance of the kept share from its target, of the average or, `stagewise`, of each stage."""
        total, depth = student.trace.total_visual, self.vlm.plugin.dims.depth
        if self.loss.stagewise:
            return mean_over_ranks(stagewise_distance(student, depth, self.anneal, done), pictured)
        share = mean_over_ranks(visual_share(student, depth), pictured)
        final = mean_over_ranks(budget_share(self.keep, total, depth), pictured)
        return (share - self.anneal.target(final, done)).abs()
