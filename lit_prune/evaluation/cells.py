"""Cells of a comparison, one method at one budget with one seed: what determines each result, and where it is kept."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_prune.errors import LitPruneError
from lit_prune.host.parts import find
from lit_prune.ops.budget import as_json, parse_budget, resolve
from lit_prune.plugin import Plugin, fingerprint, unpruned
from lit_prune.plugin.methods import FULL, MethodText
from lit_prune.vlm import VLM, as_plugin


@dataclass
class Cell:
    """One method at one budget with one seed; by default the full model. One that can't be read has no plug-in.

    `keep` is a count of visual tokens or, where images differ, a share of each sample's as text (`11.1%`). `seed` tells
    draws or trained runs of a method apart; None where there is but one. `reason` says why a cell has no result,
    `failed` that it should have one. `key` is a digest of everything that determines the result.
    """

    method: str
    keep: int | str | None = None
    seed: int | None = None
    plugin: Plugin | None = field(default_factory=unpruned)
    repair: bool = True
    note: str = ""
    reason: str = ""
    failed: bool = False
    key: str = ""

    def fail(self, error: Exception) -> None:
        """Leave the cell empty, with what went wrong."""
        kind = "" if isinstance(error, LitPruneError) else f"{type(error).__name__}: "
        self.reason, self.failed = f"{kind}{str(error).strip() or 'no message'}", True


def budget(text: Any, visual: int, varies: bool = False) -> int | str:
    """A cell's budget: a count, or a share (`11.1%`) where the number of visual tokens `varies` from image to image.

    Raises `LitPruneError` for counts by layer, which fit one method alone, and for more than the model's `visual`.
    """
    read = parse_budget(text, "--keep")
    if isinstance(read, dict):
        raise LitPruneError(f"--keep {text}: methods have stages at other layers; give an average such as 16 or 11.1%")
    if varies:
        return as_json(read)
    keep = resolve(read, visual, "--keep")
    if keep > visual:
        raise LitPruneError(f"--keep {text}: {keep} visual tokens; it must lie between 1 and the model's {visual}")
    return keep


# Methods


@dataclass(frozen=True)
class Method:
    """A row as it was asked for, in the grammar of `MethodText` without a budget.

    Several paths are trained runs of one method, which count as its seeds. `{keep}` and `{seed}` in a path stand for
    each budget and seed, so that one pattern names many runs. Without a name, "", the method's own stands for it.
    """

    name: str
    paths: tuple[str, ...]
    repair: bool = True

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Raises `LitPruneError` where a path is missing."""
        line = MethodText.parse(text, "--methods")
        if line.keep is not None:
            raise LitPruneError(f"--methods {text}: the budgets of a comparison are given with --keep, for all methods")
        return cls(line.name or (FULL if line.path == FULL else ""), line.paths, line.repair)

    def check(self) -> None:
        """Raises `LitPruneError` for a path that can't be read; patterns stand for several and wait."""
        for path in self.paths if self.paths != (FULL,) else ():
            if "{" not in path:
                as_plugin(path)

    @property
    def path(self) -> str:
        """The paths as they were written."""
        return ",".join(self.paths) + ("" if self.repair else "!")

    def cells(
        self, keeps: Sequence[int | str], seeds: Sequence[int], learns: Callable[[Plugin], bool] = lambda _: False
    ) -> list[Cell]:
        """The method's cells; what is random is drawn, and untrained weights initialised, once a seed.

        `learns` says whether a plug-in has weights. Raises `LitPruneError` for a path that can't be read, or a pattern
        that fits nothing.
        """
        if self.paths == (FULL,):
            return [Cell(self.name)]
        read = cache(_draw)  # budgets share plug-ins
        found = []
        for keep in keeps:
            for path, seed in self._runs(keep, seeds):
                try:
                    plugin = read(path, 0)
                except LitPruneError as error:
                    if path in self.paths:
                        raise
                    found.append(Cell(self.name, keep, seed, None, reason=str(error)))
                    continue
                drawn = [(seed, plugin)]
                if seed is None and (plugin.pruner.random or (_untrained(path) and learns(plugin))):
                    drawn = [(draw, read(path, draw)) for draw in seeds]
                note = _note(plugin, path, keep)
                found += [Cell(self.name, keep, which, each, self.repair, note) for which, each in drawn]
        if (plugin := next((cell.plugin for cell in found if cell.plugin is not None), None)) is None:
            raise LitPruneError(f"--methods {self.name or self.path}: {found[0].reason}")
        untrained = any(map(_untrained, self.paths)) and learns(plugin)
        for cell in found:
            cell.method = self.name or _title(plugin, self) + (", untrained" if untrained else "")
        return found

    def _runs(self, keep: int | str, seeds: Sequence[int]) -> Iterator[tuple[str, int | None]]:
        """Paths of one budget with the seed that each stands for, if it does."""
        for place, path in enumerate(self.paths):
            path = path.replace("{keep}", str(keep))
            if "{seed}" in path:
                yield from ((path.replace("{seed}", str(seed)), seed) for seed in seeds)
            else:
                yield path, place if len(self.paths) > 1 else None


