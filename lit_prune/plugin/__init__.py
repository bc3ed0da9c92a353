"""A plug-in: a pruner with its repair, what is saved of them, and the ways to name one."""

from lit_prune.plugin.plugin import SETTINGS, WEIGHTS, Plugin, fingerprint, learns, unpruned

__all__ = ["SETTINGS", "WEIGHTS", "Plugin", "fingerprint", "learns", "unpruned"]
