"""DeepSpeed strategy for a frozen model with a plug-in, on GPUs and CPUs; checks of the Trainer's settings."""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
UNIVERSAL = ".universal"  # suffix of a checkpoint's copy for another number of ranks
NO_ZERO, ZERO_2, ZERO_3 = "another strategy than DeepSpeed", "DeepSpeed's ZeRO-1 or -2", "DeepSpeed's ZeRO-3"


class OwnTypes(DeepSpeedPrecision):
    """Keep the dtype of every weight: Lightning would cast a frozen model of 14 GB in bf16 to 28 GB in float32.

    With `bf16` precision DeepSpeed itself casts all weights but no buffers, so rotary frequencies stay float32.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return the module unchanged."""
        return module


class PruneDeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, extended for frozen models with plug-ins.

    On GPUs training is Lightning's own. On CPUs, which Lightning refuses, the same ZeRO stages run over gloo: slowly,
    but a cluster's configuration can be tried anywhere. The pruning hooks stay on the model in validation and test.

    Args:
        stage: ZeRO stage: 1 shards the optimizer state over the ranks, 2 gradients too, 3 parameters too.
        exclude_frozen_parameters: leave the frozen model out of checkpoints.
        logging_batch_size_per_gpu: only used in DeepSpeed's own throughput logs; Lightning's "auto" builds a data
            loader to read it, and fails if that has no batch size.
        options: passed to Lightning's `DeepSpeedStrategy`.
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
        # Use PyTorch's AdamW for offloaded states too: DeepSpeed's CPU Adam is compiled at start-up, which doesn't pay
        # off for a small plug-in.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def setup(self, trainer: Trainer) -> None:
        """Set up DeepSpeed, keeping the dtypes of the weights."""
        self.precision_plugin = OwnTypes(self.precision_plugin.precision)
        super().setup(trainer)

    def setup_environment(self) -> None:
        """Initialise the process group; on CPUs without Lightning's CUDA check, and with indexed devices."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())  # otherwise DeepSpeed uses a GPU if the machine has one
        # Otherwise this op is compiled at every start, which takes half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def _initialize_deepspeed_inference(self, model: LightningModule) -> None:
        """Wrap the model for validation or test, keeping the pruning hooks, which Lightning removes with all others."""
        ours = [(module, kind, _own(getattr(module, kind))) for module in model.modules() for kind in HOOKS]
        super()._initialize_deepspeed_inference(model)
        for module, kind, hooks in ours:
            hooks.update(getattr(module, kind))  # DeepSpeed's hooks run after ours
            setattr(module, kind, hooks)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward without DeepSpeed's division by the number of accumulated batches, which Lightning has done."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write DeepSpeed's folder with one file per rank, and into it the unsharded plug-in, without pickle."""
        plugin = self.lightning_module.plugin
        with whole(plugin):
            if self.is_global_zero:
                Path(filepath).mkdir(parents=True, exist_ok=True)
                plugin._save_pretrained(Path(filepath))
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder written by `save_checkpoint`, by any number of ranks.

        Validation and test load the plug-in alone.

        Raises:
            LitPruneError: no such folder, or one of another pruner.
        """
        folder = Path(checkpoint_path)
        plugin = Plugin.from_checkpoint(folder).state_dict()
        weights = {"state_dict": {f"plugin.{name}": value for name, value in plugin.items()}}
        self.lightning_module.on_load_checkpoint(weights)
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return {**weights, "pytorch-lightning_version": lightning.__version__}
        try:
            with _data_only(), self._for_these_ranks(folder) as readable:
                checkpoint = super().load_checkpoint(readable, weights_only)
        except UnpicklingError as error:
            raise LitPruneError(f"{folder} is no checkpoint that can be read safely: {error}") from error
        # Loaded from a universal checkpoint, all parameter groups of ZeRO-3 share one step counter, and each would
        # increment it: give each its own.
        for state in self.deepspeed_engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        return {**checkpoint, **weights}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the plug-in for validation and test; in training DeepSpeed has already loaded it."""
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            plugin = self.lightning_module.plugin
            weights = {name.removeprefix("plugin."): value for name, value in checkpoint["state_dict"].items()}
            with whole(plugin, changed=True):
                plugin.load_state_dict(weights)

    @contextmanager
    def _for_these_ranks(self, folder: Path) -> Iterator[Path]:
        """Yield the folder, or a temporary universal copy of it if another number of ranks wrote it."""
        saved = len(list((folder / "checkpoint").glob("*_optim_states.pt")))
        if saved == self.world_size:
            yield folder
            return
        rank_zero_info(f"{folder} was written by {saved} processes, there are {self.world_size} now: converting it")
        copy = folder.with_name(folder.name + UNIVERSAL)
        if self.is_global_zero:
            _make_universal(folder / "checkpoint", copy / "checkpoint")
        self.barrier("universal checkpoint")
        settings = self.deepspeed_engine._config
        settings.load_universal_checkpoint = True
        try:
            yield copy
        finally:
            settings.load_universal_checkpoint = False
            self.barrier("universal checkpoint read")
            if self.is_global_zero:
                shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def _data_only() -> Iterator[None]:
    """Restrict `torch.load` to tensors, plain values and the four classes in DeepSpeed's states.

    DeepSpeed passes `weights_only=False`, which would execute code from the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known, before = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address], os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def _make_universal(source: Path, out: Path) -> None:
    """Convert a DeepSpeed checkpoint to the universal format, which any number of ranks can read."""
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(out.parent, ignore_errors=True)
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    with redirect_stdout(StringIO()):
        main(
            Namespace(
                input_folder=str(source),
                output_folder=str(out),
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
                **workers,
            )
        )


@contextmanager
def whole(module: nn.Module, changed: bool = False) -> Iterator[None]:
    """Gather a module's parameters on every rank if ZeRO-3 has sharded them. A collective: all ranks must enter.

    With `changed`, rank zero's values are scattered to all ranks on exit.
    """
    parts = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        yield


def in_step(strategy: Any) -> bool:
    """True under DeepSpeed, where all ranks must run the same modules and so get gradients in the same order.

    ZeRO-3 gathers a module's parameters from all ranks when it runs; the other stages reduce gradients in buckets,
    filled in the order in which gradients arrive.
    """
    return isinstance(strategy, DeepSpeedStrategy)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter before sharding by ZeRO-3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def refuse_unusable(trainer: Trainer) -> None:
    """Raise `LitPruneError` for Trainer settings that would silently train badly or fail late."""
    deepspeed, precision = isinstance(trainer.strategy, DeepSpeedStrategy), str(trainer.precision)
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        reason = "FSDP would split the plug-in too, whose weights are used outside of any module's forward"
        raise LitPruneError(f"trainer.strategy: {reason}; take DDP, or DeepSpeed's ZeRO-3 to split the frozen model")
    instead = "take 32-true, and model.dtype=bfloat16 or float16 for the frozen model alone"
    if precision in ("16-true", "16-mixed"):
        reason = "its loss scale would enlarge the gradients that model.gate_clip bounds"
        raise LitPruneError(f"trainer.precision={precision} doesn't fit: {reason}; {instead}")
    if precision == "bf16-true" and not deepspeed:
        reason = "what trains would be bf16, in which small steps round to nothing"
        raise LitPruneError(f"trainer.precision={precision} doesn't fit: {reason}; {instead}")
    stage = trainer.strategy.config.get("zero_optimization", {}).get("stage", 0) if deepspeed else None
    if stage not in (None, 1, 2, 3):
        raise LitPruneError(f"trainer.strategy: stage {stage} of ZeRO; take 1, 2 or 3, or DDP")
    if deepspeed and trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise LitPruneError("trainer.gradient_clip_algorithm=value: DeepSpeed clips gradients by their norm only")


def refuse_foreign(path: Path, trainer: Trainer, fit: bool = True) -> None:
    """Raise `LitPruneError` for a checkpoint of another strategy: a file under DeepSpeed, a folder otherwise.

    Resuming `fit` also requires that both or neither be of ZeRO-3.
    """
    if not path.exists():
        return
    deepspeed, written, here = isinstance(trainer.strategy, DeepSpeedStrategy), _kind(path), NO_ZERO
    if deepspeed:
        here = ZERO_3 if trainer.strategy.zero_stage_3 else ZERO_2
    if path.is_dir() != deepspeed or (fit and written != here):
        raise LitPruneError(
            f"{path} was written under {written}, and this run is under {here}: the optimizer's state doesn't carry "
            f"over. The plug-in does: lit-prune export --checkpoint {path} --out FOLDER, then --model.plugin=FOLDER "
            f"--model.pruner=null --model.repair=null --model.lora=null"
        )


def _kind(checkpoint: Path) -> str:
    """Strategy that wrote a checkpoint; ZeRO-1 and -2 read each other's."""
    if not checkpoint.is_dir():
        return NO_ZERO
    return ZERO_3 if any((checkpoint / "checkpoint").glob("zero_pp_rank_*_model_states.pt")) else ZERO_2


HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _own(hooks: dict) -> dict:
    """Remove the hooks of a previous DeepSpeed engine in place, since the hooks' handles refer to this dictionary."""
    for key in [key for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed")]:
        del hooks[key]
    return hooks


def parameter_count(module: nn.Module) -> int:
    """Number of a module's parameters before sharding."""
    return sum(whole_shape(p).numel() for p in module.parameters())
