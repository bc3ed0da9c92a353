"""YAML as jsonargparse reads it, except that pairs such as 2:30 stay text, since budgets are written so."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from lit_prune.files.yaml_files import pairs_as_text


@cache
def install(mode: str) -> None:
    """Make all parsers of this mode (`yaml`, `omegaconf+`) read YAML this way."""
    ArgumentParser(parser_mode=mode).parse_string("{}")  # only now is the mode's own loader there
    set_loader(mode, partial(_load, get_loader(mode)), (yaml.YAMLError,))


def _load(load: Callable[[str], Any], text: str) -> Any:
    return load(pairs_as_text(text))
