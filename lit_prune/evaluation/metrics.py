"""torchmetrics of this field: accuracy per skill, the states' shift per decoder layer, the kept tokens' consistency."""

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_prune.ops.moments import kappa

OVERALL = "all"
NO_SKILL = -1  # in place of a skill's key


class SkillAccuracy(Metric):
    """Share of right answers per skill and overall.

    `compute()` gives `{"all": ..., skill: ...}`. Answers without a skill count overall alone; a skill that is itself
    named "all" is "all (skill)". A digest of its name identifies a skill, so that ranks need not have seen the same
    ones.
    """

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.names: dict[int, str] = {}
        self.add_state("skills", default=[], dist_reduce_fx="cat")
        self.add_state("hits", default=[], dist_reduce_fx="cat")

    def update(self, hits: Sequence[bool], skills: Sequence[Any]) -> None:
        """Add answers, right or wrong, with their skills of any type; None for an answer without one."""
        names = [None if skill is None else _label(str(skill)) for skill in skills]
        keys = [NO_SKILL if name is None else _digest(name) for name in names]
        self.names.update((key, name) for key, name in zip(keys, names, strict=True) if name is not None)
        self.skills.append(torch.tensor(keys, device=self.device, dtype=torch.long))
        self.hits.append(torch.tensor(list(hits), device=self.device, dtype=torch.float32))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Every rank brings states of the right type, if empty, and learns the names that others know."""
        if not self.skills:
            self.skills.append(torch.zeros(0, device=self.device, dtype=torch.long))
            self.hits.append(torch.zeros(0, device=self.device))
        known: list[dict[int, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(known, self.names)
        for names in known:
            self.names.update(names)
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        """Accuracy in [0, 1] overall and per skill, by name."""
        skills, hits = _joined(self.skills, self.device), _joined(self.hits, self.device)
        if not len(hits):
            return {}
        keys = [key for key in skills.unique().tolist() if key != NO_SKILL]
        found = {self.names[key]: hits[skills == key].mean().item() for key in keys}
        return {OVERALL: hits.mean().item(), **dict(sorted(found.items()))}


def figure_name(skill: str) -> str:
    """A skill as part of a figure's name, the same in all loggers.

    TensorBoard takes letters, digits, `_`, `-` and `.` alone; a name with others gets a checksum, so that "a b" and
    "a/b" stay two.
    """
    plain = re.sub(r"[^\w.-]+", "_", skill)[:60]
    return skill if plain == skill else f"{plain}-{zlib.crc32(skill.encode('utf-8', 'surrogatepass')):08x}"


def _label(skill: str) -> str:
    """A skill's name, never that of the overall figure, and another one for another skill."""
    bare = skill
    while bare.endswith(" (skill)"):
        bare = bare.removesuffix(" (skill)")
    return f"{skill} (skill)" if bare == OVERALL else skill


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def _joined(parts: list[Tensor] | Tensor, device: torch.device) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0, device=device)


class Sums(Metric):
    """States are float64, also where the module around them is cast: DeepSpeed casts all of it, and a rank that had
    nothing to add would meet the others with another type."""

    def _apply(self, *args: Any, **kwargs: Any) -> "Sums":
        super()._apply(*args, **kwargs)
        for name, default in self._defaults.items():
            self._defaults[name] = default.double()
            setattr(self, name, getattr(self, name).double())
        return self


class Shift(Sums):
    """W2^2 between student and teacher states per decoder layer, over the answer positions seen.

    Diagonal Gaussians per channel, divided by the width (RCP, arXiv 2604.04972): a good alarm, a poor ranking of good
    configurations, since the budget drives both shift and accuracy. Sums are float64 over all ranks.
    """

    full_state_update = False

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.add_state("count", default=torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("student", "teacher"):
            self.add_state(name, default=torch.zeros(2, depth, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> None:
        """Add the states of some positions: {layer: (positions, width)}, the same positions on both sides."""
        for name, states in (("student", student), ("teacher", teacher)):
            stacked = torch.stack([states[layer] for layer in sorted(states)]).detach().to(torch.float64)
            setattr(self, name, getattr(self, name) + torch.stack([stacked.sum(1), stacked.square().sum(1)]))
        self.count += len(next(iter(student.values())))

    def compute(self) -> Tensor:
        """W2^2 / width per decoder layer, float64."""
        (s_mean, s_std), (t_mean, t_std) = (self._moments(getattr(self, name)) for name in ("student", "teacher"))
        return ((s_mean - t_mean).square() + (s_std - t_std).square()).mean(-1)

    def _moments(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        count = self.count.clamp(min=1)
        mean = sums[0] / count
        return mean, (sums[1] / count - mean.square()).clamp(min=0).sqrt()


class Power(Sums):
    """Mean square of states per decoder layer: mean^2 + variance, averaged over channels.

    W2^2 divided by the teacher's is a share of each layer's own scale, so that the last layers, whose states are
    largest, don't decide the mean over layers. Sums are float64 over all ranks.
    """

    full_state_update = False

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(depth, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: dict[int, Tensor]) -> None:
        """Add the states of some positions: {layer: (positions, width)}."""
        stacked = torch.stack([states[layer] for layer in sorted(states)]).detach().to(torch.float64)
        self.total = self.total + stacked.square().mean(-1).sum(1)
        self.count += stacked.shape[1]

    def compute(self) -> Tensor:
        """Mean square per decoder layer, float64; 0 without positions."""
        return self.total / self.count.clamp(min=1)


class Means(Sums):
    """Means of named figures over samples. Sums are float64 over all ranks."""

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("total", default=torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor | None]) -> None:
        """Add samples: a value for each of them, (batch,), under each name; other names are ignored."""
        self.total = self.total + torch.stack([values[name].double().sum() for name in self.names])
        self.count = self.count + len(values[self.names[0]])

    def compute(self) -> dict[str, float]:
        """Mean by name; 0 without samples."""
        return dict(zip(self.names, (self.total / self.count.clamp(min=1)).tolist(), strict=True))


class LayerTokens(Sums):
    """Visual tokens at each decoder layer's input, averaged over samples. Sums are float64 over all ranks."""

    full_state_update = False

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(depth, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        """Add samples: tokens (decoder layers, batch)."""
        self.total = self.total + tokens.double().sum(1)
        self.count = self.count + tokens.shape[1]

    def compute(self) -> Tensor:
        """Mean per decoder layer, float64; 0 without samples."""
        return self.total / self.count.clamp(min=1)


class Consistency(Sums):
    """kappa of the kept visual tokens against all of them, averaged over samples with an image; lower is better.

    See `lit_prune.ops.moments.kappa` (after DCP-Prune, arXiv 2606.16633). Sums are float64 over all ranks.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, full: Tensor, kept: Tensor, real: Tensor | None = None, features: Tensor | None = None) -> None:
        """Add samples: features (batch, visual, width) of all tokens, and which of them, (batch, visual), are kept.

        `real` marks those that are no filler; `features` are the kept ones' own where a method changed them.
        """
        pictured = torch.ones_like(kept[:, 0]) if real is None else real.any(1)
        if not bool(pictured.any()):
            return
        values = kappa(full.detach(), kept, real, features)[pictured].to(torch.float64)
        self.total = self.total + values.sum().to(self.total.device)
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """Mean kappa, float64; 0 where no sample had an image."""
        return self.total / self.count.clamp(min=1)
