"""Is this model a fair stage for pruning? Gates on held-out scenes of the training side, as one command.

`python jobs/micro_576/gates.py WEIGHTS` measures the model with all tokens and without its image, two oracles, the
controls and DivPrune, prints what was found beside each gate (`gates.md` for the card), and ends with 1 if a gate is
missed. No other method is measured here: the world and the recipe are tuned on these figures, and nothing else may
depend on that choice.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs as a file, and methods of this folder are found

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from jobs.micro_576.batches import NONE, Batch, question_batch
from jobs.micro_576.figures import attention_auc, word_auc
from jobs.micro_576.losses import background_likeness, read, see
from lit_prune.commands import compare
from lit_prune.evaluation.tables import means
from lit_prune.files.writing import written_whole
from lit_prune.micro.questions_576 import SKILLS, as_sample, choose_questions
from lit_prune.micro.scenes_576 import GATE_SEED, make_scene

PRUNERS = Path(__file__).parent / "pruners"
BOUND, OBJECTS = "half background", "objects"
CONTROLS = ("random", "uniform", "downsample", f"DivPrune={PRUNERS / 'divprune.yaml'}")  # what room is measured against
COUNTED = ("counting", "dots")
LOW, HIGH = 16, 32
COSINE, BOUND_SHARE, ROOM, AUC, FULL = 0.3, 0.9, 0.10, (0.6, 0.8), 0.95


def write_questions(folder: Path, scenes: int, seed: int = GATE_SEED) -> Path:
    """Held-out scenes and one question of each skill as instruction data."""
    path = folder / f"questions_{seed}_{scenes}.json"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for each in range(seed, seed + scenes):
        scene, name = make_scene(each), f"images/{each}.png"
        scene.image().save(folder / name)
        questions = choose_questions(scene, len(SKILLS))
        samples += [as_sample(f"{each}-{i}", name, question) for i, question in enumerate(questions)]
    with written_whole(path) as file:
        file.write_text(json.dumps(samples), encoding="utf-8")
    return path


def compared(weights: Path, folder: Path, questions: Path) -> list[dict]:
    """Rows of `lit-prune compare` on these questions, the mean of each method's draws; resumed where it was cut off."""
    config = folder / "gates.yaml"
    data = {"val": str(questions), "images": str(folder), "eval_batch_size": 18, "num_workers": 0}
    model = {"base": str(weights), "keep": LOW, "max_new_tokens": 5}
    settings = {
        "seed_everything": 0,
        "model": model | {"pruner": {"class_path": "lit_prune.pruners.random.Random"}, "repair": None},
        "data": {"class_path": "lit_prune.data.InstructData", "init_args": data},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    oracles = [f"{name}={PRUNERS / name.replace(' ', '_')}.yaml" for name in (BOUND, OBJECTS)]
    out = folder / "compare"
    compare.run([str(config)], ["full", *oracles, *CONTROLS], [HIGH, LOW], seeds=[0, 1, 2], out=out)
    return means(json.loads((out / "results.json").read_text(encoding="utf-8")))


def counts_given(rows: list[dict], samples: Path) -> list[list[str]]:
    """Answers of the bound at the low budget to questions that count, by right answer: are they too high or too low?"""
    cell = next(row["cell"] for row in rows if (row["method"], row["keep"]) == (BOUND, LOW))
    given: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for line in (samples / f"{cell}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["skill"] in COUNTED:
            given[record["skill"], record["reference"]][record["answer"]] += 1
    lines = [
        [skill, right, ", ".join(f"{answer}: {times}" for answer, times in sorted(answers.items()))]
        for (skill, right), answers in sorted(given.items())
    ]
    return [[f"{BOUND} at {LOW}", "right answer", "answers given"], *lines]


@torch.no_grad()
def right_answers(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor) -> dict[str, list[bool]]:
    """Correctness of each whole answer by skill, as by greedy generation."""
    wrong = (model.lm_head(read(model, batch, visual)).argmax(-1) != batch.labels) & (batch.labels != NONE)
    found = defaultdict(list)
    for b, asked in enumerate(batch.questions):
        for number, question in enumerate(asked, 1):
            found[question.skill].append(not bool(wrong[b][batch.segments[b] == number].any()))
    return found


@torch.no_grad()
def inner_figures(model: LlavaForConditionalGeneration, scenes: int, seed: int = GATE_SEED) -> dict:
    """Blind accuracy over all and by skill, mean cosine among background tokens, AUC of words and of attention."""
    blind, cosines, aucs, attended = defaultdict(list), [], [], []
    for each in tqdm(range(seed, seed + scenes), "scenes"):
        batch = question_batch([each], None, 1)
        visual = see(model, batch.pixels)
        cosines.append(background_likeness(visual, batch.patches["colour"] > 0))
        aucs += word_auc(model, visual, batch)
        attended.append(attention_auc(model, visual, batch))
        for skill, right in right_answers(model, batch, see(model, torch.zeros_like(batch.pixels))).items():
            blind[skill] += right
    every = [one for right in blind.values() for one in right]
    return {
        "blind": sum(every) / len(every),
        "blind by skill": {skill: sum(right) / len(right) for skill, right in blind.items()},
        "background cosine": sum(cosines) / len(cosines),
        "word AUC": sum(aucs) / len(aucs),
        "attention AUC": [sum(map(sum, layer)) / sum(map(len, layer)) for layer in zip(*attended, strict=True)],
    }


def judge(rows: list[dict], inner: dict) -> list[tuple[str, str, str, bool]]:
    """Each gate: what it is about, what was found, what is asked for, and whether it is passed."""
    accuracy = {(row["method"], row["keep"]): row["accuracy"] for row in rows if row["status"] == "measured"}
    full = next(value for (method, _), value in accuracy.items() if method == "full")
    gain = full - inner["blind"]
    bound = {keep: (accuracy[BOUND, keep] - inner["blind"]) / gain if gain > 0 else 0.0 for keep in (LOW, HIGH)}
    others = {method: value for (method, keep), value in accuracy.items() if keep == HIGH and method in _titles(rows)}
    best = max(others, key=others.get)
    room = accuracy[BOUND, HIGH] - others[best]
    return [
        ("full accuracy", f"{full:.3f}", f">= {FULL}", full >= FULL),
        ("mean cosine of background", f"{inner['background cosine']:.3f}", f"<= {COSINE}",
         inner["background cosine"] <= COSINE),
        (f"{BOUND} at {LOW}, of full - blind", f"{bound[LOW]:.3f}", f">= {BOUND_SHARE}", bound[LOW] >= BOUND_SHARE),
        (f"room at {HIGH} above {best}", f"{100 * room:.1f} points", f">= {100 * ROOM:.0f} points", room >= ROOM),
        ("AUC of words against asked patches", f"{inner['word AUC']:.3f}", f"{AUC[0]} to {AUC[1]}",
         AUC[0] <= inner["word AUC"] <= AUC[1]),
    ]  # fmt: skip


def _titles(rows: list[dict]) -> set[str]:
    """Names of the controls and DivPrune in the rows: all but the full model and the oracles."""
    return {row["method"] for row in rows} - {"full", BOUND, OBJECTS}


def tables_of(rows: list[dict], inner: dict, gates: list[tuple[str, str, str, bool]]) -> list[list[list[str]]]:
    """The gates, accuracies in percent by skill, and AUC of attention by layers: cells with a header each."""
    verdicts = [[*each, "passed" if good else "**missed**"] for *each, good in gates]
    judged = [["gate", "found", "asked for", ""], *verdicts]
    measured = [
        (row["method"], str(row["keep"] or ""), row["accuracy"], row["per_skill"])
        for row in rows
        if row["status"] == "measured"
    ]
    percents = [["", "tokens", "all", *SKILLS]]
    for name, keep, every, skills in [*measured, ("blank image", "", inner["blind"], inner["blind by skill"])]:
        cells = [f"{100 * skills[skill]:.0f}" if skill in skills else "" for skill in SKILLS]
        percents.append([name, keep, f"{100 * every:.1f}", *cells])
    found = inner["attention AUC"]
    attention = [["layers", "AUC of attention"]]
    for first in range(0, len(found), 8):
        some = found[first : first + 8]
        attention.append([f"{first} to {first + len(some) - 1}", ", ".join(f"{value:.2f}" for value in some)])
    return [judged, percents, attention]


def show(tables: list[list[list[str]]], console: Console) -> None:
    """Print the tables."""
    for header, *lines in tables:
        table = Table(*header)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def as_markdown(tables: list[list[list[str]]]) -> str:
    """The tables as the model's card has them."""
    parts = []
    for header, *lines in tables:
        rows = [header, ["---"] * len(header), *lines]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the gates of a fair stage on held-out training-side scenes.")
    parser.add_argument("weights", type=Path, help="folder of the model")
    parser.add_argument("--scenes", type=int, default=30, help="held-out scenes, 18 questions each (default 30)")
    parser.add_argument("--out", type=Path, help="folder for questions and results (default: gates/ beside the model)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    weights = options.weights.resolve()
    folder = (options.out or weights.parent / "gates").resolve()
    questions = write_questions(folder, options.scenes)
    model = AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32).eval()
    inner = inner_figures(model, options.scenes)
    rows = compared(weights, folder, questions)
    gates = judge(rows, inner)
    tables = [*tables_of(rows, inner, gates), counts_given(rows, folder / "compare" / "samples")]
    show(tables, Console(width=220))
    with written_whole(folder / "gates.md") as file:
        file.write_text(as_markdown(tables), encoding="utf-8")
    report = {"gates": [dict(zip(("gate", "found", "asked for", "passed"), each, strict=True)) for each in gates]}
    with written_whole(folder / "gates.json") as file:
        file.write_text(json.dumps(report | inner | {"rows": rows}, indent=1), encoding="utf-8")
    return 0 if all(good for *_, good in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
