"""LightningDataModule of public benchmarks, on their official files as downloaded."""

import json
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lit_prune.data.benchmarks import benchmark as reader_of
from lit_prune.data.instruct import InstructData
from lit_prune.data.sources import Source
from lit_prune.data.sources.questions import Part, Questions
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.several import BenchmarkScores

Entry = str | dict[str, Any]


class BenchmarkData(InstructData):
    """Public benchmarks for `validate`, `test` and `predict`: official files, LLaVA-1.5's prompts, official scores.

    Batches are those of `InstructData`, in the order of the official files; `answers` are such as count as right.
    `test` logs all figures of a benchmark's rule as `test/LABEL/FIGURE`, by the scorer that `scorer` names; `predict`
    answers what an earlier, unfinished run has not answered, see `lit_prune.callbacks.WriteSubmissions`.

    Args:
        base: see `InstructData`.
        benchmark: which one, by its name, or several; docs/benchmarks.md has the names. In place of a name there may
            be `name`, `split`, `root` and options of the reader: {name: textvqa, ocr: true}.
        root: folder of the official files; with several benchmarks, of a folder for each, by its name.
        split: which part of the one benchmark, e.g. test-dev2015 of vqa; by default the one that is reported.
        pad_to_square: pad images to squares with the processor's mean colour before it sees them, as LLaVA-1.5 was
            evaluated; without it the processor's own way counts, which for LLaVA-1.5 crops the sides.
        system: system prompt, if any; LLaVA-1.5 was evaluated with vicuna_v1's.
        eval_batch_size: samples a batch, on each process.
        num_workers: worker processes that read images.
        prefetch_factor: batches that each worker reads ahead; by default torch's 2.
        max_length: most tokens a question may have; by default the context of the base model.
        max_bad_share: largest share of questions that can't be read; they are left out, and no figure is official then.

    Raises:
        LitPruneError: no such benchmark, split or option; a file or image that is missing, with where it is had; for
            validation and test, questions without public labels.
    """

    def __init__(
        self,
        base: str,
        benchmark: Entry | list[Entry],
        root: str | None = None,
        split: str | None = None,
        pad_to_square: bool = False,
        system: str | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        max_length: int | None = None,
        max_bad_share: float = 0.0,
    ):
        entries = _entries(benchmark, root, split)
        names = ", ".join(entry["name"] for entry in entries)
        super().__init__(
            base,
            val=names,
            test=names,
            predict=names,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            max_length=max_length,
            max_bad_share=max_bad_share,
        )
        self.entries, self.pad_to_square, self.system = entries, pad_to_square, system
        self._questions: Questions | None = None
        self.answered: Callable[[], Collection[int]] = tuple  # indices that `predict` need not answer again

    def scorer(self) -> BenchmarkScores:
        """The official scorers of the benchmarks."""
        parts = self.questions.parts
        return BenchmarkScores({part.label: (part.rule, part.labels.questions) for part in parts if part.rule})

    @property
    def questions(self) -> Questions:
        """The questions that were opened last. Raises LitPruneError if none were."""
        if self._questions is None:
            raise LitPruneError("BenchmarkData has no questions before `setup`")
        return self._questions

    def digest(self, part: Part) -> str:
        """Digest of a benchmark's questions and prompt settings, to recognise answers to exactly these."""
        asked = [(q.group, str(q.id), q.image, q.prompt) for q in part.labels.questions]
        settings = [self.system, self.pad_to_square, self.max_length, asked]
        return sha256(json.dumps(settings).encode()).hexdigest()

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Do as `InstructData`; if no question may be bad, stop at the first one that can't be read."""
        skipped = batch.get("skipped", [])
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if skipped and not self.max_bad_share:
            first = skipped[0]
            raise LitPruneError(
                f"{first.file}, question {first.sample}: {first.reason}. Without it no figure is official; "
                "data.max_bad_share=0.01 leaves such questions out"
            )
        return batch

    # Parts

    def _splits(self, stage: str) -> list[str]:
        if stage == "fit":
            raise LitPruneError("data: benchmarks are for validate, test and predict; fit needs data to train on")
        return super()._splits(stage)

    def _sources(self, split: str) -> list[Source]:
        (self._questions,) = opened = self.opened.pop(split) if split in self.opened else [self._read(split)]
        return opened

    def _read(self, split: str) -> Questions:
        parts = [_open(entry, scored=split != "predict") for entry in self.entries]
        labels = [part.label for part in parts]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise LitPruneError(f"data.benchmark: {twice[0]} is there twice")
        for part in parts:
            _check_images(part)
        return Questions(parts, self.system, answered=split != "predict")

    def _asked(self, split: str) -> int | Sequence[int]:
        answered = set(self.answered()) if split == "predict" else set()
        return [index for index in range(len(self.datasets[split])) if index not in answered]

    def _square(self) -> tuple[int, int, int] | None:
        if not self.pad_to_square:
            return None
        mean = getattr(getattr(self.processor, "image_processor", None), "image_mean", None)
        if mean is None or len(mean) != 3:
            raise LitPruneError(f"data.pad_to_square: {type(self.processor).__name__} has no mean colour to pad with")
        red, green, blue = (int(255 * value) for value in mean)  # rounded down, as LLaVA does
        return red, green, blue


