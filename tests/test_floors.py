"""Imports go down only, and nobody above the pruners knows one of them by name."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_prune"

# The floor of each module or folder directly in the package; `cli` and `commands` are the top.
FLOORS = {
    **dict.fromkeys(
        [
            "errors",
            "asking",
            "files",
            "yaml_files",
            "ranges",
            "images",
            "shipped",
            "selection",
            "merging",
            "graphs",
            "moments",
            "cost",
            "trace",
            "step_cost",
            "training_cost",
            "training_plan",
            "budget",
        ],
        0,
    ),
    **dict.fromkeys(["pruners", "repair"], 1),
    **dict.fromkeys(["host", "loading", "methods", "plugin", "shapes", "vlm"], 2),
    **dict.fromkeys(
        [
            "training",
            "teaching",
            "training_checks",
            "optimizer",
            "replay",
            "checkpoints",
            "progress",
            "tracking",
            "objective",
            "evaluation",
            "comparison",
            "callbacks",
            "pictures",
            "data",
            "metrics",
            "scorers",
            "sweeps",
            "timing",
            "strategies",
            "blank",
            "debug_modes",
            "averaging",
        ],
        3,
    ),
    **dict.fromkeys(["cli", "commands", "__main__"], 4),
}
FRAMEWORKS = {"transformers", "lightning", "wandb", "deepspeed", "torchmetrics", "jsonargparse", "omegaconf"}
FREE = {"__init__", "micro"}  # the package's front door, and micro-LLaVA with a rule of its own
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
    """The concrete pruners: public classes of the files beside `base.py` that descend from one of `base.py`'s."""
    files = [p for p in (PACKAGE / "pruners").glob("*.py") if p.stem not in ("base", "__init__")]
    base = PACKAGE / "pruners" / "base.py"
    ancestors = {n.name for n in tree(base).body if isinstance(n, ast.ClassDef)} if base.exists() else set()
    classes = [n for p in files for n in tree(p).body if isinstance(n, ast.ClassDef)]
    found: set[str] = set()
    for _ in classes:  # as often as a chain of classes may be long
        parents = ancestors | found
        found |= {c.name for c in classes if any(isinstance(b, ast.Name) and b.id in parents for b in c.bases)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    used = parts_used(path) - {part}
    if part == "__init__":
        return
    if part == "micro":
        allowed = {p for p, floor in FLOORS.items() if floor == 0} | {"micro"}
        allowed |= {"host", "vlm", "pruners", "repair"} if path.stem == "evaluate" else set()
        assert used <= allowed, f"micro may import floor 0 only, not {sorted(used - allowed)}"
        return
    floor = FLOORS[part]
    above = {p for p in used - FREE if FLOORS[p] > floor}
    assert not above, f"{part} is on floor {floor}; above it: {sorted(above)}"
    assert floor >= 2 or "micro" not in used, "micro is for the floors from vlm up"


@pytest.mark.parametrize("path", [p for p in SOURCES if FLOORS.get(part_of(p), 9) <= 1], ids=lambda p: p.stem)
def test_lower_floors_know_no_framework(path: Path) -> None:
    used = {name.partition(".")[0] for name in modules_imported(path)} & FRAMEWORKS
    assert not used, f"pure tensor code imports {sorted(used)}"


def test_transformers_stays_in_host() -> None:
    """The decoder's and vision tower's insides are the host's affair; loading is vlm's; data knows processors."""
    rest = [p for p in SOURCES if part_of(p) in ("training", "metrics")]
    guilty = [p.name for p in rest if any(n.startswith("transformers.models") for n in modules_imported(p))]
    assert not guilty


def test_no_part_needs_itself() -> None:
    """Neighbours on a floor may import one another, but not in a circle."""
    needs: dict[str, set[str]] = {}
    for path in SOURCES:
        if part_of(path) != "__init__":
            needs.setdefault(part_of(path), set()).update(parts_used(path) - {part_of(path), "__init__"})
    TopologicalSorter(needs).prepare()  # raises CycleError


def test_every_part_has_a_floor() -> None:
    parts = {part_of(p) for p in SOURCES} - FREE
    assert parts <= set(FLOORS), f"no floor given to {sorted(parts - set(FLOORS))}"


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
