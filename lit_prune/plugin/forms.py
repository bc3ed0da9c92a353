"""A resumed run has the `form` of its pruner and repair adapter from the checkpoint."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import translated
from lit_prune.plugin.plugin import Plugin


def take_forms(plugin: Plugin, settings: dict[str, Any], fixed: bool = False) -> None:
    """Give each part of a plug-in the form that a checkpoint's `settings` name; the others stay as they are.

    Configurations from before `form` have none, and its default is another one than theirs.

    Args:
        plugin: built, before an optimizer has its parameters. settings: `Plugin.settings()` of the checkpoint.
        fixed: the parameters can't be replaced any more.

    Raises:
        LitPruneError: a form differs and the parameters are `fixed`.
    """
    for key, part, arguments in (
        *_parts("pruner", plugin.pruner, settings),
        *_parts("repair", plugin.repair, settings),
    ):
        form = arguments.get("form")
        if form is None or getattr(part, "form", form) == form:
            continue
        if fixed:
            raise LitPruneError(f"the checkpoint's {key} has form: {form}; set model.{key}.init_args.form={form}")
        rank_zero_info(f"model.{key}: form {form}, as in the checkpoint; the configuration says {part.form}")
        part.take_form(form, plugin.dims)
        part.train(plugin.training)


def _parts(key: str, part: nn.Module | None, settings: dict[str, Any]) -> Iterator[tuple[str, nn.Module, dict]]:
    """The part at `key`, and those inside it, each with its dotted key and its arguments in the checkpoint."""
    spec = settings.get(key)
    if part is None or spec is None or spec["class_path"].rpartition(".")[2] != type(part).__qualname__:
        return
    arguments = translated(type(part), spec["init_args"])
    yield key, part, arguments
    for name, inner in arguments.items():
        if isinstance(inner, dict) and "class_path" in inner:
            for found, *rest in _parts(name, getattr(part, name, None), arguments):
                yield f"{key}.init_args.{found}", *rest
