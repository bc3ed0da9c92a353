"""SEED-Bench: multiple choice about images (types 1 to 9) and videos (types 10 to 12)."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import LETTER, Benchmark, Labels, lettered, lines
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_records, take
from lit_prune.evaluation.scorers.rule import Question
from lit_prune.evaluation.scorers.seedbench import question

OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")
FIELDS = ("question_id", "question_type_id", "data_type", "data_id", "question", "answer", *OPTIONS)


class SeedBenchFiles(Benchmark):
    """`SEED-Bench.json`; images in `SEED-Bench-image`, middle frames of videos in `SEED-Bench-video-image`.

    A split is all, or the questions about images or videos alone.
    """

    rule = "seedbench"
    source = "SEED-Bench is at https://huggingface.co/datasets/AILab-CVC/SEED-Bench (CC BY-NC 4.0)."
    splits = ("all", "image", "video")
    submission = "submission.jsonl"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        path = official(root, ["SEED-Bench.json"], self.source)
        questions = []
        for index, (place, record) in enumerate(read_records(path, "questions")):
            number, topic, kind, data, text, _, *options = take(record, place, *FIELDS)
            if split in ("all", kind):
                prompt = lines(text, lettered(options), LETTER)
                image = f"SEED-Bench-image/{data}"
                if kind == "video":  # the middle frame, as LLaVA's extract_video_frames.py names it
                    image = f"SEED-Bench-video-image/{topic}_{number}.png"
                questions.append(question({**record, "data_id": image}, index=index, prompt=prompt))
        return Labels(questions, [path])

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """JSON lines of `question_id` and `prediction`, as LLaVA's convert_seed_for_submission.py writes them."""
        records = [{"question_id": question.id, "prediction": answer} for question, answer in answers]
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


BENCHMARK = SeedBenchFiles()