def cells_of(
    methods: Sequence[Method], keeps: Sequence[int | str], seeds: Sequence[int], learns: Callable[[Plugin], bool]
) -> list[Cell]:
    """The cells of several methods; where two have the same name, their paths are added.

    Raises `LitPruneError` where two were given one.
    """
    named = [method.name for method in methods if method.name]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise LitPruneError(f"--methods: two are called {twice}; write runs of one method as {twice}=A,B,C")
    groups = [(method, method.cells(keeps, seeds, learns)) for method in methods]
    titles = [cells[0].method for _, cells in groups]
    for (method, cells), title in zip(groups, titles, strict=True):
        if titles.count(title) > 1 and not method.name:
            for cell in cells:
                cell.method = f"{title} ({method.path})"
    return [cell for _, cells in groups for cell in cells]


def _draw(path: str, draw: int) -> Plugin:
    """A plug-in, its seed moved on by `draw` where its method has one."""
    plugin = as_plugin(path)
    if draw:
        plugin.pruner.redraw(draw)
    return plugin


def _title(plugin: Plugin, method: Method) -> str:
    """A method's name for people; its file's where it has none."""
    return (plugin.title or Path(method.paths[0]).stem) + ("" if method.repair or not plugin.repair else ", repair off")


def _untrained(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


def _note(plugin: Plugin, path: str, keep: int | str) -> str:
    """What to know about the weights, if the method has any: that shows when it is built."""
    if plugin.dims is None:  # a saved one knows the model that it was made for
        return "untrained"
    return "" if as_json(plugin.keep) == keep else f"trained at {as_json(plugin.keep)} tokens"


# What determines a result


def prepare(cells: Sequence[Cell], vlm: VLM, setting: dict[str, Any]) -> None:
    """Build each plug-in for the model and give each cell its key; what can't be built or met says so and stays empty.

    Untrained weights are drawn from the cell's seed, so that they don't depend on what else is compared.
    """
    for cell in cells:
        if cell.plugin is not None:
            _try(cell, vlm)
        if not cell.reason:
            text = json.dumps({"format": 1, **setting, "keep": cell.keep, "method": _identity(cell)}, sort_keys=True)
            cell.key = hashlib.sha256(text.encode()).hexdigest()[:24]
    vlm.detach()


def _try(cell: Cell, vlm: VLM) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed or 0)
            vlm.attach(cell.plugin, keep=cell.keep)
        cell.note = cell.note if cell.plugin.trained else ""
    except LitPruneError as error:
        cell.fail(error)
        try:  # a budget that the method can't meet is no failure
            dims = find(vlm.model).dims
            cell.plugin.pruner.nominal_schedule(parse_budget(cell.keep), dims)
        except LitPruneError:
            cell.failed = False


def describe(vlm: VLM) -> dict[str, Any]:
    """What a result depends on beside method and data: the frozen model and how it computes."""
    model = vlm.model
    return {"base": vlm.name, "weights": fingerprint(model), "dtype": str(model.dtype), "device": model.device.type}


def _identity(cell: Cell) -> Any:
    """The method: its arguments, its weights, and the source of its classes."""
    settings = cell.plugin.settings()
    parts = {"pruner": cell.plugin.pruner, "repair": cell.plugin.repair if cell.repair else None}
    found = {
        name: {"is": settings[name], "weights": _weights(part), "source": _source(part)}
        for name, part in parts.items()
        if part is not None
    }
    return found | cell.plugin.options.changed()


def _weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _source(module: nn.Module) -> str:
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    return digest_of(sorted({Path(inspect.getfile(kind)) for kind in kinds}))


def digest_of(files: Sequence[Path]) -> str:
    """Digest of the files' content."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
