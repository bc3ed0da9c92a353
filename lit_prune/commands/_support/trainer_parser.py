"""LightningCLI's parser with configuration files looked up, checked, and free of what a swapped class leaves behind.

jsonargparse keeps equally named ``init_args`` of the old class when a later file or option swaps a ``class_path``: a
budget or a list of layers meant for one method would silently serve another. So the old class goes first.
"""

from typing import Any, NamedTuple

from jsonargparse import ActionConfigFile, Namespace
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch.cli import LightningArgumentParser

from lit_prune.commands._support.classes import find_class, no_class
from lit_prune.commands._support.settings import check_content, config_content, last_name, option_content, specs
from lit_prune.errors import UsageError
from lit_prune.files.shipped import config_or_text


class Given(NamedTuple):
    """A configuration file, or an option with its value, as it was read."""

    file: str  # empty for a value written on the command line
    key: str  # dotted; empty for a whole configuration
    content: Any


class PruneParser(LightningArgumentParser):
    """Keeps what it was given, for whoever explains why it can't be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[Given] = []
        self.unknown: list[str] = []  # words that belong to no option
        self.linked: list[str] = []  # keys that get another key's value

    def link_arguments(self, source: str, target: str, **kwargs: Any) -> None:
        """Give one key's value to another."""
        self.linked.append(target)
        super().link_arguments(source, target, **kwargs)

    def _parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Namespace, list[str]]:
        namespace, self.unknown = super()._parse_known_args(*args, **kwargs)
        return namespace, self.unknown

    def watch_options(self) -> None:
        """Let all options that were added check their values; jsonargparse has no public way to choose their class."""
        for action in self._actions:
            if type(action) in WATCHED:
                action.__class__ = WATCHED[type(action)]


class ConfigFile(ActionConfigFile):
    """``--config``: a file that isn't here is looked up among those that come with the package."""

    def __call__(self, parser: PruneParser, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        values = config_or_text(values)
        content = config_content(values)
        written = values.startswith("{") or "\n" in values
        check_content(content, "", "--config" if written else values)
        parser.given.append(Given("" if written else values, "", content))
        _forget_swapped(cfg, content, "")
        super().__call__(parser, cfg, values, option_string)


class _Watched:
    """Any other option: it may be given a value, the name of a class, or a configuration file of its part."""

    def __call__(self, parser: PruneParser, cfg: Namespace, value: Any, option: str | None = None) -> None:
        key = _full_key(cfg, (option or "").removeprefix("--").removesuffix("+").removesuffix(".class_path"))
        content = option_content(value)
        check_content(content, key, value if isinstance(value, str) and not value.startswith("{") else f"{option}")
        as_written = content is None or content == {"class_path": value}
        parser.given.append(Given("", key, value if as_written else content))
        _forget_swapped(cfg, content, key)
        super().__call__(parser, cfg, value, option)


class _Option(_Watched, ActionTypeHint):
    pass


class _Group(_Watched, _ActionConfigLoad):
    pass


class _ClassHelp(_ActionHelpClassPath):
    def __call__(self, parser: PruneParser, cfg: Namespace, value: str | None, option: str | None = None) -> None:
        if value is not None and find_class(value, self._help_types) is None:
            raise UsageError(no_class(value))
        super().__call__(parser, cfg, value, option)


WATCHED = {ActionTypeHint: _Option, _ActionConfigLoad: _Group, _ActionHelpClassPath: _ClassHelp}


def _full_key(cfg: Namespace, key: str) -> str:
    """`model.pruner.init_args.layers` for `model.pruner.layers`, where a pruner is chosen."""
    node, parts = cfg, []
    for part in key.split("."):
        if isinstance(node, Namespace) and "class_path" in node and part not in ("class_path", "init_args"):
            parts.append("init_args")
            node = node.get("init_args")
        parts.append(part)
        node = node.get(part) if isinstance(node, Namespace) else None
    return ".".join(parts)


def _forget_swapped(cfg: Namespace, content: Any, key: str) -> None:
    """Drop, in place, the classes that new content replaces by others."""
    for place, spec in specs(content, key):
        old = cfg.get(place) if place else None
        if (
            isinstance(old, Namespace)
            and "class_path" in old
            and last_name(old.class_path) != last_name(spec["class_path"])
        ):
            cfg[place] = None
