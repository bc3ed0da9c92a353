"""Models and processors from wherever they are: this package, a folder, the hub, or a shape with random weights.

Nothing here runs code of a checkpoint, and without a network nothing waits for one.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune.cost.shapes import Config, shipped_fields, shipped_shape
from lit_prune.errors import LitPruneError, extra
from lit_prune.loading.locations import (
    HUB_OPTIONS,
    SHIPPED,
    adapted_from,
    fetch,
    first_line,
    hub_text,
    is_shipped,
    refuse_attention,
    refuse_unnamed,
)

Base = str | Path | PreTrainedConfig  # a folder, a hub id, a configuration
HALF_FROM = 1e9  # parameters from which random weights are bfloat16 by default


def load_base(
    base: Base | nn.Module,
    dtype: torch.dtype | None = None,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    strict: bool = True,
    random: int | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, str]:
    """Model, processor and name, from all that `lit_prune.load` takes but plug-ins; arguments as there.

    `random`: seed of random weights; None for those of the checkpoint.
    """
    if isinstance(base, nn.Module):
        if random is not None or dtype is not None or options:
            raise LitPruneError("a model that is built already is taken as it is: set its dtype and options before")
        model, name = base, str(getattr(base.config, "_name_or_path", ""))
    elif random is not None:
        model = random_model(base, dtype, device or "cpu", random, **options)
        name = base.model_type if isinstance(base, PreTrainedConfig) else str(base)
    elif isinstance(base, PreTrainedConfig):
        raise LitPruneError("a configuration has no weights: load it with random_weights=True")
    else:
        refuse_unnamed(base)
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        if device is not None and "device_map" in options:
            raise LitPruneError("give either device or device_map: a map says where each part of the model is")
        # Quantized weights are created on their device, since they can't be moved.
        if device is not None and "quantization_config" in options:
            options["device_map"], device = {"": device}, None
        model, name = load_model(base, dtype, strict=strict, **options), hub_text(base, hub)
        processor = processor or load_processor(base, **hub)
    if processor is None:
        processor = local_processor(name) if name else None
    elif isinstance(processor, (str, Path)):
        processor = load_processor(processor)
    return model if device is None else model.to(device), processor, name


def load_processor(base: str | Path, **hub: Any) -> Any:
    """Processor (tokenizer, image processor, chat template) of a model; a folder of an adapter has its base's.

    `hub`: options of a repository, see `HUB_OPTIONS`.
    """
    from transformers import AutoProcessor

    adapted = adapted_from(base)
    return fetch(AutoProcessor.from_pretrained, adapted or base, **({} if adapted else hub))


def local_processor(base: str | Path) -> Any | None:
    """Processor of a model if it lies on this machine, in a folder or in the hub's cache; else None."""
    from transformers import AutoProcessor

    try:
        return fetch(AutoProcessor.from_pretrained, adapted_from(base) or base, local=True)
    except LitPruneError:
        return None


def load_model(
    base: str | Path, dtype: torch.dtype | str | None = None, *, strict: bool = True, **options: Any
) -> nn.Module:
    """Load a model with its weights; `dtype` by default float32 for the models of this package, otherwise
    the checkpoint's.

    Args:
        base: a folder, a hub id, or the folder of an adapter, which names its base model.
        dtype: of the weights.
        strict: refuse a checkpoint that lacks weights of the model, or holds others; else they are random, or ignored.
        options: passed to `from_pretrained`.

    Raises:
        LitPruneError: there are no weights, they can't be read, or they are not the model's, with what would help.
    """
    from transformers import AutoModelForImageTextToText

    if dtype is None:
        dtype = torch.float32 if str(base) in SHIPPED else "auto"
    if adapted := adapted_from(base):
        if find_spec("peft") is None:
            raise LitPruneError(f"{base} is an adapter of peft, which is not installed: {extra('peft')}")
        model = load_model(adapted, dtype, strict=strict, **options)
        with _quiet() if strict else nullcontext():
            asked = {"ignore_mismatched_sizes": strict}
            info = fetch(lambda folder, **_: model.load_adapter(folder, **asked), base).to_dict()
    else:
        with _quiet() if strict else nullcontext():
            asked = {"ignore_mismatched_sizes": strict, **options, "dtype": dtype, "output_loading_info": True}
            model, info = fetch(AutoModelForImageTextToText.from_pretrained, base, **asked)
    if options.get("ignore_mismatched_sizes"):
        info = {**info, "mismatched_keys": ()}
    if strict:
        _check_weights(base, info)
    return model


