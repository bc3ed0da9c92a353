"""Lightning callbacks of this project."""

from lit_prune.callbacks.export import ExportPlugin
from lit_prune.callbacks.signals import StopOnSignal, Stopped

__all__ = ["ExportPlugin", "StopOnSignal", "Stopped"]
