"""Control: random tokens."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.errors import check_number
from lit_prune.ops.selection import hashed_uniform
from lit_prune.pruners.base import Context, Pruner


class Random(Pruner):
    """Random tokens, drawn once per prompt from (seed, question ids); every comparison needs it (arXiv 2511.02650).

    The draw depends on the sample alone, not on batch, worker or generator state.
    """

    title = "random"

    def __init__(
        self,
        layers: Sequence[int] = (0,),
        stage_ratios: Sequence[float] | None = None,
        depth: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_number("pruner.seed", seed, whole=True)
        self.seed = seed

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Uniform random numbers from (seed, sample, token)."""
        return hashed_uniform(context.seed + 7919 * self.seed, context.ordinal)
