"""LightningDataModule for instruction data that can be indexed: JSON, tables, tar shards."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lit_prune.data.bad_samples import BadSampleLog
from lit_prune.data.checks import check_sources
from lit_prune.data.conversation import TooLong
from lit_prune.data.dataset import Collate, InstructDataset, Mode, pad_token
from lit_prune.data.lengths import estimate_lengths
from lit_prune.data.loader import make_loader, move_batch
from lit_prune.data.mixture import Mixture, as_sources
from lit_prune.data.order import Order
from lit_prune.data.progress import restore_place, resumes, saved_place
from lit_prune.data.prompt import chat_template
from lit_prune.data.resume import fingerprint
from lit_prune.data.sampler import EvalBatches, RankShare, TrainBatches
from lit_prune.data.settings import check_numbers, check_share
from lit_prune.data.sources import Source, open_source
from lit_prune.data.tally import Tally
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.meters import ExactMatch
from lit_prune.loading import context_length

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
REQUIRED = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


class InstructData(LightningDataModule):
    """Batches of instruction data for the processors of LLaVA, LLaVA-NeXT and -OneVision, InternVL and Qwen-VL.

    A batch of B samples is a dict; its lists have one entry per sample:
        inputs: `input_ids`, `attention_mask`, `labels` (B, tokens), prompt and answers padded on the right, labels -100
            except for answers; `pixel_values` (images, 3, height, width) if any sample has an image, and other keys
            that the processor returns.
        prompts: in evaluation only, the same keys without labels, padded on the left, up to and including the
            generation prompt of the last answer. Image tensors are shared with `inputs`.
        hints: in evaluation only, if records have boxes and the positions of visual tokens are known: `regions` (B,
            regions, visual tokens), the share of each token's patch that each box covers.
        ids, questions, answers (text of the last ones), skills (None if the record has none), boxes (pixels),
        records (index in the file), sources (name in the mixture; "" in evaluation).
        figures: in training only, metrics of the data on this rank since the run was started or resumed:
            `share/NAME`, the share of samples from each source of a mixture; `bad`, distinct bad samples; with
            `too_long: cut_turns` also `cut_turns`, the number of removed turns.
    A bad sample is replaced by the next good one in training, and left out in evaluation, where a batch may be empty
    (`ids == []`, no tensors). Bad samples are warned about, listed in the run's folder, and counted: `BadSampleLog`.

    Resuming continues with the next batch: a checkpoint holds the epoch and the number of its samples trained on.

    Args:
        base: model whose processor encodes the inputs: a hub id, a folder, or "micro".
        train: training data: a location for `open_source`, or several, each a location or a mapping with `data`,
            `images`, `weight`, `name`. See `Order` for how they are mixed.
        val: location of the validation data.
        test: location of the test data.
        predict: location of the prediction data, which needs no answers.
        images: image root of all locations that specify none; by default each one's own folder.
        batch_size: samples per training batch, on each process.
        eval_batch_size: samples per evaluation or prediction batch, on each process.
        num_workers: worker processes per loader; the order of samples doesn't depend on it.
        prefetch_factor: batches that each worker reads ahead; by default torch's 2.
        seed: of the training order.
        group_by_length: group samples of similar length in training, for less padding; see `Order`.
        max_length: most tokens of a sample; by default the context length of the base model.
        too_long: handling of longer training samples: "skip" makes them bad samples, "cut_turns" removes their last
            turns; see `encode`.
        max_bad_share: largest share of bad samples, checked from 100 samples of an epoch on.
        pack: training samples share rows in the decoder's layers; losses stay the same, see docs/training.md.

    Raises:
        LitPruneError: a file is missing or can't be indexed, a required split is not given, a number is out of range,
            there are too many bad samples, or a checkpoint is of other training data.
    """

    def __init__(
        self,
        base: str,
        train: str | list[str | dict[str, str | float | None]] | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        images: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        max_length: int | None = None,
        max_bad_share: float = 0.05,
        too_long: TooLong = "skip",
        group_by_length: bool = False,
        prefetch_factor: int | None = None,
        pack: bool = False,
    ):
        super().__init__()
        sizes = {"eval_batch_size": eval_batch_size, "max_length": max_length, "prefetch_factor": prefetch_factor}
        check_numbers(1, batch_size=batch_size, **sizes)
        check_numbers(0, num_workers=num_workers, seed=seed)
        check_share(max_bad_share=max_bad_share)
        self.base, self.images = base, images
        self.paths = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = as_sources(train, images) if train is not None else []
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed, self.max_length, self.max_bad_share = seed, max_length, max_bad_share
        self.too_long, self.group_by_length, self.prefetch_factor = too_long, group_by_length, prefetch_factor
        self.datasets: dict[str, InstructDataset | Mixture] = {}
        self.opened: dict[str, list[Source]] = {}  # by split: what `check` opened and `setup` takes
        self.tally, self.bad_samples, self.pack = Tally(), BadSampleLog(max_bad_share), pack
        self.digests = False  # set by `model.teacher_cache`: training batches have digests of their samples
        self._processor: Any = None
        self._loaded_from: str | None = None
        self._train_batches: TrainBatches | None = None

    @property
    def processor(self) -> Any:
        """Processor of the base model; may be set before `setup`."""
        if self._processor is None:
            from lit_prune.loading import load_processor

            self._processor, self._loaded_from = load_processor(self.base), self.base
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self._processor, self._loaded_from = processor, None

    def scorer(self) -> Metric:
        """Metric that scores answers in validation and test; its `update` takes their texts and the batch."""
        return ExactMatch()

    def check(self, stage: str) -> None:
        """Open the data that a verb (fit, validate, test, predict) reads; to be called before a model is loaded.

        Raises:
            LitPruneError: data are not given, missing or unreadable, or training data have no images.
        """
        for split in self._splits(stage):
            self._check(split)

    # Hooks of Lightning

    def setup(self, stage: str | None = None) -> None:
        for name in [s for s, split in REQUIRED.items() if (s == stage if stage else self.paths[split])]:
            for split in self._splits(name):
                if split != "train":
                    (source,) = self._sources(split)
                    self.datasets[split] = self._encoder(split)(source)
        if stage in (None, "fit") and self.paths["train"]:
            self._setup_train()
        self._prepare_trainer()

    def teardown(self, stage: str) -> None:
        """Warn if a run saw no image at all."""
        if stage == "fit":
            self.tally.warn_without_images()

    def train_dataloader(self) -> DataLoader:
        batches = self._train_batches
        self.batch_size = batches.resize(self.batch_size)  # a batch-size finder may have changed it
        if self.trainer is not None:
            epoch = self.trainer.current_epoch
            # A resumed order is already at its epoch, or ahead of Lightning's count.
            if not batches.resumed or epoch + batches.shift > batches.epoch:
                batches.set_epoch(epoch)
        return self._loader("train", batch_sampler=batches)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader("predict")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Pop and log the batch's bad-sample counters, and warn about unread keys."""
        self.tally.warn_of_keys(batch.pop("unread", {}))
        skipped, cut, replaced = batch.pop("skipped", []), batch.pop("cut", 0), batch.pop("replaced", 0)
        stage, current = "data", None
        if self.trainer is not None:
            stage = self.trainer.state.stage.value
            current = (self.trainer.current_epoch, None if self.trainer.training else self.trainer.global_step)
        split = {"train": "train", "test": "test", "predict": "predict"}.get(stage, "val")
        share = len(RankShare(len(self.datasets.get(split, ())), *self._rank_and_world()))
        self.bad_samples.update(stage, current, len(batch["ids"]) - replaced, skipped, share)
        if "failure" in batch:
            raise LitPruneError(batch["failure"])
        if split == "train":
            self.tally.add(batch, cut)
            known, cuts = len(self.bad_samples.known), self.too_long == "cut_turns"
            figures = self.tally.figures(self.datasets["train"].names, known, cuts)
            batch |= {"pack": self.pack, "figures": figures}
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return move_batch(batch, lambda part: move_data_to_device(part, device))

    def state_dict(self) -> dict[str, int]:
        """Position of training in its data, after the last optimizer step, independent of prefetching."""
        batches = self._train_batches
        return {} if batches is None or self.trainer is None else saved_place(self.trainer, batches)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if self._train_batches is not None and resumes(self.trainer, state_dict):
            restore_place(self.trainer, self._train_batches, state_dict)

    def _splits(self, stage: str) -> list[str]:
        """Splits that a verb reads. Raises LitPruneError if the required one is not given."""
        if not self.paths[REQUIRED[stage]]:
            raise LitPruneError(
                f"data: {REQUIRED[stage]} is not given: {stage} needs a file or folder of instruction data"
            )
        return [split for split in SPLITS[stage] if self.paths[split]]

    def _sources(self, split: str) -> list[Source]:
        """Sources of a split: those opened by `check`, otherwise opened now."""
        if split in self.opened:
            return self.opened.pop(split)
        if split == "train":
            return [open_source(source.data, source.images) for source in self.sources]
        return [open_source(self.paths[split], self.images)]

    def _check(self, split: str) -> None:
        self.opened[split] = sources = self._sources(split)
        check_sources(sources, split, unreadable=self.max_bad_share == 1)

    def _setup_train(self) -> None:
        encode = self._encoder("train")
        parts = [encode(source) for source in self._sources("train")]
        self.datasets["train"] = Mixture(parts, [source.name for source in self.sources])
        carries = self.trainer is not None and self.trainer.strategy.handles_gradient_accumulation
        multiple = self.trainer.accumulate_grad_batches if carries else 1
        prints = [fingerprint(part.source) for part in parts]
        repeats = self.trainer is not None and self.trainer.overfit_batches > 0
        self._train_batches = TrainBatches(
            self._order(), self.batch_size, *self._rank_and_world(), multiple, prints, repeats
        )

    def _encoder(self, split: str) -> Callable[[Source], InstructDataset]:
        """Factory of a source's data set. Raises LitPruneError for a processor without a chat template."""
        chat_template(self.processor)
        options = {"max_length": self._context(), "mode": _mode(split), "too_long": self.too_long}
        return partial(InstructDataset, processor=self.processor, square=self._square(), **options)

    def _square(self) -> tuple[int, int, int] | None:
        """Colour with which images are padded to a square; None: no padding."""
        return None

    def _order(self) -> Order:
        mixture, weights = self.datasets["train"], [source.weight for source in self.sources]
        lengths = np.concatenate([estimate_lengths(part) for part in mixture.parts]) if self.group_by_length else None
        world = self._rank_and_world()[1]
        given = None if None in weights else tuple(weights)
        return Order(mixture.sizes, given, self.seed, lengths, self.batch_size * world)

    def _context(self) -> int | None:
        """The given `max_length`, otherwise the context length of the base model, if known."""
        if self.max_length is None:
            self.max_length = context_length(self.processor, self._loaded_from)
        return self.max_length

    def _loader(self, split: str, **order: Any) -> DataLoader:
        """Create a loader; `order`: its sampler arguments."""
        collate = Collate(pad_token(self.processor), _mode(split), self.digests and split == "train")
        return make_loader(self.datasets[split], collate, self.num_workers, self.prefetch_factor, self.seed, **order)

    def _eval_loader(self, split: str) -> DataLoader:
        share = RankShare(self._asked(split), *self._rank_and_world())
        return self._loader(split, batch_sampler=EvalBatches(share, self.eval_batch_size))

    def _asked(self, split: str) -> int | Sequence[int]:
        """Samples of a split to evaluate: the number of all of them, or the indices of some."""
        return len(self.datasets[split])

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _prepare_trainer(self) -> None:
        if self.trainer is None:
            return
        # These samplers split over ranks themselves and must not be wrapped in a second one.
        self.trainer._accelerator_connector.use_distributed_sampler = False
        log_dir = self.trainer.log_dir  # a collective, so it is called here on all ranks
        root = Path(self.trainer.default_root_dir)
        given = root.resolve() != Path.cwd()  # a logger's folder changes when a run is resumed
        self.bad_samples.folder = root if given or not log_dir else Path(log_dir)
        self.bad_samples.rank = self.trainer.global_rank


def _mode(split: str) -> Mode:
    return split if split in ("train", "predict") else "eval"
