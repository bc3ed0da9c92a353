"""Visual-token pruning for large vision-language models: trained, repaired, run and compared.

    import lit_prune

    vlm = lit_prune.load("micro")                  # or a folder, a hub id, a transformers model
    vlm.answer("photo.png", "What colour is the circle?")
    vlm.attach("divprune", keep=16)                # prune; `lit-prune configs list pruners` lists the methods
    vlm.answer("photo.png", "What colour is the circle?")
    vlm.detach()                                   # the plain model again

`lit-prune --help` lists what the command line does: training, measuring, comparing, timing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_prune.errors import LitPruneError
    from lit_prune.vlm import VLM, load

__all__ = ["VLM", "LitPruneError", "__version__", "load"]

_HOMES = {"VLM": "vlm", "LitPruneError": "errors", "load": "vlm"}


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are used, so that `--help` stays fast."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