def _entries(benchmark: Entry | list[Entry], root: str | None, split: str | None) -> list[dict[str, Any]]:
    """Name, reader, folder and split of each benchmark."""
    given = benchmark if isinstance(benchmark, list) else [benchmark]
    if not given:
        raise LitPruneError("data.benchmark: no benchmark is given")
    if split is not None and len(given) > 1:
        raise LitPruneError(
            "data.split is that of one benchmark; of several, write {name: ..., split: ...} in the list"
        )
    entries = []
    for each in given:
        entry = {"name": each} if isinstance(each, str) else dict(each)
        if not isinstance(entry.get("name"), str):
            raise LitPruneError(f"data.benchmark: {each} has no name; write the name, or {{name: ..., split: ...}}")
        if split is not None and "split" in entry:
            raise LitPruneError(f"data.split is {split}, and data.benchmark has {entry}: give one of them")
        options = {key: value for key, value in entry.items() if key not in ("name", "root", "split")}
        reader = reader_of(entry["name"], **options)
        folder = entry.get("root") or root
        if folder is None:
            raise LitPruneError(
                f"data.root is not given: the folder of {entry['name']}'s official files. {reader.source}"
            )
        path = Path(folder)
        if entry.get("root") is None and (len(given) > 1 or (path / entry["name"]).is_dir()):
            path = path / entry["name"]
        entries.append({"name": entry["name"], "reader": reader, "root": path, "split": entry.get("split") or split})
    return entries


def _open(entry: dict[str, Any], scored: bool) -> Part:
    """Read the questions of a benchmark. Raises LitPruneError, for scoring, if they have no public labels."""
    reader, split = entry["reader"], entry["split"]
    labels = reader.load(entry["root"], split)
    other = f"-{split}" if split and split != reader.splits[0] else ""
    label = f"{entry['name']}{other}{reader.label_suffix}".replace(",", "-").replace(".", "-")
    if scored and (reader.rule is None or not all(question.reference for question in labels.questions)):
        why = "is graded by GPT-4" if reader.rule is None else "has questions without public labels"
        raise LitPruneError(
            f"{labels.files[0]}: {label} {why}, so there is no score to compute here; `lightning predict` writes the "
            "file to submit"
        )
    return Part(label, reader, entry["root"], split, labels)


def _check_images(part: Part) -> None:
    """Raise LitPruneError if images are missing: with the first, how many there are, and where they are had."""
    images = {question.image: question for question in part.labels.questions if question.image}
    missing = []
    for question in images.values():
        try:
            part.reader.image(part.root, question, part.split)
        except LitPruneError as error:
            missing.append(str(error))
    if missing:
        raise LitPruneError(
            f"{len(missing)} of {len(images)} images of {part.label} are missing; the first: {missing[0]}"
        )
