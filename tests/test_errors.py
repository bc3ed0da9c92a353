"""Messages about optional dependencies."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError

import pytest
from tiny import ROOT

from lit_prune import errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "jobs", "configs", "lit_prune", "tests") for path in (ROOT / folder).rglob("*.*")),
]


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_is_installed_from_the_clone_or_by_its_packages(name, monkeypatch):
    metadata = [f'{package}; extra == "{extra}"' for extra, packages in EXTRAS.items() for package in packages]
    monkeypatch.setattr(errors, "requires", lambda _: [*PROJECT["dependencies"], *metadata])
    clone, _, packages = errors.extra(name).partition(", or pip install ")
    assert clone == f"pip install -e '.[{name}]' in the clone of lit_prune"
    own = [package for package in EXTRAS[name] if not package.startswith("lit-prune")]
    assert packages == " ".join(f"'{package}'" for package in own)


def test_several_extras_and_a_package_that_is_not_installed(monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(errors, "requires", missing)
    assert errors.extra("quantized", "peft") == "pip install -e '.[quantized,peft]' in the clone of lit_prune"


def test_nothing_tells_anyone_to_install_the_project_by_name():
    """The name is on no index: whoever claims it there would be installed."""
    readable = [path for path in TEXTS if path.suffix in (".md", ".py", ".yaml", ".sh", ".sbatch", ".txt", ".toml")]
    assert len(readable) > 300
    wrong = re.compile(r"""pip3? install (?:-\S+ )*["']?lit[-_]prune""")
    guilty = [path for path in readable if wrong.search(path.read_text(encoding="utf-8"))]
    assert guilty == []
