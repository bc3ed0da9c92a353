"""Numbers of a data module that cannot be: said at once, not by an error somewhere below."""

from lit_prune.errors import LitPruneError


def check_numbers(smallest: int, **numbers: float | None) -> None:
    """Raises LitPruneError for a number that is smaller than `smallest` or nan; None is no number."""
    for name, value in numbers.items():
        if value is not None and not value >= smallest:
            raise LitPruneError(f"data.{name} is {value}; it must be {'positive' if smallest else '0 or more'}")


def check_share(**shares: float) -> None:
    """Raises LitPruneError for a share that is not from 0 to 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise LitPruneError(f"data.{name} is {value}; it must be a share from 0 to 1")
