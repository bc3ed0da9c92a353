"""The snippets of docs/loading.md that can run offline do, one after the other in one namespace."""

import re
import shutil

from tiny import ROOT

DOCUMENT = ROOT / "docs" / "loading.md"


def test_snippets_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    vlm = namespace["vlm"]
    assert vlm.host.keep == 16


def test_numbers_beside_snippets():
    """The schedule that a comment shows is the one that comes out."""
    import lit_prune

    vlm = lit_prune.load("llava-hf/llava-1.5-7b-hf", random_weights=True, device="meta")
    vlm.attach(ROOT / "configs" / "models" / "llava-1.5-7b.yaml")
    assert f"# {vlm.host.schedule}: 64 on average" in DOCUMENT.read_text(encoding="utf-8")
