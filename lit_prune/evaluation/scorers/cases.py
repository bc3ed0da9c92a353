"""Frozen cases: inputs with the values that an official scorer computed for them."""

import json
from math import isclose
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.files import read_json
from lit_prune.evaluation.scorers.rule import Rule

TOLERANCE = 1e-12  # relative: the official scripts' sums round differently from Python 3.12 on


def check(rule: Rule, path: Path) -> int:
    """Compare a rule with every case of a file; returns how many there are.

    Raises:
        LitPruneError: the first difference, or a file that does not hold cases of this rule.
    """
    content = read_json(path)
    cases = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(cases, list) or not cases:
        raise LitPruneError(
            f'{path}: no cases; a list of them, or an object with such a list under "cases" is expected'
        )
    for number, case in enumerate(cases):
        where = f"{path}: case {case.get('id', number) if isinstance(case, dict) else number}"
        if difference := compare(*evaluate(rule, case, where)):
            raise LitPruneError(f"{where} ({case['kind']}){difference}; the case: {_short(case)}")
    return len(cases)


def evaluate(rule: Rule, case: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Expected and actual result of a case; an error is {"error": its text}."""
    if not isinstance(case, dict) or not isinstance(case.get("kind"), str):
        raise LitPruneError(f'{where}: an object with a "kind" is expected')
    outcomes = {name: case[name] for name in ("parsed", "index") if name in case}
    expected = case.get("expected", outcomes)
    if expected == {}:
        raise LitPruneError(f'{where}: nothing is "expected"')
    try:
        return expected, rule.frozen(case)
    except LitPruneError as error:
        return expected, {"error": str(error)}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LitPruneError(f"{where}: not a case of {rule.title}: {type(error).__name__}: {error}") from error


def compare(expected: Any, got: Any, name: str = "") -> str:
    """The first difference as text, "" without one. Any error equals any other: the official ones are Python's own."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if "error" in expected and "error" in got:
            return ""
        for key in [*expected, *(key for key in got if key not in expected)]:
            inner = f"{name}.{key}"
            if key not in got or key not in expected:
                side = "expected" if key in expected else "got"
                value = _short((expected if key in expected else got)[key])
                return f"{inner}: only {side} has it: {value}"
            if difference := compare(expected[key], got[key], inner):
                return difference
        return ""
    if _number(expected) and _number(got):
        same = isclose(expected, got, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    else:
        same = type(expected) is type(got) and expected == got
    return "" if same else f"{name}: expected {_short(expected)}, got {_short(got)}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any, most: int = 600) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]} ..."
