"""How long a model takes, plain and pruned: clocks, memory, and methods timed side by side."""

from lit_prune.timing.benchmark import Benchmark, Method
from lit_prune.timing.clocks import NOISY, clock_for, noisy
from lit_prune.timing.memory import peak_bytes
from lit_prune.timing.prompts import SEED

__all__ = ["NOISY", "SEED", "Benchmark", "Method", "clock_for", "noisy", "peak_bytes"]
