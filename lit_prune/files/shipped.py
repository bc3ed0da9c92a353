"""Shipped configurations: the repository's `configs/`, which is part of the wheel too."""

import difflib
import re
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePath

from lit_prune.errors import LitPruneError
from lit_prune.files.renamed import CONFIGS

FOLDER = Path(__file__).with_name("configs")
SUFFIXES = (".yaml", ".yml")


@cache
def config_names(kind: str = "") -> tuple[str, ...]:
    """Names of the shipped configurations, such as `micro` and `pruners/fastv`; with a `kind`, those of its folder."""
    found = (path.relative_to(FOLDER).with_suffix("").as_posix() for path in sorted((FOLDER / kind).glob("**/*.yaml")))
    return tuple(sorted(found, key=lambda name: (name.count("/"), name)))


def find_config(name: str | Path, kind: str = "") -> Path:
    """Find the file of a configuration by path or name.

    A file that exists is taken as it is. Otherwise `micro.yaml`, `configs/micro.yaml`, `pruners/fastv` or, with `kind`
    "pruners", `fastv` is looked up in `configs/` of the working directory, then among the shipped ones.

    Args:
        name: a path or a name, with `.yaml` or without.
        kind: folder of `configs/` in which a name without a folder is looked up first.

    Raises:
        LitPruneError: there is no such file, with the closest names that there are.
    """
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES and path.is_file():
        return path
    for base in (Path("configs"), FOLDER):
        for relative in _relatives(path, kind):
            if (base / relative).is_file():
                return base / relative
    if path.suffix in SUFFIXES:
        what = f"{name}: No such file"
    else:
        what = f"no {'method' if kind == 'pruners' else 'configuration'} `{name}`"
    raise LitPruneError(f"{what}{meant(closest_configs(path, kind))} (`lit-prune configs` lists what is shipped)")


def _relatives(path: Path, kind: str) -> list[PurePath]:
    """Candidate paths under `configs/`: as written, and in the folder of its kind."""
    if path.is_absolute() or ".." in path.parts:
        return []
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if not parts:
        return []
    relative = PurePath(*parts)
    if relative.suffix not in SUFFIXES:
        relative = relative.with_name(f"{relative.name}.yaml")
    if not kind or len(path.parts) > 1:
        return [relative]
    in_folder = PurePath(kind, relative)
    return [in_folder, relative] if path.suffix in SUFFIXES else [in_folder]


def closest_configs(path: str | Path, kind: str = "") -> list[str]:
    """Names similar to a missing path: files next to it, then shipped ones; at most two."""
    path = Path(path)
    beside = {file.name: str(file) for suffix in SUFFIXES for file in path.parent.glob(f"*{suffix}")}
    if found := difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7):
        return [beside[found[0]]]
    suffix = path.suffix if path.suffix in SUFFIXES else ""
    wanted = path.name.removesuffix(suffix)
    bare = bool(kind) and not suffix
    stems: dict[str, list[str]] = {}
    for name in config_names(kind if bare else ""):
        stems.setdefault(PurePath(name).name, []).append(name)
    alike = (
        [CONFIGS[wanted]] if wanted in CONFIGS else difflib.get_close_matches(wanted.lower(), stems, n=2, cutoff=0.6)
    )
    return [PurePath(name).name if bare else f"{name}{suffix}" for stem in alike for name in stems[stem]][:2]


def config_or_text(value: str) -> str:
    """Resolve the value of `--config` to a shipped file; local files and inline text are returned unchanged."""
    try:
        return value if Path(value).is_file() else str(find_config(value))
    except (LitPruneError, OSError, ValueError):
        return value


def meant(names: list[str]) -> str:
    """End of a message that suggests names; empty without any."""
    return f"; did you mean {' or '.join(f'`{name}`' for name in names)}?" if names else ""


def description(path: Path) -> str:
    """First sentence of the comment at the start of a file; empty without one."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0].strip()
