"""lit_prune: visual-token pruning for large vision-language models, trained, repaired and compared.

`lit_prune.load("micro")` gives a model with its processor; `.attach(pruner=...)` prunes it, `.detach()` undoes it.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_prune.vlm import VLM, load

__all__ = ["VLM", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are asked for, so that `--help` stays fast."""
    if name in ("VLM", "load"):
        from lit_prune import vlm

        return getattr(vlm, name)
    raise AttributeError(f"module 'lit_prune' has no attribute {name!r}")
