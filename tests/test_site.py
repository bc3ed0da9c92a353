"""The documentation site: what it takes from elsewhere, and that faults in links, anchors and names fail its build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

pytest.importorskip("mkdocs", reason="the extra `docs`, which `dev` brings")

FILES = ["mkdocs.yml", "pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"]
FILES += ["jobs/site.sh", "jobs/site_pages.py", "jobs/README.md"]
FILES += ["lit_prune/micro/weights/README.md", "lit_prune/micro/weights_576/README.md"]


@pytest.fixture
def clone(tmp_path) -> Path:
    """What the site is made of, without the pages of the API, which take most of the time."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for page in (tmp_path / "docs" / "api").iterdir():
        page.write_text("# A page\n")
    return tmp_path


def build(clone: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VENV": str(Path(sys.executable).parents[1])}
    command = ["bash", clone / "jobs" / "site.sh"]
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def test_the_site(clone):
    ran = build(clone)
    assert ran.returncode == 0, ran.stdout
    site = clone / "build" / "site"
    pages = {path.name: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    sources = [path.stem for path in (ROOT / "docs").glob("*.md")]
    elsewhere = ["index", "contributing", "changelog", "jobs", "micro", "micro_576"]
    assert {f"{name}.html" for name in [*sources, *elsewhere]} <= set(pages)
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', page), name
        assert not re.search(r"<p>[^<]*\n- ", page), f"{name}: a list is shown as text"
    assert 'href="comparison.html#why-the-order-differs-from-the-papers"' in pages["index.html"]
    assert 'src="images/kept.png"' in pages["index.html"]
    assert (site / "images" / "kept.png").exists()


FAULTS = {
    "a page": ("docs/cost.md", "[x](nowhere.md)", "nowhere.md"),
    "an anchor": ("docs/cost.md", "[x](models.md#no-such-place)", "no-such-place"),
    "an image": ("docs/cost.md", "![x](images/nothing.png)", "nothing.png"),
    "an anchor on its own page": ("docs/cost.md", "[x](#not-here)", "not-here"),
    "a page of the README": ("README.md", "[x](docs/absent.md)", "docs/absent.md"),
    "an anchor of the README": ("README.md", "[x](docs/cost.md#nor-this)", "nor-this"),
    "the README's picture": ("README.md", '<img src="docs/images/no.png" alt="">', "no.png"),
    "a file that is no page": ("jobs/README.md", "[x](../pyproject.toml)", "no page of the site"),
    "a table": ("docs/data.md", "text\n    | a | b |\n    |---|---|\n", "a table that is shown as text"),
    "a page that nothing leads to": ("docs/orphan.md", "# Orphan", "orphan.md"),
}


def test_every_fault_is_named_and_fails_the_build(clone):
    for path, text, _ in FAULTS.values():
        with (clone / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    ran = build(clone)
    assert ran.returncode != 0
    warnings = "\n".join(line for line in ran.stdout.splitlines() if "WARNING" in line or line.startswith(" "))
    assert [fault for fault, (*_, named) in FAULTS.items() if named not in warnings] == [], ran.stdout


def test_a_name_that_is_not_in_the_package_fails_the_build(clone):
    (clone / "docs" / "api" / "cost.md").write_text("# Costs\n\n::: lit_prune.cost.prices\n")
    ran = build(clone)
    assert ran.returncode != 0
    assert "lit_prune.cost.prices" in ran.stdout
