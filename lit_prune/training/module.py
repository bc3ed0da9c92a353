"""The LightningModule: one frozen model that is teacher and, with plug-ins attached, student."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.data.progress import end_epoch, rewind_to_step, steps_next
from lit_prune.errors import check_numbers
from lit_prune.evaluation.meters import Meters
from lit_prune.evaluation.records import sample_records
from lit_prune.evaluation.scorers.several import Score
from lit_prune.host import checkpointing
from lit_prune.host.lora import LoRA
from lit_prune.host.options import Positions, Proportional
from lit_prune.host.parts import find
from lit_prune.ops.budget import as_json, parse_budget
from lit_prune.plugin import Plugin
from lit_prune.plugin.forms import take_forms
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter
from lit_prune.training.averaging import refuse_whole_averages
from lit_prune.training.checks import check_batch, check_checkpoint, check_parameters, check_settings, check_teaching
from lit_prune.training.evaluate import answer_batch, compare_batch
from lit_prune.training.logging import Work, fetched, log_meters, step_figures
from lit_prune.training.losses import Anneal, LossWeights
from lit_prune.training.optimizer import adamw, follow_settings, warm_cosine
from lit_prune.training.step import Step, StepKey, Teaching
from lit_prune.training.strategies import in_step, parameter_count, refuse_unusable
from lit_prune.training.teacher_cache import TeacherCache
from lit_prune.vlm import VLM, load


class PruneModule(LightningModule):
    """Train a pruner and its repair adapter against the frozen model they are attached to, and evaluate any method.

    Args:
        base: the frozen model: "micro", a folder, or a hub id.
        pruner: the method, see configs/pruners/.
        repair: the pruner's repair adapter, if any.
        lora: low-rank adapters of the frozen decoder, trained with the plug-in; the teacher never has them.
        keep: budget, visual tokens averaged over the decoder layers' inputs: a count such as 16, a share such as 11.1%
            of the model's (where images differ, of each sample's), or counts by layer such as 2:192,4:64.
        plugin: folder written by `save_pretrained` to start from, in place of `pruner` and `repair`.
        random_weights: build the base's real shape with random weights and download nothing; for timing and tests.
        dtype: of the frozen weights; by default what `lit_prune.load` chooses. Trainable weights stay float32.
        positions: position ids of kept tokens, `original` or `renumbered`; by default the plug-in's, else original.
        proportional_attention: add log(size) to the attention logits of kept tokens, which represent the dropped ones:
            `none`, `count` or `similarity`, see `HostOptions`; by default the plug-in's, else none.
        train_mode: `soft` masks at full length, so that dropped tokens get gradients too; `drop` removes them, as
            inference does.
        contenders: soft mode only: of each stage, mask softly among the best `contenders` times as many tokens as are
            kept and remove the others, which shortens the sequence [ours]. `None`: all tokens, as in the paper.
        backward: soft mode only: gradients return through the rows of `all` tokens, or of those `kept` alone, which is
            faster, takes less memory and differs as little as a weight of 1e-8 does [ours]. Not with DeepSpeed.
        gate_clip: largest norm of the gradient of one sample's gate at one stage [ours]. Without it, the gradient of
            the cross entropy at the pruner has a norm of 1e7 on micro-LLaVA and dominates every other loss.
        gate_centre: the task and repair losses decide which tokens stay, the budget loss alone how many: the gradients
            of a sample's scores by the former sum to 0 at each stage [ours].
        checkpoint_activations: keep only the layers' inputs and recompute the rest in backward: less memory, more time.
        teacher_cache: folder that keeps what the losses need of the teacher, by sample, see docs/training.md [ours].
        watch: decoder layers whose attention in the teacher `loss.attention` reads.
        loss: weights of the losses.
        anneal: schedules of temperature, noise and target.
        lr: peak learning rate [R: 5e-5 for 7B].
        repair_lr: of the repair adapter, if it differs.
        weight_decay: of AdamW [R: 0.01].
        warmup: share of the steps for linear warm-up [R: 0.1].
        final_lr: last learning rate, as a share of the peak `lr`, by cosine [R: 0.1].
        max_new_tokens: longest answer in evaluation.
        seed: noise and dropout are a function of (seed, step, rank), so that a resumed run draws the same numbers.
        attn_implementation: of the frozen model, such as flash_attention_2; by default sdpa. `eager` only evaluates.

    Raises:
        LitPruneError: a number is out of range (raised before the model is loaded), or base or plug-in can't be used.
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
        backward: Literal["all", "kept"] = "all",
        gate_clip: float | None = None,
        gate_centre: bool = False,
        checkpoint_activations: bool = False,
        teacher_cache: str | None = None,
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
        lora: LoRA | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        rates = {"lr": lr, "repair_lr": repair_lr, "weight_decay": weight_decay, "warmup": warmup, "final_lr": final_lr}
        others = {"contenders": contenders, "gate_clip": gate_clip, "max_new_tokens": max_new_tokens, "seed": seed}
        check_settings(loss, watch, pruner, plugin, lora, teacher_cache, **rates, **others)
        self.lr, self.repair_lr, self.weight_decay, self.warmup, self.final_lr = rates.values()
        self.max_new_tokens, self.seed, keep = max_new_tokens, seed, parse_budget(keep, "model.keep")
        attached = Plugin(pruner, repair, keep, base, lora=lora) if plugin is None else Plugin.from_pretrained(plugin)
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self.vlm = self.load_frozen(base, dtype and getattr(torch, dtype), random_weights=random_weights, **options)
        check_numbers("model.watch", watch, least=0, below=find(self.vlm.model).dims.depth, whole=True)
        if checkpoint_activations:
            checkpointing.prepare(self.vlm.model, draws=attached.lora is not None and attached.lora.lora_dropout > 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            placed = {"positions": positions, "proportional_attention": proportional_attention}
            self.vlm.attach(attached.train(), keep=keep, **placed)
        self.keep = attached.keep  # attaching turns a share into a count where all images have equally many tokens
        named = {"base": base, "keep": as_json(self.keep), "train_mode": train_mode, "lr": lr, "seed": seed}
        self.save_hyperparameters(named | vars(attached.options))
        self.model, self.plugin = self.vlm.model, attached
        self.untrained = plugin is None and attached.trained  # until a checkpoint is loaded
        masks = {"train_mode": train_mode, "contenders": contenders, "gate_clip": gate_clip, "gate_centre": gate_centre}
        masks |= {"backward": backward, "cache": TeacherCache(teacher_cache) if teacher_cache else None}
        saving = {"checkpoint_activations": checkpoint_activations, "watch": tuple(watch) if loss.attention else ()}
        self.teaching = Teaching(self.vlm, self.keep, loss, anneal, **masks, **saving)
        self.work, dims = Work(self.vlm, attached), attached.dims
        self.meters = Meters(dims.depth, dims.width, attached.repair is not None, self.vlm.size is not None)
        self.scores: list[Score] = []  # official benchmark scores of the last evaluation

    def load_frozen(self, *args: Any, **options: Any) -> VLM:
        """Load the frozen model; a subclass may give one that is built already."""
        return load(*args, **options)

    # -- setup, modes and checkpoints ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse unsuitable Trainer settings; take the scorer that the data module names."""
        refuse_unusable(self.trainer)
        refuse_whole_averages(self.trainer)
        check_teaching(self.teaching, self._in_step, fitting=stage == "fit")
        self.meters.judged_by(getattr(self.trainer, "datamodule", None))

    def on_fit_start(self) -> None:
        """Log the numbers of trainable and frozen parameters."""
        count, frozen = (parameter_count(part) for part in (self.plugin, self.model))
        rank_zero_info(f"trainable: {count:,} parameters (plug-in); frozen: {frozen:,} ({self.plugin.base})")

    def configure_callbacks(self) -> list[Callback]:
        """The teacher cache, if there is one, opens and writes itself."""
        return [] if self.teaching.cache is None else [self.teaching.cache]

    def train(self, mode: bool = True) -> "PruneModule":
        """Set the mode of all but the frozen model, which stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the plug-in's weights alone: a checkpoint holds no frozen weight."""
        full, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        return {name: value for name, value in full.items() if name.startswith(f"{prefix}plugin.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plug-in's settings; rewind the counters to the last optimizer step, see `lit_prune.data.progress`."""
        checkpoint["plugin"] = self.plugin.settings()
        rewind_to_step(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `LitPruneError` if the checkpoint's trainable names or shapes differ from this module's."""
        end_epoch(checkpoint)
        self.untrained = False
        late = self._trainer is not None and self._trainer.strategy.restore_checkpoint_after_setup
        take_forms(self.plugin, checkpoint.get("plugin") or {}, fixed=late)
        check_checkpoint(checkpoint["state_dict"], self)

    # -- training -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise `LitPruneError` for batches of an unsupported data module."""
        check_batch(batch)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Run teacher and student over one batch and return the weighted loss."""
        key, part = self.step_key(), self.trainer.profiler.profile
        step = self.step(batch, key, part)
        with part("figures"):
            self.work.add(step.student, step.teacher, len(batch["ids"]))
            self._log_step(step, key.done, batch)
        return step.total

    def step_key(self) -> StepKey:
        """Seed and progress of the current step."""
        done = self.trainer.global_step / max(1, self.trainer.estimated_stepping_batches)
        step = f"{self.seed}/{self.trainer.current_epoch}/{self.trainer.fit_loop.total_batch_idx}/{self.global_rank}"
        return StepKey(zlib.crc32(step.encode()), done)

    def step(
        self, batch: dict[str, Any], key: StepKey, part: Callable[[str], AbstractContextManager] = nullcontext
    ) -> Step:
        """Compute the losses of one batch, a function of weights, batch and `key` alone.

        `part` opens a named section of a profiler.
        """
        ranks = 1 if self._trainer is None else self._trainer.world_size
        return self.teaching.step(batch, key, ranks, self._in_step, part)

    @property
    def host(self):
        """The hooks that connect plug-in and model."""
        return self.vlm.host

    def _log_step(self, step: Step, done: float, batch: dict[str, Any]) -> None:
        """Log a step's figures on steps at which loggers take them, in one transfer from the device.

        All other steps synchronise nothing. The progress bar shows the same values, since Lightning would fetch its
        own at every step.
        """
        every, samples = self.trainer.log_every_n_steps, len(batch["ids"])
        # The figures are averaged over ranks, so this condition must be the same on all of them.
        if not every or (self.trainer.global_step + 1) % every or not steps_next(self.trainer):
            return
        values = step_figures(self.teaching, step, done, samples)
        values = fetched(values | {f"data/{name}": value for name, value in batch.get("figures", {}).items()})
        self.log_dict(values, batch_size=samples)
        for label, name in (("loss", "loss/total"), ("kept", "budget/actual")):
            self.log(label, values[name], prog_bar=True, logger=False, batch_size=samples)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the plug-in, linear warm-up, cosine to `final_lr` of the peak."""
        check_parameters(self)
        optimizer = adamw(self.plugin, self.lr, self.repair_lr, self.weight_decay)
        schedule = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self) -> Callable[[int], float]:
        """Learning-rate factor per step; recomputed because a batch-size finder changes the number of steps."""
        return warm_cosine(max(1, self.trainer.estimated_stepping_batches), self.warmup, self.final_lr)

    def on_train_start(self) -> None:
        """Apply the configured (or found) learning rates and weight decay in place of those in a resumed checkpoint."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if len(schedules) == 1 and isinstance(schedules[0], LambdaLR):
            rates = (self.lr, self.repair_lr, self.weight_decay)
            follow_settings(self.trainer.optimizers[0], schedules[0], self._lr_factor(), *rates)

    def on_train_batch_end(self, *args: Any) -> None:
        """Mark the plug-in as trained."""
        self.untrained = False

    # -- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Update the meters with student and teacher over one batch.

        Returns both as `Measured` and the `records` of the samples, for callbacks; None for a batch without samples.
        """
        compared = compare_batch(self.vlm, batch, self.max_new_tokens, self._in_step)
        if compared is None:
            return None
        records = sample_records(compared.student, compared.teacher, batch)
        self.meters.update(records, compared.student, compared.teacher, batch, compared.unrepaired)
        return {"student": compared.student, "teacher": compared.teacher, "records": records}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Evaluate a batch of the test set as in validation."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str | None]]:
        """Answer a batch of prompts; entries have the keys `id`, `answer`, `question` and `reference`."""
        return answer_batch(self.vlm, batch, self.max_new_tokens, self._in_step)

    @property
    def _in_step(self) -> bool:
        """True if all ranks must run the same modules, see `strategies.in_step`."""
        return in_step(getattr(self._trainer, "strategy", None))

    def on_validation_epoch_end(self) -> None:
        """Log and reset the meters."""
        log_meters(self, "val")

    def on_test_epoch_end(self) -> None:
        """Log and reset the meters."""
        log_meters(self, "test")
