"""Imports go down only, and nobody above the pruners knows one of them by name."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_prune"

# The rooms of the package, lowest first: each imports itself and those below it. `__init__` is the front door.
ROOMS = [
    "errors", "ops", "files", "micro", "pruners", "repair", "cost", "host", "loading", "plugin", "vlm", "evaluation",
    "data", "training", "callbacks", "commands", "cli", "__main__",
]  # fmt: skip
ORDER = {room: place for place, room in enumerate(ROOMS)}
ENTRIES = 20  # at most so many modules, folders and files in the package itself
CONTRACT = ("__init__", "base", "contexts", "method", "tower", "full")  # of pruners; `Full` is the null method
FRAMEWORKS = {"transformers", "lightning", "wandb", "deepspeed", "torchmetrics", "jsonargparse", "omegaconf"}
KNOWS_TRANSFORMERS = {"host", "loading", "micro/model"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, relative ones resolved; for `from a import b` both a and a.b."""
    package = ["lit_prune", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_used(path: Path) -> set[str]:
    """The parts of our own package that a file imports: `lit_prune.data.x` is `data`."""
    known = {p.stem for p in PACKAGE.iterdir()}
    names = (name.split(".") for name in modules_imported(path))
    return {name[1] for name in names if name[0] == "lit_prune" and len(name) > 1 and name[1] in known}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def pruner_classes() -> set[str]:
    """The concrete pruners: public classes of the files beside the contract's that descend from one of those."""
    files = [p for p in (PACKAGE / "pruners").glob("*.py") if p.stem not in CONTRACT]
    contract = [PACKAGE / "pruners" / f"{name}.py" for name in CONTRACT]
    ancestors = {n.name for p in contract for n in tree(p).body if isinstance(n, ast.ClassDef)}
    classes = [n for p in files for n in tree(p).body if isinstance(n, ast.ClassDef)]
    found: set[str] = set()
    for _ in classes:  # as often as a chain of classes may be long
        parents = ancestors | found
        found |= {c.name for c in classes if any(isinstance(b, ast.Name) and b.id in parents for b in c.bases)}
    return {name for name in found if not name.startswith("_")}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) != "__init__"], ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    """All of a room may be imported by those above it, so there is no circle between rooms."""
    room = part_of(path)
    above = {used for used in parts_used(path) - {room, "__init__"} if ORDER[used] > ORDER[room]}
    assert not above, f"{room} may not import {sorted(above)}, which stand above it"


def test_modules_of_a_room_form_no_circle() -> None:
    """Nor do those at the top of the package; imports in functions count too."""
    needs: dict[str, set[str]] = {}
    known = {name_of(path).removesuffix("/__init__").replace("/", "."): path for path in SOURCES}
    for module, path in known.items():
        found = {name.removeprefix("lit_prune.") for name in modules_imported(path) if name.startswith("lit_prune.")}
        needs[module] = {name for name in found & set(known) if name != module and not module.startswith(f"{name}.")}
    TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("path", [p for p in SOURCES if ORDER.get(part_of(p), 99) <= ORDER["cost"]], ids=name_of)
def test_lower_rooms_know_no_framework(path: Path) -> None:
    used = {name.partition(".")[0] for name in modules_imported(path)} & FRAMEWORKS
    allowed = {"transformers"} if name_of(path) in KNOWS_TRANSFORMERS else set()
    assert used <= allowed, f"{name_of(path)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_transformers_is_known_in_three_places(path: Path) -> None:
    """The host knows its insides, loading its doors, and micro-LLaVA is one of its models."""
    knows = part_of(path) in KNOWS_TRANSFORMERS or name_of(path) in KNOWS_TRANSFORMERS
    assert knows or not any(name.partition(".")[0] == "transformers" for name in modules_imported(path))


def test_every_part_is_a_room() -> None:
    assert {part_of(p) for p in SOURCES} - {"__init__"} == set(ROOMS)
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES, f"{len(entries)} entries: {sorted(entries)}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if part_of(p) != "pruners"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_nobody_knows_a_pruner_by_name(path: Path) -> None:
    """No import of, and no `isinstance` on, a concrete pruner outside `lit_prune/pruners`."""
    concrete = pruner_classes()
    imported = {name.rpartition(".")[2] for name in modules_imported(path) if name.startswith("lit_prune.")}
    assert not imported & concrete
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            tested = {n.id for a in node.args[1:] for n in ast.walk(a) if isinstance(n, ast.Name)}
            tested |= {n.attr for a in node.args[1:] for n in ast.walk(a) if isinstance(n, ast.Attribute)}
            assert not tested & concrete, f"line {node.lineno} tests for {sorted(tested & concrete)}"


def test_the_rules_bite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative and late imports are seen."""
    package = tmp_path / "lit_prune"
    (package / "host").mkdir(parents=True)
    (package / "training.py").touch()
    (package / "vlm.py").touch()
    late = package / "host" / "x.py"
    late.write_text("def f():\n    from ..training import step\n    from .. import vlm\n")
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert parts_used(late) == {"training", "vlm"}
