"""The notebook: from a model to a trained plug-in and a picture of what it keeps."""

import ast
import json
from importlib import import_module

from tiny import ROOT

from lit_prune.files.shipped import find_config

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
MINUTES = 3


def code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_are_python_with_names_that_exist():
    """Without running them: they compile, and what they import is there."""
    trees = [ast.parse(cell) for cell in code()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert {module for module, _ in found} >= {"lit_prune.micro", "lit_prune.cli"}
    for module, name in found:
        assert hasattr(import_module(module), name), f"{module}.{name}"
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {"micro.yaml", "divprune"} <= texts
    find_config("micro.yaml")
    find_config("divprune", "pruners")


def test_it_is_kept_without_outputs():
    """So that its diffs are those of its text."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_runs_in_three_minutes(tmp_path, monkeypatch):
    """Of its processor's time: other processes of the machine don't count."""
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(NOTEBOOK, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell("import time; print('seconds', time.process_time())"))
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in data for data in shown) == 2
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert [any(name in table for table in tables) for name in ("the plain model", "DivPrune", "RCP")] == [True] * 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert float(printed.split()[-1]) < 60 * MINUTES
    right = {
        line.rsplit(maxsplit=3)[0].strip(): int(line.split()[-3]) for line in printed.splitlines() if " of 40" in line
    }
    assert right["all tokens"] >= right["RCP"] > right["DivPrune"]
