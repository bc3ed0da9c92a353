"""How many files it takes to extend the package: a shipped example of each kind, and new ones made here."""

import ast
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from lit_prune.vlm import VLM

ROOT = Path(__file__).parents[1]
KINDS = {  # kind: (what a reader would search for, the files that mention it)
    "a method that scores": (
        ("CDPruner", "cdpruner"),
        {"lit_prune/pruners/cdpruner.py", "configs/pruners/cdpruner.yaml"},
    ),
    "a method that merges": (("ToMe", "tome"), {"lit_prune/pruners/tome.py", "configs/pruners/tome.yaml"}),
    "a method of the tower": (
        ("PruMergePlus", "prumerge", "prumerge_plus"),
        {"lit_prune/pruners/prumerge.py", "configs/pruners/prumerge_plus.yaml"},
    ),
    "a benchmark with a scorer of its own": (
        ("GQA", "gqa"),
        {"lit_prune/data/benchmarks/gqa.py", "lit_prune/evaluation/scorers/gqa.py", "configs/benchmarks/gqa.yaml"},
    ),
    # A class is found by its structure and tested with all others; only images of a shape of their own need a line.
    "a family": (("perception_lm", "PerceptionLM"), {"lit_prune/host/zoo/pixels.py"}),
    "a logged figure": (("flops/sample",), {"lit_prune/training/logging.py", "docs/logging.md"}),
}


def code_of(path: Path) -> str:
    """A file without what only people read: docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return re.sub(r"(?m)#.*$", "", text)
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body[0].value.value = ""
    return ast.unparse(tree)


def mentioned(words: tuple[str, ...]) -> set[str]:
    """Files of the package, its configurations and, for figures, its documentation that mention one of the words."""
    pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in words))
    files = [*(ROOT / "lit_prune").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml"), ROOT / "docs" / "logging.md"]
    return {path.relative_to(ROOT).as_posix() for path in files if pattern.search(code_of(path))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_example_stands_in_its_own_files_alone(kind):
    words, files = KINDS[kind]
    print(f"{kind}: {len(files)} files, {', '.join(sorted(files))}")
    assert mentioned(words) == files


SCORES = """
from lit_prune.pruners import Pruner

class Mine(Pruner):
    def score(self, context):
        return -context.ordinal.float()
"""
MERGES = """
import torch
from lit_prune.pruners import Kept, Pruner

class Mine(Pruner):
    needs_states = True

    def prune(self, context):
        mask = context.alive & (context.ordinal < 9)
        mean = context.states.mean(1, keepdim=True).expand_as(context.states)
        return Kept(mask, states=mean, sizes=torch.full(mask.shape, 4.0))
"""
TOWER = """
from lit_prune.pruners import Kept, VisionPruner

class Mine(VisionPruner):
    def prune_vision(self, context):
        return Kept(context.alive & (context.ordinal < context.count[:, None]))
"""
REPAIRS = """
from lit_prune.repair import RepairAdapter

class Mine(RepairAdapter):
    def forward(self, states, essence, answer_mask, adapter, most):
        return states + 1.0 * answer_mask[..., None]
"""
FASTV = "{class_path: lit_prune.pruners.fastv.FastV, init_args: {layers: [2], stage_ratios: [1.0], depth: null}}"
NEW = {
    "a method that scores": (SCORES, "{pruner: {class_path: MODULE.Mine, init_args: {layers: [0]}}, keep: 9}"),
    "a method that merges": (MERGES, "{pruner: {class_path: MODULE.Mine, init_args: {layers: [0]}}, keep: 9}"),
    "a method of the tower": (TOWER, "{pruner: {class_path: MODULE.Mine}, keep: 9}"),
    "a repair variant": (
        REPAIRS,
        f"{{pruner: {FASTV}, keep: 16, repair: {{class_path: MODULE.Mine, init_args: {{layers: [6], stages: [0]}}}}}}",
    ),
}


@pytest.mark.parametrize("kind", NEW)
def test_one_file_and_one_yaml_extend_it(kind, tiny_model, tmp_path, monkeypatch):
    """Nothing of the package is touched, and what was written runs."""
    source, model = NEW[kind]
    module = f"mine_{re.sub(r'[^a-z]', '_', kind)}"
    (tmp_path / f"{module}.py").write_text(source)
    (tmp_path / "mine.yaml").write_text(f"model: {model.replace('MODULE', module)}")
    monkeypatch.syspath_prepend(tmp_path)
    print(f"{kind}: 2 files")
    inputs = tiny.batch(tiny.samples())
    plain = tiny_model(**inputs).logits[:, -1]
    vlm = VLM(tiny_model, None).attach(tmp_path / "mine.yaml")
    logits, record = tiny.forward(vlm, inputs)
    vlm.detach()
    assert record.trace.average_visual().tolist() == pytest.approx([yaml.safe_load(model)["keep"]] * 3, abs=0.5)
    assert not torch.equal(logits[:, -1], plain)
