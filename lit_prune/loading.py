"""Models and processors from wherever they are: this package, a folder, the hub, or a shape with random weights.

Nothing here runs code of a checkpoint, and without a network nothing waits for one.
"""

import copy
import difflib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_prune.cost.shapes import Config, names, shipped_fields, shipped_shape
from lit_prune.errors import LitPruneError, extra

Base = str | Path | PreTrainedConfig  # a folder, a hub id, a configuration
MICRO = Path(__file__).parent / "micro" / "weights"
HALF_FROM = 1e9  # parameters from which random weights are bfloat16 by default
PROBE_SECONDS = 3.0  # for the one request that tells whether the hub can be reached


def resolve(base: str | Path) -> str:
    """Folder or hub id that a model's name stands for; `micro` is the one shipped with this package.

    A folder holds `config.json`, or `adapter_config.json`: an adapter of peft, which names its base model.
    """
    if str(base) == "micro":
        if not (MICRO / "config.json").is_file():
            raise LitPruneError(
                f"the weights of micro-LLaVA are missing from {MICRO}: reinstall, or run jobs/pretrain_micro.sh"
            )
        return str(MICRO)
    path = Path(base).expanduser()
    looks_local = path.is_absolute() or str(base).startswith((".", "~")) or path.is_dir()
    if looks_local and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise LitPruneError(f"{base} is no model folder: it has no config.json")
    return str(path) if looks_local else str(base)


def load_processor(base: str | Path) -> Any:
    """Processor (tokenizer, image processor, chat template) of a model; a folder of an adapter has its base's."""
    from transformers import AutoProcessor

    return _fetch(AutoProcessor.from_pretrained, _adapted(base) or base)


def local_processor(base: str | Path) -> Any | None:
    """Processor of a model if it lies on this machine, in a folder or in the hub's cache; else None."""
    from transformers import AutoProcessor

    try:
        return _fetch(AutoProcessor.from_pretrained, _adapted(base) or base, local=True)
    except LitPruneError:
        return None


def _adapted(base: str | Path) -> str | None:
    """The base model that a folder of an adapter alone names; None for any other."""
    folder = Path(resolve(base))
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    try:
        return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise LitPruneError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path") from error


def load_model(
    base: str | Path, dtype: torch.dtype | str | None = None, *, strict: bool = True, **options: Any
) -> nn.Module:
    """Model with its weights; `dtype` by default float32 for micro, else what the checkpoint says.

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
        dtype = torch.float32 if str(base) == "micro" else "auto"
    if adapted := _adapted(base):
        if find_spec("peft") is None:
            raise LitPruneError(f"{base} is an adapter of peft, which is not installed: {extra('peft')}")
        model = load_model(adapted, dtype, strict=strict, **options)
        with _quiet() if strict else nullcontext():
            asked = {"ignore_mismatched_sizes": strict}
            info = _fetch(lambda folder, **_: model.load_adapter(folder, **asked), base).to_dict()
    else:
        with _quiet() if strict else nullcontext():
            asked = {"ignore_mismatched_sizes": strict, **options, "dtype": dtype, "output_loading_info": True}
            model, info = _fetch(AutoModelForImageTextToText.from_pretrained, base, **asked)
    if options.get("ignore_mismatched_sizes"):
        info = {**info, "mismatched_keys": ()}
    if strict:
        _check_weights(base, info)
    return model


def _check_weights(base: str | Path, info: dict[str, Any]) -> None:
    """Raise `LitPruneError` where a checkpoint is not the model's, by what `from_pretrained` says about it.

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
        if report := "LOAD REPORT" in record.getMessage():
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
        base: a configuration, a folder with `config.json`, the hub id of a shipped shape, or "micro".
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
    except ValueError as error:
        raise LitPruneError(f"{config.model_type} can't be built: {_first_line(error)}") from error
    if dtype is None and sum(p.numel() for p in model.parameters()) > HALF_FROM:
        dtype = torch.bfloat16
    device = torch.device(device)
    # The generators of all devices are put back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32, **options)


