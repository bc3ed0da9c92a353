"""Training: the module that Lightning fits, its step and losses, its checkpoints and what it logs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_prune.training.module import PruneModule

__all__ = ["PruneModule"]


def __getattr__(name: str) -> Any:
    """Import `PruneModule` on first use, since commands that need only other parts must start fast."""
    if name == "PruneModule":
        from lit_prune.training.module import PruneModule

        return PruneModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
