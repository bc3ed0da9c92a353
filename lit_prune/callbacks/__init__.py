"""Lightning callbacks of this project."""

from lit_prune.callbacks.export import ExportPlugin

__all__ = ["ExportPlugin"]
