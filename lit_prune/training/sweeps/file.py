"""Read a Weights & Biases sweep file for Optuna: search space, search method, and the command of a trial."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lit_prune.errors import LitPruneError
from lit_prune.files.yaml_files import read_yaml

KEYS = {"name", "description", "project", "entity", "program", "command", "method", "metric", "parameters"}
KEYS |= {"early_terminate", "run_cap"}
METHODS = ("grid", "random", "bayes")
OURS = ("lit-prune", "lightning")


@dataclass(frozen=True)
class Sweep:
    """Contents of a sweep file.

    `fixed` are options of every trial, `space` those that vary. `halving` is (reports before a trial may be stopped,
    factor between the rungs) or None. `cap`: total number of trials, or None.
    """

    name: str
    program: str
    command: tuple[str, ...]
    method: str
    metric: str
    goal: str
    fixed: dict[str, Any]
    space: dict[str, BaseDistribution]
    halving: tuple[int, int] | None
    cap: int | None

    def line(self, params: Mapping[str, Any], more: list[str]) -> list[str]:
        """Build the command of one trial as W&B's agent would, with `more` options appended."""
        options = [f"--{name}={value}" for name, value in {**self.fixed, **params}.items()] + more
        ours = [sys.executable, "-m", "lit_prune"]
        macros = {"${env}": [], "${interpreter}": [sys.executable], "${program}": [self.program], "${args}": options}
        parts = [word for part in self.command for word in macros.get(part, [part])]
        return ours + parts[1:] if parts[0] in OURS else parts

    def grid(self) -> list[dict[str, Any]]:
        """All combinations of the values; raises `LitPruneError` for a parameter given as a continuous range."""
        values = []
        for name, kind in self.space.items():
            if isinstance(kind, CategoricalDistribution):
                values.append(kind.choices)
            elif isinstance(kind, IntDistribution):
                values.append(range(kind.low, kind.high + 1, kind.step))
            else:
                raise LitPruneError(f"sweep {self.name}: a grid needs `values` for {name}, not a range")
        return [dict(zip(self.space, chosen, strict=True)) for chosen in product(*values)]

    def sampler(self, seed: int | None) -> optuna.samplers.BaseSampler:
        """Create Optuna's sampler: random draws, or for `bayes` a tree-structured Parzen estimator."""
        kind = optuna.samplers.TPESampler if self.method == "bayes" else optuna.samplers.RandomSampler
        return kind(seed=seed)

    def pruner(self) -> optuna.pruners.BasePruner:
        """Create Optuna's pruner of trials. W&B's hyperband is asynchronous successive halving, as is Optuna's here."""
        if self.halving is None:
            return optuna.pruners.NopPruner()
        first, factor = self.halving
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)

    def settings(self) -> str:
        """Serialise the settings that must not change when a sweep is resumed."""
        space = {name: optuna.distributions.distribution_to_json(kind) for name, kind in self.space.items()}
        return json.dumps([self.metric, self.goal, self.method, space], sort_keys=True)


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; raises `LitPruneError` naming the key that W&B or Optuna couldn't use."""
    raw = read_yaml(path)
    if not isinstance(raw.get("parameters"), dict):
        raise LitPruneError(f"{path} is no sweep: it needs `parameters`, options of the command with their values")
    if unknown := sorted(map(str, set(raw) - KEYS)):
        raise LitPruneError(f"{path}: `{unknown[0]}` is no key of a sweep; there are {', '.join(sorted(KEYS))}")
    if raw.get("method") not in METHODS:
        raise LitPruneError(f"{path}: `method` must be one of {', '.join(METHODS)}, got {raw.get('method')}")
    metric = raw.get("metric") if isinstance(raw.get("metric"), dict) else {}
    goal = metric.get("goal", "minimize")
    if "name" not in metric or goal not in ("minimize", "maximize"):
        raise LitPruneError(f"{path}: `metric` needs `name` and `goal`, minimize or maximize")
    command = tuple(str(part) for part in raw.get("command") or ("${interpreter}", "${program}", "${args}"))
    known = {"${env}", "${interpreter}", "${program}", "${args}"}
    if unknown := [part for part in command if part.startswith("${") and part not in known]:
        raise LitPruneError(f"{path}: `command` has {unknown[0]}; understood here are {', '.join(sorted(known))}")
    parameters = raw["parameters"]
    fixed = {name: spec["value"] for name, spec in parameters.items() if isinstance(spec, dict) and "value" in spec}
    space = {name: _distribution(path, name, spec) for name, spec in parameters.items() if name not in fixed}
    early, cap = raw.get("early_terminate"), raw.get("run_cap")
    return Sweep(
        str(raw.get("name") or Path(path).stem),
        str(raw.get("program", OURS[0])),
        command,
        raw["method"],
        str(metric["name"]),
        goal,
        fixed,
        space,
        None if early is None else _halving(path, early),
        None if cap is None else int(cap),
    )


def _distribution(path: str | Path, name: str, spec: Any) -> BaseDistribution:
    """Convert a parameter's values or range to an Optuna distribution."""
    if isinstance(spec, dict) and isinstance(spec.get("values"), list) and spec["values"]:
        if all(isinstance(value, str | int | float | bool) for value in spec["values"]):
            return CategoricalDistribution(spec["values"])
        raise LitPruneError(f'{path}: `{name}`: write a list among its values as text, such as "[1, 13, 25]"')
    if isinstance(spec, dict) and {"min", "max"} <= set(spec):
        low, high = spec["min"], spec["max"]
        whole = isinstance(low, int) and isinstance(high, int)
        kind = spec.get("distribution", "int_uniform" if whole else "uniform")
        if kind == "int_uniform" and whole:
            return IntDistribution(low, high)
        if kind == "uniform" or (kind == "log_uniform_values" and low > 0):
            return FloatDistribution(float(low), float(high), log=kind != "uniform")
        if kind == "q_uniform":
            return FloatDistribution(float(low), float(high), step=float(spec.get("q", 1)))
    raise LitPruneError(
        f"{path}: `{name}` needs `value`, `values`, or `min` and `max` with no distribution but uniform, int_uniform, "
        f"q_uniform or log_uniform_values (above 0), got {spec}"
    )


def _halving(path: str | Path, early: Any) -> tuple[int, int]:
    """First rung and factor of W&B's hyperband, from `min_iter`, or from `max_iter` divided by `eta` `s` times."""
    try:
        factor = int(early.get("eta", 3))
        first = early["min_iter"] if "min_iter" in early else early["max_iter"] // factor ** early.get("s", 1)
        if early["type"] == "hyperband" and first >= 1 and factor >= 2:
            return int(first), factor
    except (AttributeError, KeyError, TypeError):
        pass
    raise LitPruneError(f"{path}: `early_terminate` needs type: hyperband, min_iter (or max_iter and s) and eta")
