"""Save one training step to a file, and replay it to find where the first NaN or infinity occurs.

The file is safetensors: the batch's inputs, the plug-in's weights before the step, and as JSON in its header everything
else the step depends on. Nothing in it is executed. It holds no frozen weights: the run's configuration names them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import translated
from lit_prune.files.writing import written_whole
from lit_prune.training.module import PruneModule
from lit_prune.training.step import StepKey

HEADER = "lit_prune_step"
INPUTS, WEIGHTS = "inputs.", "plugin."


@dataclass(frozen=True)
class SavedStep:
    """Everything a training step depends on, taken before it changes the weights.

    `inputs`: the model's tensor inputs. `weights`: the plug-in's, before the step. `loss`: the run's total loss over
    all ranks. `config`: path of the run's saved configuration. `pack`: samples shared rows.
    """

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    ids: list[str]
    key: StepKey
    step: int
    rank: int
    loss: float
    config: str | None
    pack: bool = False


def save_step(path: Path, saved: SavedStep) -> None:
    """Write a step to `path` atomically."""
    named = {INPUTS: saved.inputs, WEIGHTS: saved.weights}
    tensors = {
        f"{prefix}{name}": value.detach().cpu().contiguous().clone()
        for prefix, part in named.items()
        for name, value in part.items()
    }
    rest = {name: value for name, value in asdict(saved).items() if name not in ("inputs", "weights")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        save_file(tensors, file, {HEADER: json.dumps(rest)})


def load_step(path: Path) -> SavedStep:
    """Read a file written by `save_step`.

    Raises:
        LitPruneError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise LitPruneError(f"{path} is no step that `fit` has saved: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            rest = translated(SavedStep, json.loads((file.metadata() or {})[HEADER]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        rest["key"] = StepKey(**rest["key"])
        parts = [
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (INPUTS, WEIGHTS)
        ]
        return SavedStep(*parts, **rest)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise LitPruneError(f"{path} is no step that `fit` has saved: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Replayed:
    """Result of a replay: the losses, the first value with a NaN or infinity, and parameters with such gradients."""

    total: float
    losses: dict[str, float]
    first: str | None
    gradients: list[str]

    @property
    def finite(self) -> bool:
        """True if loss, activations and gradients are finite."""
        return self.first is None and not self.gradients and torch.tensor([self.total]).isfinite().item()


def replay(module: PruneModule, saved: SavedStep) -> Replayed:
    """Run a saved step again, forward and backward, on the module's device.

    Raises:
        LitPruneError: the step belongs to another plug-in.
    """
    own = {name: value.shape for name, value in module.plugin.state_dict().items()}
    if own != {name: value.shape for name, value in saved.weights.items()}:
        wrong = sorted(own.keys() ^ saved.weights.keys()) or ["a shape"]
        raise LitPruneError(f"the step was saved by a run with another plug-in ({wrong[0]}): give its configuration")
    module.plugin.load_state_dict(saved.weights)
    module.train()
    inputs = {name: value.to(module.device) for name, value in saved.inputs.items()}
    first = _first_bad({f"the batch's {name}": value for name, value in inputs.items()}, saved.ids)
    first = first or _first_bad({f"the weight {name}": value for name, value in module.named_parameters()}, saved.ids)
    with _watched(module, saved.ids) as seen:
        step = module.step({"inputs": inputs, "ids": saved.ids, "pack": saved.pack}, saved.key)
    losses = {name: value.item() for name, value in step.losses.items()}
    step.total.backward()
    bad = [name for name, p in module.plugin.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    module.zero_grad()
    return Replayed(step.total.item(), losses, first or next(iter(seen), None), bad)


@contextmanager
def _watched(module: PruneModule, ids: list[str]) -> Iterator[list[str]]:
    """Collect the modules whose output is not finite, in order of execution: the innermost comes first."""
    seen: list[str] = []

    def watch(name: str):
        def hook(part: nn.Module, args: tuple, output: Any) -> None:
            who = "student" if module.host.session.prune else "teacher"
            bad = _first_bad({f"the {who}'s {name}": leaf for leaf in tree_leaves(output)}, ids)
            seen.extend([bad] if bad else [])

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_bad(values: Mapping[str, Any], ids: list[str]) -> str | None:
    """Name of the first non-finite value, with its samples where rows are samples; None if all are finite."""
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all()):
            continue
        if value.ndim < 2 or len(value) != len(ids) or name.startswith("the weight"):
            return name
        rows = (~value.isfinite()).flatten(1).any(1).tolist()
        return f"{name}, sample {', '.join(str(i) for i, bad in zip(ids, rows, strict=True) if bad)}"
    return None
