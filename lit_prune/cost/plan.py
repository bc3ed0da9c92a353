"""The training run that `lit_prune.cost.training` estimates, as options describe it, which need no PyTorch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """A training run to estimate. [assumed]: not measured, give your own.

    Args:
        gpus: One rank each.
        strategy: What is split over the ranks: nothing (ddp), or ZeRO's stage.
        batch_size: Samples of one batch on one rank.
        accumulate: Batches of a step.
        samples: Of the whole run; by default 1,000 steps of 64, as configs/rcp_ours.yaml.
        mode: `soft` masks at full length, `drop` discards.
        backward: In `soft` mode, gradients return through the rows of `all` tokens, or of those `kept` alone.
        teacher_cache: Whether the teacher's moments of all samples are known, as from the second epoch on.
        saliency: Whether `loss.saliency` is on: the teacher runs to its last layer, and backward to the first stage.
        checkpointing: Whether layers keep their inputs alone and run again in backward.
        peak: TFLOP/s of one GPU in the frozen model's dtype [assumed: an H100 in bfloat16].
        utilisation: Share of the peak that is reached [assumed].
        bandwidth: GB/s between a GPU and the others [assumed].
        reserve: GB on each GPU for the CUDA context, workspaces and fragmentation [assumed].
    """

    gpus: int = 8
    strategy: Literal["ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3"] = "ddp"
    batch_size: int = 2
    accumulate: int = 4
    samples: int = 64_000
    mode: Literal["soft", "drop"] = "soft"
    backward: Literal["all", "kept"] = "all"
    teacher_cache: bool = False
    saliency: bool = False
    checkpointing: bool = False
    peak: float = 989.0
    utilisation: float = 0.4
    bandwidth: float = 200.0
    reserve: float = 3.0