def load_config(base: Base) -> PreTrainedConfig:
    """Configuration of a model: of a folder, a shipped shape, or the hub's cache; the network is not asked."""
    from transformers import AutoConfig

    if isinstance(base, PreTrainedConfig):
        return copy.deepcopy(base)
    if _is_shipped(base):
        return shipped_config(str(base))
    return _fetch(AutoConfig.from_pretrained, base, local=True)


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
    """What sizes and prices are read off: the fields of a shipped shape as they stand, else the configuration."""
    return shipped_shape(str(base)) if _is_shipped(base) else load_config(base)


def _is_shipped(base: str | Path) -> bool:
    """Whether a name is that of a shipped shape, and of no folder here."""
    return str(base) in names() and not Path(base).is_dir()


def context_length(processor: Any, base: str | None = None) -> int | None:
    """Tokens that a model has positions for: the least that its tokenizer and the config of `base` say, if any does."""
    limits = [processor.tokenizer.model_max_length]
    if base is not None:
        with suppress(LitPruneError):  # a processor that came without a configuration
            limits.append(getattr(load_config(base).get_text_config(), "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit is not None and limit < 1e9), default=None)


def _fetch(function: Callable, base: str | Path, local: bool = False, **options: Any) -> Any:
    """Call one of the library's `from_pretrained`, and say what would help where it fails."""
    folder = _place(base, local, {name: options[name] for name in ("revision", "cache_dir") if name in options})
    options.setdefault("trust_remote_code", False)
    try:
        return function(folder, **options)
    except OSError as error:
        raise LitPruneError(f"{base} can't be loaded ({_first_line(error)}). {_advice(base)}") from error
    except ImportError as error:
        raise LitPruneError(
            f"{base} can't be loaded so ({_first_line(error)}): install what is missing, such as "
            f"{extra('quantized', 'peft')}"
        ) from error
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise LitPruneError(f"{base} can't be loaded: {_first_line(error)}") from error


def _place(base: str | Path, local: bool, version: dict[str, Any]) -> str:
    """Folder of a model, or its hub id where the hub is to be asked: not if `local`, nor if it doesn't answer."""
    name = resolve(base)
    if Path(name).is_dir():
        return name
    if "/" not in name and (likely := closest_model(name)):  # one word: the hub's models have an owner
        raise LitPruneError(f"no model `{base}`; did you mean `{likely}`?")
    if not local and hub_answers():
        return name
    try:
        return snapshot_download(name, local_files_only=True, **version)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        reason = "" if local else ", and the hub can't be reached"
        raise LitPruneError(f"{base} is no folder and not in the hub's cache{reason}. {_advice(base)}") from error


def closest_model(name: str) -> str | None:
    """The model of this package, or the shipped shape, that a name is nearly spelt like; None for its own name."""
    known = {model.rpartition("/")[2].lower(): model for model in names()}
    known |= {model.lower(): model for model in names()} | {"micro": "micro", "micro-llava": "micro"}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return known[found[0]] if found and known[found[0]] != name else None


def hub_answers() -> bool:
    """Whether the hub can be reached: one request, since the library's own retries take most of a minute."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the client's errors are its own affair: any of them means no
        return False
    return True


def _advice(base: str | Path) -> str:
    if Path(base).expanduser().is_dir():
        text = "A model folder holds config.json, *.safetensors and the processor's files."
    else:
        text = (
            f"Give a local folder with config.json and *.safetensors, or fetch it on a machine with network: "
            f"hf download {base} --local-dir FOLDER, then --model.base=FOLDER (`lit-prune` verbs: --model FOLDER)"
        )
    if likely := closest_model(str(base)):
        text = f"Did you mean `{likely}`? {text}"
    if str(base) in names() or (Path(base).expanduser() / "config.json").is_file():
        text += f". Benchmarks need no weights: lit_prune.load({str(base)!r}, random_weights=True)"
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
