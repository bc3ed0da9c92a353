"""Time models, plain and pruned: clocks, memory, and interleaved benchmarks."""

from lit_prune.evaluation.timing.benchmark import Benchmark, Method
from lit_prune.evaluation.timing.clocks import NOISY, clock_for, noisy
from lit_prune.evaluation.timing.memory import peak_bytes
from lit_prune.evaluation.timing.prompts import SEED

__all__ = ["NOISY", "SEED", "Benchmark", "Method", "clock_for", "noisy", "peak_bytes"]
