"""Public interface: load a model, attach a pruner to it, detach it, answer prompts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from lit_prune import loading
from lit_prune.cost.flops import ModelSize
from lit_prune.errors import LitPruneError
from lit_prune.files.inputs import Picture, check_prompts, is_image, pair
from lit_prune.host import DecoderHost, Session, host_of
from lit_prune.host.compat import drop_capturing_hooks, put_on_record, recording_classes
from lit_prune.host.compiled import CompiledForward
from lit_prune.host.encoding import encode_images
from lit_prune.host.options import Frames, Positions, Proportional
from lit_prune.host.parts import find, unwrap
from lit_prune.host.positions import settled
from lit_prune.host.structure import counted_size
from lit_prune.loading.locations import HUB_OPTIONS, LOCAL
from lit_prune.ops.budget import parse_budget, resolve
from lit_prune.plugin import Plugin, fingerprint
from lit_prune.plugin.description import as_html, describe
from lit_prune.plugin.methods import as_plugin, plugin_from_yaml, plugin_in, plugin_on_hub
from lit_prune.pruners.base import PruningMethod
from lit_prune.repair import RepairAdapter

__all__ = ["VLM", "as_plugin", "load", "plugin_from_yaml"]


def load(
    base: loading.Base | nn.Module = "micro",
    dtype: torch.dtype | None = None,
    *,
    processor: Any = None,
    random_weights: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    strict: bool = True,
    **options: Any,
) -> "VLM":
    """Load a frozen vision-language model with its processor, ready to attach a pruner to.

    Args:
        base: "micro", a local folder in the Hugging Face layout, a hub id `OWNER/NAME[/SUBFOLDER][:REVISION]`, a folder
            or hub id of a peft adapter, or of a plug-in, which is attached to its base model, or a transformers model
            (or `PeftModel`) object, which is frozen in place. With `random_weights` also a configuration.
        dtype: of the weights. By default float32 for micro, otherwise the checkpoint's; random weights of more than a
            billion parameters are bfloat16.
        processor: a processor, or the name of one to load; by default that of `base`. Random weights and model objects
            work without one if none is on this machine: then pass token ids to `model` yourself.
        random_weights: build the real shape with random weights and download nothing; see `lit_prune.cost.shapes`.
        device: device of the model, such as "cuda"; by default the CPU, or that of the model object.
        seed: of random weights.
        strict: raise an error if a checkpoint lacks weights of the model or has unexpected ones; otherwise missing ones
            are random and unexpected ones ignored.
        options: passed to `from_pretrained` (`attn_implementation`, `device_map`, `quantization_config`, ...), and
            `revision`, `token`, `subfolder`, `cache_dir` of a repository or folder.

    Raises:
        LitPruneError: the model can't be found or built; the message says what would help.
    """
    if not isinstance(base, loading.Base | nn.Module) or base == "":
        raise LitPruneError(f"{base!r} is no model: give a name such as 'micro', a folder, a hub id, or a model object")
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    settings = {"processor": processor, "device": device, "strict": strict, "random": seed if random_weights else None}
    try:
        if (plugin := plugin_in(base, hub)) is None:
            return VLM(*loading.load_base(base, dtype, **settings, **options))
    except LitPruneError:  # a repository shows only when it is opened that it is a plug-in's
        if random_weights or (plugin := plugin_on_hub(base, hub)) is None:
            raise
    rest = {name: value for name, value in options.items() if name not in hub}
    return VLM(*loading.load_base(plugin.base or LOCAL, dtype, **settings, **rest)).attach(plugin)


class VLM:
    """A frozen model, its processor, and the attached plug-in, if any.

    With nothing attached, `model` is the plain transformers model: the teacher. With a plug-in attached, the same
    object prunes: the student. There is one copy of the weights.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str = "") -> None:
        find(model)
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.host: DecoderHost | None = None
        self.plugin: Plugin | None = None

    def __repr__(self) -> str:
        """Describe the model and the attached plug-in: method, budget, schedule, trainable parameters."""
        return "\n  ".join(describe(self))

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        return as_html(describe(self))

    def __getstate__(self) -> dict[str, Any]:
        """Make a model pickle after a forward; see `drop_capturing_hooks`."""
        drop_capturing_hooks(self.model)
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make an unpickled model run in another process; see `put_on_record`."""
        vars(self).update(state)
        put_on_record(recording_classes(self.model))

    @cached_property
    def size(self) -> ModelSize | None:
        """Sizes for `lit_prune.cost.flops`, as far as known; None if not even the decoder's are."""
        return counted_size(self.model)

    def attach(
        self,
        pruner: PruningMethod | Plugin | str | Path,
        repair: RepairAdapter | None = None,
        keep: Any = None,
        *,
        positions: Positions | None = None,
        proportional_attention: Proportional | None = None,
        frames: Frames | None = None,
        **hub: Any,
    ) -> "VLM":
        """Attach a pruner, which acts in forward and `generate()`; if this fails, the previous one stays attached.

        Args:
            pruner: the name of a shipped method such as "fastv", a YAML file (its `model.pruner`, `model.repair`,
                `model.keep` and so on), a folder written by `save_pretrained` or its hub id
                `OWNER/NAME[/SUBFOLDER][:REVISION]`, each also as `PATH@BUDGET` or `PATH!` without its repair adapter,
                "full" for the plain model, a pruner object, or a `Plugin`.
            repair: repair adapter for a pruner object.
            keep: budget, visual tokens averaged over the decoder layers' inputs: a count such as 16, a share of the
                model's such as "11.1%" (where images differ, of each sample's), or the counts themselves as
                {pruning layer: count} or "2:192,4:64"; overrides the file's.
            positions: position ids of kept tokens, see `HostOptions`; overrides the file's. If a file asks for
                `renumbered` ones and this model's tokens have several positions each (M-RoPE), they stay the original
                ones, with a warning; as an argument it is an error.
            proportional_attention: add log(size) to the attention logits of kept tokens, which represent the dropped
                ones; see `HostOptions`; overrides the file's.
            frames: of a video compete for its budget (`together`) or have a share each (`apart`); overrides the file's.
            hub: `revision`, `token`, `subfolder`, `cache_dir` of a plug-in's folder or repository.

        Raises:
            LitPruneError: layers outside the model, a budget that can't be met, or a plug-in of another base model.
        """
        plugin = as_plugin(pruner, repair, **hub)
        parts = find(self.model)
        device, visual = parts.device, None if parts.dims.varies else parts.dims.visual
        default = plugin.pruner.default_keep if plugin.keep is None else plugin.keep
        budget = default if keep is None else parse_budget(keep, visual=visual)
        if budget is None:
            raise LitPruneError("give a budget: keep=N, visual tokens averaged over the decoder layers' inputs")
        budget = budget if visual is None else resolve(budget, visual)
        options = settled(plugin.options, parts.decoder, positions, proportional_attention, frames)
        plugin.build(parts.dims, fingerprint(self.model), self.model)
        plugin.to(device)
        model = unwrap(self.model)
        given = (plugin.pruner, plugin.repair, budget, options, host_of(model), plugin.lora)
        self.host = DecoderHost(model, *given)
        plugin.keep, plugin.base, plugin.options = budget, plugin.base or self.name, options
        self.plugin = plugin
        return self

    def detach(self) -> "VLM":
        """Restore the plain model, bit for bit, even if another VLM of the same model attached the plug-in."""
        if (host := host_of(self.model)) is not None:
            host.detach()
        self.host, self.plugin = None, None
        return self

    def compile(self, **options: Any) -> "VLM":
        """Compile each decoder layer permanently; plug-ins may be attached and detached before and after.

        Layers are compiled one by one, since hooks added to a model compiled as a whole are silently ignored. With a
        fixed budget a layer sees two lengths, prefill and decoding; prompts of other lengths make it dynamic.

        Args:
            options: passed to `torch.compile` (`mode`, `backend`, `dynamic`, ...).
        """
        for layer in find(self.model).layers:
            layer.forward = CompiledForward(layer, options)
        return self

    def using(self, session: Session) -> AbstractContextManager[Session]:
        """Context manager that runs forwards under a `Session`: as the teacher, softly masked, recorded."""
        if self.host is None or not self.host.handles:
            raise LitPruneError("attach a pruner first")
        return self.host.using(session)

    @torch.no_grad()
    def encode_images(self, inputs: dict[str, Any], plain: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run vision tower and projector, so that several forwards can share the image features.

        Tokens are pruned there if the attached method prunes in the tower and the current `Session` allows it.

        Args:
            inputs: model inputs with pixels.
            plain: the same inputs encoded by the plain model; returned if nothing prunes in the tower.
        """
        if plain is not None and not (self.host is not None and self.host.prunes_tower):
            return dict(plain)
        return encode_images(unwrap(self.model), inputs)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the attached plug-in as a folder: safetensors, JSON, a model card; see `Plugin.save_pretrained`."""
        self._attached("save").save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the attached plug-in to a repository of the hub; see `Plugin.push_to_hub`."""
        return self._attached("publish").push_to_hub(repo_id, **options)

    def _attached(self, purpose: str) -> Plugin:
        if self.plugin is None:
            raise LitPruneError(f"nothing is attached, so there is nothing to {purpose}")
        return self.plugin

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: str | Path | None = None, **options: Any) -> "VLM":
        """Load a plug-in on the base that it names, or on `base`; hub options are the plug-in's, others `load`'s."""
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        plugin = Plugin.from_pretrained(folder, **hub)
        return load(base or plugin.base or LOCAL, **options).attach(plugin)

    def encode(self, images: Picture | Sequence[Picture], prompts: str | Sequence[str]) -> Mapping[str, Tensor]:
        """Encode one image and one question per sample: chat template, left padding, on the model's device.

        Arguments and errors are those of `answer`; an empty batch raises `LitPruneError`.
        """
        pictures, questions = pair(images, prompts)
        if not questions:
            raise LitPruneError("nothing to encode: give at least one image and one prompt")
        return self._encode(pictures, questions)

    def _encode(self, images: list[Image.Image], prompts: list[str]) -> Mapping[str, Tensor]:
        processor = self._processor()
        check_prompts(prompts, getattr(processor, "image_token", None))
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        try:
            inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        except ValueError as error:
            raise LitPruneError(f"the processor of {self.name or 'this model'} refuses an image: {error}") from error
        return inputs.to(self.model.device)

    @overload
    def answer(self, images: Picture, prompts: str, max_new_tokens: int = 64) -> str: ...

    @overload
    def answer(
        self, images: Picture | Sequence[Picture], prompts: str | Sequence[str], max_new_tokens: int = 64
    ) -> list[str]: ...

    @torch.inference_mode()
    def answer(
        self, images: Picture | Sequence[Picture], prompts: str | Sequence[str], max_new_tokens: int = 64
    ) -> str | list[str]:
        """Answer one or several questions about one or several images by greedy decoding.

        Args:
            images: paths, PIL images, or arrays of uint8, height x width (x 3): one or a list.
            prompts: questions without chat template: one or a list. One question serves all images, one image all
                questions; two lists must have equal length.
            max_new_tokens: longest answer.

        Returns:
            The answer, or a list of answers if either is a list.

        Raises:
            LitPruneError: an input is no image or no question, or the lists differ in length.
        """
        if max_new_tokens < 1:
            raise LitPruneError(f"max_new_tokens={max_new_tokens} must be at least 1")
        pictures, questions = pair(images, prompts)
        if not questions:
            return []
        inputs = self._encode(pictures, questions)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = self.decode(tokens, inputs["input_ids"].shape[1])
        return answers[0] if is_image(images) and isinstance(prompts, str) else answers

    def decode(self, sequences: Tensor, prompt_length: int) -> list[str]:
        """Decode generated tokens, without the prompt, to text."""
        texts = self._processor().batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _processor(self) -> Any:
        if self.processor is None:
            raise LitPruneError(
                f"{self.name or 'this model'} has no processor to encode text and images with: random weights come "
                f"without a tokenizer, and a model object brings none. Give load() one (processor=FOLDER or an "
                f"object), or pass token ids and pixels to `model` yourself"
            )
        return self.processor
