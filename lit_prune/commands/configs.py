"""List the configurations that come with the package, or copy them to edit."""

import filecmp
import shutil
from pathlib import Path
from typing import Literal

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError
from lit_prune.files.shipped import FOLDER, closest_configs, config_names, description, meant


def run(action: Literal["list", "copy"] = "list", names: list[str] | None = None, to: Path = Path("configs")) -> None:
    """List the shipped configurations with a line about each, or copy some to edit.

    Every option `-c` and `--pruner` finds a shipped configuration where no file of that name is here, so none of them
    has to be copied to be used: `-c micro.yaml`, `-c configs/pruners/fastv.yaml` and `--pruner fastv` work anywhere.

    Args:
        action: list or copy.
        names: Configurations or their folders, e.g. micro pruners/fastv sweeps. Default: all.
        to: Folder to copy to; their folders are kept, so that pruners/fastv becomes TO/pruners/fastv.yaml. A file that
            is there and differs is not written over.

    Examples:
        lit-prune configs
        lit-prune configs list pruners models
        lit-prune configs copy micro pruners/fastv --to my_configs
    """
    chosen = sorted({name for word in names or [""] for name in _chosen(word)}, key=config_names().index)
    if action == "copy":
        _copy(chosen, to)
        return
    width = max(map(len, chosen))
    for name in chosen:
        console.out.print(
            f"{name:<{width}}  {description(FOLDER / f'{name}.yaml')}", markup=False, highlight=False, soft_wrap=True
        )


def _chosen(word: str) -> list[str]:
    """The shipped configurations that a word names: one by its path, all of a folder, or one by its file's name."""
    word = word.strip("/").removeprefix("configs/").removesuffix(".yaml")
    known = config_names()
    if word in ("", "configs"):
        return list(known)
    if word in known:
        return [word]
    if inside := [name for name in known if name.startswith(f"{word}/")]:
        return inside
    alike = [name for name in known if name.rpartition("/")[2] == word]
    if alike:
        return alike[:1]  # the least nested
    raise LitPruneError(f"no shipped configuration `{word}`{meant(closest_configs(word))}")


def _copy(names: list[str], folder: Path) -> None:
    """Copy all or nothing: a file that is there and differs stops it before the first one is written."""
    targets = {FOLDER / f"{name}.yaml": folder / f"{name}.yaml" for name in names}
    for source, target in targets.items():
        if target.exists() and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise LitPruneError(f"{target} is there and differs from the shipped file: move it, or give another --to")
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(source, target)
        console.out.print(str(target), markup=False, highlight=False, soft_wrap=True)
