"""Checks of signatures at run time, at a tenth of their cost: imported before any module that is checked.

Shapes are checked in every call. Of functions whose signature names no shape, which are most of the calls of a forward,
each process checks the first `CALLS`.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jaxtyping

CALLS = 100
checked_always = jaxtyping.jaxtyped


def names_a_shape(function: Callable) -> bool:
    kinds = inspect.get_annotations(function).values()
    return any(isinstance(kind, str) or "jaxtyping" in repr(kind) for kind in kinds)


def jaxtyped(function: Any = None, *, typechecker: Callable) -> Any:
    """Stands in for the decorator that jaxtyping's import hook puts on every function and class."""
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    checked = checked_always(function, typechecker=typechecker)
    if not inspect.isfunction(function) or names_a_shape(function):
        return checked
    left = CALLS

    @wraps(function)
    def call(*args, **kwargs):
        nonlocal left
        if jaxtyping.config.jaxtyping_disable or not left:
            return function(*args, **kwargs)
        left -= 1
        return checked(*args, **kwargs)

    return call


jaxtyping.jaxtyped = jaxtyped
