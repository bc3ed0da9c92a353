"""The LightningModule: one frozen model that is teacher and, with plug-ins attached, student."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.data.progress import end_epoch, rewind_to_step, steps_next
from lit_prune.errors import check_numbers
from lit_prune.evaluation import measuring
from lit_prune.evaluation.meters import Meters
from lit_prune.evaluation.records import sample_records
from lit_prune.evaluation.scorers.several import Score
from lit_prune.host import Record, Session, checkpointing
from lit_prune.host.options import Positions, Proportional
from lit_prune.host.parts import find
from lit_prune.ops.budget import as_json, parse_budget
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter
from lit_prune.training.averaging import refuse_whole_averages
from lit_prune.training.blank import has_image, with_blank
from lit_prune.training.checks import check_batch, check_checkpoint, check_parameters, check_settings
from lit_prune.training.logging import Work, fetched, step_figures
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.optimizer import adamw, follow_settings, warm_cosine
from lit_prune.training.step import Step, StepKey, Teaching
from lit_prune.training.strategies import in_step, parameter_count, refuse_unusable
from lit_prune.vlm import load


class PruneModule(LightningModule):
    """Trains a pruner and its repair against the frozen model they are attached to, and measures any method.

    Args:
        base: the frozen model: "micro", a folder, or a hub id.
        pruner: the method, see configs/pruners/.
        repair: the pruner's repair adapter, if any.
        keep: budget, visual tokens averaged over the decoder layers' inputs: a count such as 16, a share such as 11.1%
            of the model's (where images differ, of each sample's), or counts by layer such as 2:192,4:64.
        plugin: folder written by `save_pretrained` to start from, in place of `pruner` and `repair`.
        random_weights: build the base's real shape with random weights and download nothing: to measure and to test.
        dtype: of the frozen weights; by default what `lit_prune.load` chooses. What trains stays float32.
        positions: position ids of kept tokens, `original` or `renumbered`; by default the plug-in's, else original.
        proportional_attention: add log(size) to the attention logits of kept tokens, which stand for the dropped ones:
            `none`, `count` or `similarity`, see `HostOptions`; by default likewise.
        train_mode: `soft` masks at full length, so that dropped tokens teach too; `drop` discards, as inference does.
        contenders: soft mode only: let gradients reach the best `contenders` times as many tokens as are kept, and drop
            the others for good, which shortens the sequence [ours]. `None`: all tokens, as the paper trains.
        gate_clip: largest norm of the gradient of one sample's gate at one stage [ours]. Measured on micro-LLaVA, the
            gradient of the cross entropy on the pruner has a norm of 1e7 without it, and drowns every other loss.
        checkpoint_activations: layers keep their inputs alone and run again in backward: less memory, more time.
        watch: decoder layers whose attention in the teacher `loss.attention` reads: where the answer is looked up.
        loss: weights of the losses.
        anneal: schedules of temperature, noise and target.
        lr: peak learning rate [R: 5e-5 for 7B].
        repair_lr: that of the repair adapter, if another.
        weight_decay: of AdamW [R: 0.01].
        warmup: share of the steps that warm up [R: 0.1].
        final_lr: last learning rate, as a share of the peak `lr`, by cosine [R: 0.1].
        max_new_tokens: longest answer in evaluation.
        seed: noise and dropout are a function of (seed, step, rank), so that a resumed run draws what it would have.

    Raises:
        LitPruneError: a number outside of its range, before the model is loaded; a base or a plug-in that can't be.
    """

    def __init__(
        self,
        base: str = "micro",
        pruner: PruningMethod | None = None,
        repair: RepairAdapter | None = None,
        keep: Any = 16,
        plugin: str | None = None,
        random_weights: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        positions: Positions | None = None,
        proportional_attention: Proportional | None = None,
        train_mode: Literal["soft", "drop"] = "soft",
        contenders: float | None = None,
        gate_clip: float | None = None,
        checkpoint_activations: bool = False,
        watch: Sequence[int] = (),
        loss: LossWeights = LossWeights(),  # noqa: B008 (frozen)
        anneal: Anneal = Anneal(),  # noqa: B008 (frozen)
        lr: float = 5e-5,
        repair_lr: float | None = None,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        final_lr: float = 0.1,
        max_new_tokens: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        check_settings(
            loss,
            watch,
            pruner,
            plugin,
            lr=lr,
            repair_lr=repair_lr,
            weight_decay=weight_decay,
            warmup=warmup,
            final_lr=final_lr,
            contenders=contenders,
            gate_clip=gate_clip,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        self.lr, self.repair_lr, self.weight_decay = lr, repair_lr, weight_decay
        self.warmup, self.final_lr = warmup, final_lr
        self.max_new_tokens, self.seed, keep = max_new_tokens, seed, parse_budget(keep, "model.keep")
        made = Plugin(pruner, repair, keep, base) if plugin is None else Plugin.from_pretrained(plugin).train()
        frozen = None if dtype is None else getattr(torch, dtype)
        self.vlm = load(base, frozen, random_weights=random_weights)
        check_numbers("model.watch", watch, least=0, below=find(self.vlm.model).dims.depth, whole=True)
        if checkpoint_activations:
            checkpointing.prepare(self.vlm.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vlm.attach(made, keep=keep, positions=positions, proportional_attention=proportional_attention)
        self.keep = made.keep  # a share is a count now, where all images have as many tokens
        named = {"base": base, "keep": as_json(self.keep), "train_mode": train_mode, "lr": lr, "seed": seed}
        self.save_hyperparameters(named | vars(made.options))
        self.model, self.plugin = self.vlm.model, made
        self.untrained = plugin is None and made.trained  # as long as no checkpoint is loaded
        self.teaching = Teaching(
            self.vlm,
            self.keep,
            loss,
            anneal,
            train_mode=train_mode,
            contenders=contenders,
            gate_clip=gate_clip,
            checkpoint_activations=checkpoint_activations,
            watch=tuple(watch) if loss.attention else (),
        )
        dims = made.dims
        self.work = Work(self.vlm, made)
        self.meters = Meters(dims.depth, dims.width, made.repair is not None, self.vlm.size is not None)
        self.scores: list[Score] = []  # official ones, of the last evaluation of benchmarks

    # -- what trains and what is saved --------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what would train badly; take the scorer that the data module names."""
        refuse_unusable(self.trainer)
        refuse_whole_averages(self.trainer)
        self.meters.judged_by(getattr(self.trainer, "datamodule", None))

    def on_fit_start(self) -> None:
        """Say what trains."""
        count, frozen = (parameter_count(part) for part in (self.plugin, self.model))
        rank_zero_info(f"trainable: {count:,} parameters (plug-in); frozen: {frozen:,} ({self.plugin.base})")

    def train(self, mode: bool = True) -> "PruneModule":
        """The frozen model always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Only what trains: a checkpoint holds no frozen weight."""
        full = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        return {name: value for name, value in full.items() if name.startswith(f"{prefix}plugin.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The plug-in's settings beside its weights; without gradients that wait for their step: see `progress`."""
        checkpoint["plugin"] = self.plugin.settings()
        rewind_to_step(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose trainable names or shapes differ from this configuration's."""
        end_epoch(checkpoint)
        self.untrained = False
        check_checkpoint(checkpoint["state_dict"], self)

    # -- training -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what another project's data module gives, in every verb."""
        check_batch(batch)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Teacher and student over one batch; losses on the answers."""
        key, part = self.step_key(), self.trainer.profiler.profile
        step = self.step(batch, key, part)
        with part("figures"):
            self.work.add(step.student, step.teacher, len(batch["ids"]))
            self._log_step(step, key.done, batch)
        return step.total

    def step_key(self) -> StepKey:
        """Where the run is."""
        done = self.trainer.global_step / max(1, self.trainer.estimated_stepping_batches)
        step = f"{self.seed}/{self.trainer.current_epoch}/{self.trainer.fit_loop.total_batch_idx}/{self.global_rank}"
        return StepKey(zlib.crc32(step.encode()), done)

    def step(
        self, batch: dict[str, Any], key: StepKey, part: Callable[[str], AbstractContextManager] = nullcontext
    ) -> Step:
        """The losses of one batch, of weights, batch and `key` alone; `part` names a section for a profiler."""
        ranks = 1 if self._trainer is None else self._trainer.world_size
        return self.teaching.step(batch, key, ranks, self._in_step, part)

    @property
    def host(self):
        """The hooks that connect plug-in and model."""
        return self.vlm.host

    def _log_step(self, step: Step, done: float, batch: dict[str, Any]) -> None:
        """Where loggers take figures, make them and fetch them from the device at once; other steps wait for nothing.

        The progress bar shows the same ones: Lightning would fetch them at each step.
        """
        every, samples = self.trainer.log_every_n_steps, len(batch["ids"])
        if not every or (self.trainer.global_step + 1) % every or not steps_next(self.trainer):  # on all ranks alike
            return
        values = step_figures(self.teaching, step, done, samples)
        values |= {f"data/{name}": value for name, value in batch.get("figures", {}).items()}
        values = fetched(values)
        self.log_dict(values, batch_size=samples)
        for shown, name in (("loss", "loss/total"), ("kept", "budget/actual")):
            self.log(shown, values[name], prog_bar=True, logger=False, batch_size=samples)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the plug-in, linear warm-up, cosine to `final_lr` of the peak."""
        check_parameters(self)
        optimizer = adamw(self.plugin, self.lr, self.repair_lr, self.weight_decay)
        schedule = LambdaLR(optimizer, self._course())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _course(self) -> Callable[[int], float]:
        """The learning rate's course over the run's steps, whose number a finder of batch sizes changes."""
        return warm_cosine(max(1, self.trainer.estimated_stepping_batches), self.warmup, self.final_lr)

    def on_train_start(self) -> None:
        """Train at the rates that the configuration names, or a finder of them, not at those of a checkpoint."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if len(schedules) == 1 and isinstance(schedules[0], LambdaLR):
            rates = (self.lr, self.repair_lr, self.weight_decay)
            follow_settings(self.trainer.optimizers[0], schedules[0], self._course(), *rates)

    def on_train_batch_end(self, *args: Any) -> None:
        """The plug-in has learnt something."""
        self.untrained = False

    # -- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Measure the student with and without repair, and the teacher, on one batch.

        Returns both as `Measured` and the `records` of the samples, for callbacks; None for a batch without any.
        """
        count, together = len(batch["ids"]), self._in_step
        if together and not has_image(batch):
            batch = with_blank(batch, self.vlm)
        elif not count:
            return None
        hints = batch.get("hints", {})
        with self.vlm.using(measuring.TEACHER):
            plain = self.vlm.encode_images(batch["inputs"])
        teacher, student = (
            measuring.measure(self.vlm, batch, session, self.max_new_tokens, together, plain=plain).first(count)
            for session in (measuring.TEACHER, Session(hints=hints))
        )
        unrepaired = None
        if self.plugin.repair is not None:
            bare = Record(keep_hidden=True)
            with self.vlm.using(Session(repair=False, hints=hints, record=bare)):
                self.model(**self.vlm.encode_images(batch["inputs"], plain), use_cache=False)
            unrepaired = bare.hidden
        if not count:
            return None
        records = sample_records(student, teacher, batch)
        self.meters.update(records, student, teacher, batch, unrepaired)
        return {"student": student, "teacher": teacher, "records": records}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """The same as validation, on the test set."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str | None]]:
        """Answers to a batch of prompts, each with its question and the data's own answer, None where there is none."""
        together = self._in_step
        if together and not has_image(batch):
            batch = with_blank(batch, self.vlm)
        elif not batch["ids"]:
            return []
        limits = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        with self.vlm.using(Session(hints=batch.get("hints", {}))):
            tokens = self.model.generate(**batch["prompts"], **limits, synced_gpus=together)
        texts = self.vlm.decode(tokens, batch["prompts"]["input_ids"].shape[1])
        samples = zip(batch["ids"], texts, batch["questions"], batch["answers"], strict=False)  # none of a blank
        keys = ("id", "answer", "question", "reference")
        return [dict(zip(keys, (str(i), text, asked, known or None), strict=True)) for i, text, asked, known in samples]

    @property
    def _in_step(self) -> bool:
        """Whether all ranks must run the same modules."""
        return in_step(getattr(self._trainer, "strategy", None))

    def on_validation_epoch_end(self) -> None:
        """Log and clear the meters."""
        self._log_meters("val")

    def on_test_epoch_end(self) -> None:
        """Log and clear the meters."""
        self._log_meters("test")

    def _log_meters(self, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in self.meters.compute().items()}
        if not values:
            return
        # The meters have gathered over ranks already; sync_dist only says so.
        self.log_dict(values, sync_dist=True)
        if (accuracy := values.get(f"{stage}/accuracy/all")) is not None:
            self.log(f"{stage}_accuracy", accuracy, prog_bar=True, logger=False, sync_dist=True)
        self.scores = self.meters.scores()
        self.meters.reset()
