"""DeepSpeed for a frozen model with plug-ins: on CPUs too, and pruning in every verb."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn


class PruneDeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with what this project needs beside it.

    On GPUs training is Lightning's own. On CPUs, where Lightning refuses, the same stages run over gloo: slowly, but so
    a cluster's configuration can be tried anywhere. The hooks that prune stay on the model in validation and test.

    Args:
        stage: of ZeRO: 1 splits the optimizer's states over the ranks, 2 gradients too, 3 parameters too.
        exclude_frozen_parameters: leave the frozen model out of checkpoints.
        logging_batch_size_per_gpu: only for DeepSpeed's own lines on throughput; Lightning's "auto" makes a data loader
            to ask it, and fails where that has no batch size.
        options: of Lightning's `DeepSpeedStrategy`.
    """

    def __init__(
        self,
        stage: int = 2,
        exclude_frozen_parameters: bool = True,
        logging_batch_size_per_gpu: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            stage=stage,
            exclude_frozen_parameters=exclude_frozen_parameters,
            logging_batch_size_per_gpu=logging_batch_size_per_gpu,
            **options,
        )

    def setup_environment(self) -> None:
        """Join the other ranks; on CPUs without Lightning's check for CUDA, and with devices that have a number."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed

        # Else this one is compiled at every start, for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def _initialize_deepspeed_inference(self, model: LightningModule) -> None:
        """Wrap the model to validate or test. Lightning takes every hook off it first: ours go back on, in front."""
        ours = [(module, kind, _own(getattr(module, kind))) for module in model.modules() for kind in HOOKS]
        super()._initialize_deepspeed_inference(model)
        for module, kind, hooks in ours:
            hooks.update(getattr(module, kind))
            setattr(module, kind, hooks)


HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _own(hooks: dict) -> dict:
    """The same dictionary, to which its handles point, without the hooks of an engine that has gone."""
    for key in [key for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed")]:
        del hooks[key]
    return hooks


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, counting those that ZeRO-3 keeps in parts on the ranks."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
