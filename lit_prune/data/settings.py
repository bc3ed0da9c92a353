"""Validate numeric arguments of data modules early."""

from lit_prune.errors import LitPruneError


def check_numbers(smallest: int, **numbers: float | None) -> None:
    """Raise LitPruneError for a number below `smallest` or NaN; None passes."""
    for name, value in numbers.items():
        if value is not None and not value >= smallest:
            raise LitPruneError(f"data.{name} is {value}; it must be {'positive' if smallest else '0 or more'}")


def check_share(**shares: float) -> None:
    """Raise LitPruneError for a share outside [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise LitPruneError(f"data.{name} is {value}; it must be a share from 0 to 1")
