"""Sizes that a newcomer can read in one go: lines of files and functions, and parameters of signatures."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_prune"
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 7

# Each exception has a reason; one that is no longer needed fails too, so the lists only shrink.
OPTIONS = "a verb's parameters are its options"
VERBS = ("bench", "calibrate", "compare", "cost", "demo", "generate", "report", "score", "serve", "show")
HELP = "a verb's signature and docstring are its options and their help; the rest is short"
WALK = "one forward from its entrance to its end, in the order in which it is walked"
FILES = {
    **dict.fromkeys(["host/decoder.py", "host/layers.py"], WALK),
}
FUNCTIONS = {
    "commands.bench.run": HELP,
    "commands.compare.run": HELP,
    "commands.serve.run": HELP,
}
SIGNATURES = {
    **{f"commands.{verb}.run": OPTIONS for verb in VERBS},
    "vlm.load": "public entry point with keyword-only options",
}


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions below a node, those in classes and functions too, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inner, child
            yield from functions(child, inner)
        else:
            yield from functions(child, name)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without `self`; `*args` and `**kwargs` count as one each."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + sum(
        map(bool, (arguments.vararg, arguments.kwarg))
    )


def too_large() -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What is above each limit, with its size: files, functions, signatures of all but constructors."""
    files, lines, signatures = {}, {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text, file = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        files[file] = text.count("\n")
        for name, function in functions(ast.parse(text), file.removesuffix(".py").replace("/", ".")):
            lines[name] = function.end_lineno - function.lineno + 1
            if function.name != "__init__":
                signatures[name] = parameters(function)
    limits = ((files, FILE_LINES), (lines, FUNCTION_LINES), (signatures, PARAMETERS))
    return tuple({name: size for name, size in sizes.items() if size > limit} for sizes, limit in limits)


@pytest.mark.parametrize(
    ("kind", "allowed"), enumerate([FILES, FUNCTIONS, SIGNATURES]), ids=["files", "functions", "signatures"]
)
def test_nothing_is_larger_than_it_should_be(kind: int, allowed: dict[str, str]) -> None:
    found = too_large()[kind]
    assert found.keys() - allowed.keys() == set(), {name: found[name] for name in found.keys() - allowed.keys()}
    assert allowed.keys() - found.keys() == set(), "no longer too large: take these out of the list"
    assert all(allowed.values()), "an exception without a reason"
