"""Write answers of `predict` to benchmarks: batch by batch, resumable, and joined into submissions."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.callbacks.answers import rank_file
from lit_prune.data import BenchmarkData
from lit_prune.data.sources.questions import Part, key_of
from lit_prune.evaluation.scorers import Question
from lit_prune.files.writing import written_whole
from lit_prune.training.debug_modes import leaves_no_trace

ANSWERS, MADE_BY = rank_file("answers", 0), "made_by.json"


class WriteSubmissions(Callback):
    """Write a folder for each benchmark that `predict` answers: `answers.jsonl`, and the file that its server takes.

    Answers are written batch by batch, by rank 3 to `answers.rank3.jsonl`. A run that was cut short and is started once
    more, on any number of ranks, answers only the missing questions. At the end rank 0 joins the answers in the order
    of the official files, and writes the submission once there is an answer to every question. Nothing is overwritten:
    `made_by.json` says which plug-in, settings and questions a folder's answers belong to, and others get a folder of
    their own, `pope_2`.

    `lit-prune score` takes the folder, or either file.

    Args:
        folder: of these folders; by default the run's.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._files: dict[str, AnswerFiles] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pass a callback for answered questions to the data module, called once weights and settings are known."""
        self._files = {}
        data = getattr(trainer, "datamodule", None)
        if stage == "predict" and isinstance(data, BenchmarkData):
            data.answered = tuple if leaves_no_trace(trainer) else partial(self._begin, trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Append the answers of a batch."""
        if not self._files:
            return
        lines: dict[str, list[str]] = {}
        for output, record in zip(outputs, batch["records"], strict=True):
            part, question = trainer.datamodule.questions.place(record)
            lines.setdefault(part.label, []).append(line_of(question, output["answer"]))
        for label, found in lines.items():
            self._files[label].add(trainer.global_rank, found)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the answers of all ranks."""
        if self._files:
            trainer.strategy.barrier("WriteSubmissions")
            self._finish(trainer)

    def _begin(self, trainer: Trainer, module: LightningModule) -> list[int]:
        """Indices of questions answered by an earlier run. A collective: all ranks must call it."""
        root, questions = self.folder or Path(trainer.default_root_dir), trainer.datamodule.questions
        folders: dict[str, Path] = {}
        done: list[int] = []
        if trainer.is_global_zero:
            made_by, places = _made_by(module), questions.indices()
            for part in questions.parts:
                asked = {"questions": trainer.datamodule.digest(part)}
                folders[part.label] = folder = _own_folder(root / part.label, made_by | asked)
                done += [places[part.label, key] for key in AnswerFiles(folder, part).join()]
        folders, done = trainer.strategy.broadcast((folders, done))
        self._files = {part.label: AnswerFiles(folders[part.label], part) for part in questions.parts}
        if done:
            rank_zero_info(f"{len(done)} of {len(questions)} questions are answered already, in {root}")
        if len(done) == len(questions):  # Lightning ends a run without a batch before it begins
            self._finish(trainer)
        return done

    def _finish(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for files in self._files.values():
                rank_zero_info(files.finish())
        trainer.strategy.barrier("submissions")


def _made_by(module: LightningModule) -> dict[str, Any]:
    """Everything but the questions that determines the answers: plug-in and weights, model, length limit."""
    digest = sha256()
    for name, value in sorted(module.plugin.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    model = {"dtype": str(module.vlm.model.dtype), "max_new_tokens": module.max_new_tokens}
    found = {**module.plugin.settings(), **model, "weights": digest.hexdigest()}
    return json.loads(json.dumps(found, default=str))


def _own_folder(path: Path, made_by: dict[str, Any]) -> Path:
    """Find or create the first of `pope`, `pope_2`, ... that is empty or has answers of the same origin."""
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        note, used = folder / MADE_BY, any(folder.glob("*"))
        if not used or (note.exists() and json.loads(note.read_text(encoding="utf-8")) == made_by):
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(note) as file:
                file.write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
            return folder
    raise AssertionError("there is always another number")


def line_of(question: Question, answer: str) -> str:
    """Convert an answer to a line of `answers.jsonl`, with all keys of its question."""
    group = {"category": question.group} if question.group else {}
    image = {"image": question.image} if question.image else {}
    record = {"id": str(question.id), **group, **image, "question": question.prompt, "answer": answer}
    return json.dumps(record, ensure_ascii=False) + "\n"


@dataclass
class AnswerFiles:
    """Folder of one benchmark's answers."""

    folder: Path
    part: Part

    def add(self, rank: int, lines: Iterable[str]) -> None:
        """Append lines to a rank's file and flush them, so that they survive the process."""
        with (self.folder / rank_file("answers", rank)).open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def finish(self) -> str:
        """Join the ranks' files, write the submission if all is answered, and return a message."""
        answers, asked = self.join(), self.part.labels.questions
        text = f"{self.part.label}: {len(answers)} of {len(asked)} questions are answered in {self.folder / ANSWERS}"
        if len(answers) < len(asked):
            return f"{text}; run the same command once more for the others"
        if (name := self.part.reader.submission) is None:
            return text
        path = self.folder / name
        pairs = [(question, self.part.processed(answers[key_of(question)])) for question in asked]
        with written_whole(path) as file:
            file.write_text(self.part.reader.submitted(pairs, self.part.root, self.part.split), encoding="utf-8")
        return f"{text}; to submit: {path}"

    def join(self) -> dict[tuple[str, str], str]:
        """Join the complete lines of all ranks in one file, in the order of the questions; return answers by key.

        A line that was cut short is left out, and its question asked once more.
        """
        parts, found = sorted(self.folder.glob("answers*.jsonl")), {}
        for path in parts:
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = json.loads(line)
                found.setdefault((record.get("category", ""), record["id"]), record["answer"])
        asked = {key_of(question): question for question in self.part.labels.questions}
        answers = {key: found[key] for key in asked if key in found}
        with written_whole(self.folder / ANSWERS) as file:
            file.write_text("".join(line_of(asked[key], text) for key, text in answers.items()), encoding="utf-8")
        for path in parts:
            if path.name != ANSWERS:
                path.unlink()
        return answers
