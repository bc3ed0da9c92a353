"""The versions that are promised, locked and tested: pyproject.toml, constraints.txt, jobs/test_versions.sh."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tiny import ROOT

sys.path.insert(0, str(ROOT / "jobs"))
import constraints

from lit_prune.host import compat

LOCK = (ROOT / "constraints.txt").read_text().splitlines()
DIRECT = constraints.ranges()
INTERNALS = ("torch", "transformers", "lightning", "jsonargparse")  # libraries whose internals are used


def test_the_lock_is_names_and_exact_versions_alone():
    """No addresses, no local labels such as +cpu, no environment markers: any registry can serve it."""
    pins = [line for line in LOCK if not line.startswith("#")]
    assert len(pins) > 80
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)] == []


APART = ("gradio", "lmms-eval", "filelock", "vllm")  # in environments of their own: jobs/{demo,lmms_eval,vllm}.sh
TRACKERS = ("mlflow-skinny", "trackio")  # extras of a user's choice


def test_the_lock_holds_what_pyproject_admits():
    locked = constraints.locked()
    outside = {
        name: locked.get(name)
        for name, bound in DIRECT.items()
        if name not in ("bitsandbytes", *APART, *TRACKERS) and locked.get(name, "0") not in SpecifierSet(bound)
    }
    assert outside == {}  # else: bash jobs/lock.sh


@pytest.mark.parametrize("name", INTERNALS)
def test_a_library_whose_internals_are_used_has_an_upper_bound(name):
    assert any(spec.operator == "<" for spec in SpecifierSet(DIRECT[name]))


def test_every_dependency_has_a_lower_bound():
    assert {name: constraints.oldest(bound) for name, bound in DIRECT.items()}


def span(bound: str) -> str:
    """`>=5.19,<5.25` as a reader says it: `5.19 to 5.24`."""
    first = Version(constraints.oldest(bound))
    major, minor = next(Version(spec.version) for spec in SpecifierSet(bound) if spec.operator == "<").release
    ends = dict.fromkeys((f"{first.major}.{first.minor}", f"{major}.{minor - 1}"))
    return " to ".join(ends)


@pytest.mark.parametrize("name", INTERNALS)
def test_the_readme_says_which_versions_are_supported(name):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    supported = re.search(r"\*\*Supported:\*\*(.*?);", text)[1]
    assert f" {name} {span(DIRECT[name])}," in supported


def test_errors_name_the_range_of_transformers():
    assert span(DIRECT["transformers"]) == compat.TESTED
    assert DIRECT["transformers"] in str(compat.unsupported("it lacks something"))


@pytest.mark.parametrize(
    ("leg", "holds"),
    [
        ("oldest", lambda lines: f"transformers=={constraints.oldest(DIRECT['transformers'])}" in lines),
        ("newest", lambda lines: f"transformers{DIRECT['transformers']}" in lines),
        ("locked", lambda lines: "torch==2.13.0" in lines and "tokenizers" in " ".join(lines)),
        ("beyond", lambda lines: "transformers" in lines and "torch==2.13.0" in lines),
        ("torch-oldest", lambda lines: f"torch=={constraints.oldest(DIRECT['torch'])}" in lines),
        ("transformers==5.20.2 torch==2.14.1", lambda lines: {"transformers==5.20.2", "torch==2.14.1"} <= set(lines)),
    ],
)
def test_constraints_of_a_leg(leg: str, holds: Callable[[list[str]], bool]):
    lines = constraints.constraints(leg)
    assert holds(lines)
    assert len({line.partition("=")[0].partition("<")[0].partition(">")[0] for line in lines}) == len(lines)


def test_an_unknown_leg_is_refused():
    with pytest.raises(SystemExit, match="no such leg"):
        constraints.constraints("transfromers-oldest")


def test_what_is_admitted():
    assert constraints.admits("transformers==5.20.2")
    assert not constraints.admits("transformers==5.0.0")
    assert not constraints.admits("transformers==99.0")


@pytest.mark.versions
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("leg", ["oldest", "newest", *(f"{name}-oldest" for name in INTERNALS)])
def test_leg(leg):
    ran = subprocess.run(["bash", ROOT / "jobs" / "test_versions.sh", leg], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
