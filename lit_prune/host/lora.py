"""Low-rank adapters on linear layers of the frozen decoder (LoRA, arXiv 2106.09685), added by hooks.

The weights belong to the plug-in, are saved with it, and act only where the plug-in prunes: the teacher, and the model
after `detach`, never see them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import LitPruneError, check_number
from lit_prune.host.devices import device_of
from lit_prune.host.parts import find, unwrap

FILES = ("adapter_model.safetensors", "adapter_config.json")
SEPARATOR = "/"  # in place of dots, which names of modules can't have


class Adapter(nn.Module):
    """The product of two narrow matrices beside one linear layer: zero at the start.

    Args:
        inputs: width of the layer's input. outputs: of its output. r: rank. scale: of the product. rate: of dropout.
    """

    def __init__(self, inputs: int, outputs: int, r: int, scale: float, rate: float) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs  # ZeRO-3 leaves the parameters without a shape
        self.scale, self.rate = scale, rate
        self.down, self.up = nn.Parameter(torch.empty(r, inputs)), nn.Parameter(torch.zeros(outputs, r))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, states: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Addition to the layer's output, in float32."""
        states = dropout(states.to(self.down.dtype), self.rate, self.training)
        return linear(linear(states, self.down), self.up) * self.scale


class LoRA(nn.Module):
    """Adapters on the decoder's linear layers; arguments are named as in peft's `LoraConfig`.

    Args:
        r: rank.
        lora_alpha: the product is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the adapters' input.
        target_modules: names of the linear layers inside each decoder layer, such as q_proj.

    Raises:
        LitPruneError: a number is out of range.
    """

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] = ("q_proj", "v_proj"),
    ) -> None:
        super().__init__()
        check_number("model.lora.r", r, least=1, whole=True)
        check_number("model.lora.lora_alpha", lora_alpha, above=0)
        check_number("model.lora.lora_dropout", lora_dropout, least=0, below=1)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.target_modules = tuple(target_modules)
        self.adapters = nn.ModuleDict()

    def config(self) -> dict[str, Any]:
        """Arguments from which an equal object is built."""
        numbers = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout")}
        return {**numbers, "target_modules": list(self.target_modules)}

    def build(self, model: nn.Module) -> None:
        """Create the adapters for a model, unless they exist.

        Raises:
            LitPruneError: no layer has one of the names, or existing adapters belong to another model.
        """
        found = {path: (part.in_features, part.out_features) for path, part in self.layers(model).items()}
        if not self.adapters:
            self.create(found)
        if found != self.sizes():
            raise LitPruneError("the plug-in's LoRA adapters belong to a model with other linear layers")

    def create(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Create an adapter for each path of a linear layer, of so many inputs and outputs."""
        scale = self.lora_alpha / self.r
        for path, (inputs, outputs) in sizes.items():
            adapter = Adapter(inputs, outputs, self.r, scale, self.lora_dropout)
            self.adapters[path.replace(".", SEPARATOR)] = adapter

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the adapted layers by their paths in the model."""
        parts = self.adapters.items()
        return {path.replace(SEPARATOR, "."): (part.inputs, part.outputs) for path, part in parts}

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linear layers to adapt, by their paths in the model; raises `LitPruneError` if a name has none."""
        names = {module: path for path, module in unwrap(model).named_modules()}
        layers = [layer.named_modules(prefix=names[layer]) for layer in find(model).layers]
        inside = [each for layer in layers for each in layer]
        found = {
            path: part
            for path, part in inside
            if path.rpartition(".")[2] in self.target_modules and hasattr(part, "in_features")
        }
        absent = set(self.target_modules) - {path.rpartition(".")[2] for path in found}
        if absent or not found:
            known = sorted({path.rpartition(".")[2] for path, part in inside if hasattr(part, "in_features")})
            raise LitPruneError(
                f"model.lora.target_modules: no linear layer of the decoder is named "
                f"{', '.join(sorted(absent)) or 'so'}; there is {', '.join(known)}"
            )
        return found

    def place(self, model: nn.Module) -> None:
        """Put each adapter on the device of its layer."""
        for path, part in self.layers(model).items():
            self.adapters[path.replace(".", SEPARATOR)].to(device_of(part))

    def hook(self, model: nn.Module, active: Callable[[], bool]) -> Iterator[RemovableHandle]:
        """Add the adapters to their layers, and give the handles; they act while `active()` is true."""
        for path, part in self.layers(model).items():
            yield part.register_forward_hook(partial(self._add, path.replace(".", SEPARATOR), active))

    def _add(self, path: str, active: Callable[[], bool], layer: nn.Module, args: tuple, output: Tensor):
        if not active():
            return None
        return output + self.adapters[path](args[0]).to(output.dtype)


def save_for_peft(lora: LoRA | None, folder: Path, base: str | None) -> None:
    """Write adapters as a folder that peft and the hub's tools read; of None, remove those of an earlier save.

    `base`: hub id of their model, if it has one.
    """
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    if lora is None:
        with suppress(OSError):  # absent, or something else is in it
            folder.rmdir()
        return
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, adapter in lora.adapters.items():
        name = f"base_model.model.{path.replace(SEPARATOR, '.')}"
        for kind, value in (("lora_A", adapter.down), ("lora_B", adapter.up)):
            tensors[f"{name}.{kind}.weight"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / FILES[0], metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "bias": "none"}
    # By their whole paths: equal names in the vision tower are not adapted.
    config = {**fields, **lora.config(), "target_modules": sorted(lora.sizes())}
    (folder / FILES[1]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
