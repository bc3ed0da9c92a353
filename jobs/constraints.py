"""Write pip constraints for one leg of jobs/test_versions.sh, from the ranges of pyproject.toml and the lock.

python jobs/constraints.py oldest | newest | locked | beyond | PACKAGE-oldest | PACKAGE-newest | PACKAGE==VERSION ...
python jobs/constraints.py --admits PACKAGE==VERSION    exits with 0 if pyproject.toml admits it
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"[A-Za-z0-9._-]+")


def ranges() -> dict[str, str]:
    """{package: specifiers} of the direct dependencies, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pairs = (re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[.*?\])?\s*(.*)", line.split(";")[0].strip()) for line in wanted)
    return {same(pair[1]): pair[2] for pair in pairs if same(pair[1]) != "lit-prune"}


def same(name: str) -> str:
    """A package's name in the one form that compares equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """{package: version} of the lock."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {same(line.split("==")[0]): line.split("==")[1] for line in lines if line and not line.startswith("#")}


def oldest(specifiers: str) -> str:
    """The lower bound of a range."""
    return re.search(r">=\s*([^,\s]+)", specifiers)[1]


def constraints(leg: str) -> list[str]:
    """Lines for pip's -c of one leg."""
    bounds, lock = ranges(), locked()
    if leg == "oldest":
        return [f"{name}=={oldest(bound)}" for name, bound in bounds.items()]
    if leg == "newest":
        return [f"{name}{bound}" for name, bound in bounds.items()]
    pins = {}
    if leg == "beyond":
        pins["transformers"] = "transformers"
    elif leg != "locked":
        for word in leg.split():
            name, end = same(re.split(r"==|-(?=oldest$|newest$)", word)[0]), word[-6:]
            if name not in bounds:
                raise SystemExit(f"no such leg or dependency: {word}\n{__doc__}")
            version = {"oldest": f"=={oldest(bounds[name])}", "newest": bounds[name]}.get(end)
            pins[name] = f"{name}{version}" if version else word
    # Without one package of the lock, what the others need may change too: only direct dependencies stay as locked.
    kept = [f"{name}=={version}" for name, version in lock.items() if name not in pins and (name in bounds or not pins)]
    return sorted([*kept, *pins.values()])


def admits(pin: str) -> bool:
    """True if pyproject.toml's range holds `PACKAGE==VERSION`."""
    name, version = pin.split("==")
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # a bare Python: pip carries its own copy
        from pip._vendor.packaging.specifiers import SpecifierSet
    return version in SpecifierSet(ranges()[same(name)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--admits"]:
        sys.exit(not admits(sys.argv[2]))
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n".join(constraints(" ".join(sys.argv[1:]))))
