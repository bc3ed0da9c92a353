"""Plug-ins: a pruner with its repair adapter, saved as one folder, and loaded by name, file or folder."""

from lit_prune.plugin.bases import fingerprint
from lit_prune.plugin.plugin import Plugin, learns, unpruned
from lit_prune.plugin.reading import SETTINGS, WEIGHTS

__all__ = ["SETTINGS", "WEIGHTS", "Plugin", "fingerprint", "learns", "unpruned"]
