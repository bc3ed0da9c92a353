"""Lightning callbacks of this project."""

from lit_prune.callbacks.answers import WriteAnswers
from lit_prune.callbacks.curves import Curves
from lit_prune.callbacks.export import ExportPlugin
from lit_prune.callbacks.export_best import ExportBest
from lit_prune.callbacks.last import SaveLast
from lit_prune.callbacks.limits import Limits
from lit_prune.callbacks.monitors import Monitors
from lit_prune.callbacks.nan_guard import NanGuard
from lit_prune.callbacks.parts import Parts
from lit_prune.callbacks.progress import Progress
from lit_prune.callbacks.results import PrintResults
from lit_prune.callbacks.samples import SamplePictures
from lit_prune.callbacks.scores import WriteScores
from lit_prune.callbacks.settings import SaveConfig
from lit_prune.callbacks.signals import StopOnSignal, Stopped
from lit_prune.callbacks.submissions import WriteSubmissions
from lit_prune.callbacks.summary import RunSummary
from lit_prune.callbacks.throughput import Throughput
from lit_prune.callbacks.wandb_run import WandbRun

__all__ = [
    "Curves",
    "ExportBest",
    "ExportPlugin",
    "Limits",
    "Monitors",
    "NanGuard",
    "Parts",
    "PrintResults",
    "Progress",
    "RunSummary",
    "SamplePictures",
    "SaveConfig",
    "SaveLast",
    "StopOnSignal",
    "Stopped",
    "Throughput",
    "WandbRun",
    "WriteAnswers",
    "WriteScores",
    "WriteSubmissions",
]
