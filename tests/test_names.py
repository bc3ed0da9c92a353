"""One word, one meaning: the values that a name may stand for, read off every annotation of the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_prune"

# Words that had several meanings, with what is left: where, and annotated how. Everything else has a name of its own.
MEANINGS = {
    "figures": (
        "",
        ("Figures", "Mapping[str, float]", "dict[str, float]", "def"),
    ),  # numbers by name; drawings are pages
    "floor": ("", ()),  # `attention_floor`, `variance_floor`; a learning rate ends at `final_lr`
    "gate": ("", ("Float", "Tensor")),  # straight-through, 0 or 1 in value; positions are an `answer_mask`
    "keep": ("", ("Budget", "int", "str", "Any", "list[Any]")),  # the budget; what stays is a `mask`
    "mass": ("ops/selection.py", ("float",)),  # of a softmax; RCP's `keep_mass`
    "moment": ("", ()),  # a run's step has a `StepKey`
    "moments": ("", ("def",)),  # mean and variance
    "places": ("data/stream.py", ("list[Place]",)),  # where a stream reads; a model has `ModelParts`
    "shape": ("micro/", ("str",)),  # of a drawn thing; stages have `stage_ratios`
    "spare": ("", ()),  # soft training has `contenders`
    "vision_shape": ("", ()),
}


def annotated() -> Iterator[tuple[str, str, str]]:
    """(file, name, annotation) of each parameter and field of the package, `def` for functions and classes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.annotation is not None:
                yield file, node.arg, ast.unparse(node.annotation)
            elif isinstance(node, ast.AnnAssign):
                yield file, getattr(node.target, "id", getattr(node.target, "attr", "")), ast.unparse(node.annotation)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield file, node.name, "def"


USES = list(annotated())


@pytest.mark.parametrize("word", MEANINGS)
def test_a_word_has_one_meaning(word: str) -> None:
    where, kinds = MEANINGS[word]
    uses = [(file, kind.removesuffix(" | None")) for file, name, kind in USES if name == word]
    others = [(f, k) for f, k in uses if not f.startswith(where) or not all(part in kinds for part in alternatives(k))]
    assert not others
    assert bool(uses) == bool(kinds), "the table says what there is"


def alternatives(annotation: str) -> list[str]:
    """`int | str` is two; of a tensor its class without the shape."""
    parts = [part.strip() for part in annotation.split(" | ")]
    return parts if "Tensor, " not in annotation else [annotation.partition("[")[0]]


def test_no_module_has_an_old_name() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {
        path.stem for path in PACKAGE.parent.glob("configs/**/*.yaml")
    }
    assert not names & {"places", "mass", "dcp_mass"}
    assert not {name for _, name, _ in USES} & {"Moment", "Places", "MassGivenBack"}