def _check_weights(base: str | Path, info: dict[str, Any]) -> None:
    """Raise `LitPruneError` if a checkpoint doesn't fit the model, according to `from_pretrained`'s report.

    The library leaves out what a model's class itself declares as tied, or as not to be saved.
    """
    found = {
        "lacks": sorted(info["missing_keys"]),
        "holds in other sizes": sorted(name for name, *_ in info["mismatched_keys"]),
        "holds besides": sorted(info["unexpected_keys"]),
    }
    if not any(found.values()):
        return
    import transformers

    from lit_prune.host.compat import TESTED  # slow to import

    said = "; ".join(
        f"{verb} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for verb, names in found.items()
        if names
    )
    raise LitPruneError(
        f"the weights of {base} are not those of its model in transformers {transformers.__version__}: it {said}. "
        f"Versions {TESTED} are known to work. What is lacking would be random: take the model as it is only where "
        f"that is meant, by lit_prune.load(..., strict=False)"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the library's table of missing and left-over weights, unless it fails: our error sums it up."""
    log, held = logging.getLogger("transformers.modeling_utils"), []

    def other(record: logging.LogRecord) -> bool:
        if report := record.module == "loading_report":  # the module of the library that makes it
            held.append(record)
        return not report

    log.addFilter(other)
    try:
        yield
    except Exception:
        log.removeFilter(other)
        for record in held:
            log.handle(record)
        raise
    finally:
        log.removeFilter(other)


def random_model(
    base: Base,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Model of the real shape with random weights, made on `device`: for costs, benchmarks and tests.

    Args:
        base: a configuration, a folder with `config.json`, the hub id of a shipped shape, "micro" or "micro-576".
        dtype: by default bfloat16 for models of more than a billion parameters, else float32.
        device: where the weights are made, such as "cuda"; on "meta" they are never made.
        seed: of the weights; the library's own initialisation draws them, so the same seed gives the same model.
        options: of the model, such as `attn_implementation`.

    Raises:
        LitPruneError: the shape is not known here.
    """
    from transformers import AutoModelForImageTextToText

    if placed := {"device_map", "quantization_config"}.intersection(options):
        raise LitPruneError(f"random weights are made on one device and as they are: give device=, not {min(placed)}")
    config = load_config(base)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32, **options)
    except ImportError as error:
        refuse_attention(config.model_type, options, error)
        raise
    except ValueError as error:
        raise LitPruneError(f"{config.model_type} can't be built: {first_line(error)}") from error
    if dtype is None and sum(p.numel() for p in model.parameters()) > HALF_FROM:
        dtype = torch.bfloat16
    device = torch.device(device)
    # The generators of all devices are put back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32, **options)


def load_config(base: Base) -> PreTrainedConfig:
    """Load a configuration from a folder, a shipped shape or the hub's cache, without network access."""
    from transformers import AutoConfig

    if isinstance(base, PreTrainedConfig):
        return copy.deepcopy(base)
    if is_shipped(base):
        return shipped_config(str(base))
    return fetch(AutoConfig.from_pretrained, base, local=True)


def shipped_config(name: str) -> PreTrainedConfig:
    """Configuration of a public checkpoint, from this package: no network, and no code of the checkpoint's is run.

    Raises `LitPruneError` for a shape that is not shipped.
    """
    return config_of(shipped_fields(name), name)


def config_of(fields: dict[str, Any], name: str) -> PreTrainedConfig:
    """A configuration from the fields of a `config.json`; raises `LitPruneError` naming the one that describes none."""
    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise LitPruneError(f"{name} describes no model of transformers: {error}") from error


def hide_progress() -> None:
    """Turn off the library's progress bars: commands show their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_shape(base: str | Path) -> Config:
    """Source of a model's sizes: the fields of a shipped shape as they are, otherwise the configuration."""
    return shipped_shape(str(base)) if is_shipped(base) else load_config(base)


def context_length(processor: Any, base: str | None = None) -> int | None:
    """Tokens that a model has positions for: the least that its tokenizer and the config of `base` say, if any does."""
    limits = [processor.tokenizer.model_max_length]
    if base is not None:
        with suppress(LitPruneError):  # a processor that came without a configuration
            limits.append(getattr(load_config(base).get_text_config(), "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit is not None and limit < 1e9), default=None)
