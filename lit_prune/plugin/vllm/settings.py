"""The method and its budget in a model's configuration, and what vLLM needs to know before it builds the model."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from lit_prune.errors import LitPruneError, check_choice
from lit_prune.host.options import Positions
from lit_prune.ops.budget import Budget, format_budget, parse_budget
from lit_prune.plugin.methods import as_plugin, plugin_of
from lit_prune.plugin.plugin import Plugin
from lit_prune.pruners.base import Pruner, PruningMethod

KEY = "lit_prune"  # in hf_overrides
MARK = 1e-9  # vLLM lets a model set positions of its own where some share of videos is pruned


@dataclass(frozen=True)
class Settings:
    """A method that acts before the decoder, with the budget of each image.

    Args:
        plugin: the method.
        keep: visual tokens of each image.
        depth: decoder layers.
        positions: of kept tokens, see `HostOptions`.
    """

    plugin: Plugin
    keep: Budget
    depth: int
    positions: str = "original"

    @property
    def pruner(self) -> PruningMethod:
        """The method itself."""
        return self.plugin.pruner

    @property
    def stage(self) -> Pruner | None:
        """Its stage before decoder layer 0; None for the plain model."""
        return next((stage.pruner for stage in self.pruner.walk(self.depth)), None)

    def planned(self, visual: int) -> int:
        """Tokens kept of an image of `visual` tokens."""
        return self.pruner.plan(self.keep, visual, self.depth).get(0, visual)


def planned(settings: Settings | None, visual: int) -> int:
    """Tokens kept of an image of `visual` tokens; all if nothing prunes."""
    return visual if settings is None else settings.planned(visual)


def settings_of(config: Any) -> Settings | None:
    """Read `lit_prune` in a model's configuration; None if there is nothing to prune.

    Raises:
        LitPruneError: no such method, no budget, or a method that vLLM can't run.
    """
    given = getattr(config, KEY, None)
    if given is None:
        return None
    if not isinstance(given, dict) or (unknown := given.keys() - {"pruner", "keep", "positions"}):
        wrong = f"unknown {', '.join(sorted(unknown))}" if isinstance(given, dict) else repr(given)
        raise LitPruneError(f'hf_overrides: {KEY}: {wrong}; write {{"pruner": METHOD, "keep": TOKENS}}')
    pruner = given.get("pruner")
    if isinstance(pruner, dict):
        plugin = plugin_of({"pruner": pruner}, f"hf_overrides: {KEY}")
    elif isinstance(pruner, str):
        plugin = _named(pruner)
    else:
        raise LitPruneError(f"hf_overrides: {KEY}: give pruner, a method's name such as divprune")
    keep = given.get("keep")
    keep = plugin.keep if keep is None else parse_budget(keep, f"hf_overrides: {KEY}.keep")
    if keep is None and plugin.pruner.walk(1):
        raise LitPruneError(f"hf_overrides: {KEY}: give keep, the visual tokens of each image")
    positions = given.get("positions") or plugin.options.positions
    check_choice(f"hf_overrides: {KEY}.positions", positions, get_args(Positions))
    found = Settings(plugin, 1 if keep is None else keep, config.get_text_config().num_hidden_layers, positions)
    _check(found)
    return found if found.stage is not None else None


@lru_cache
def _named(pruner: str) -> Plugin:
    return as_plugin(pruner)


def _check(settings: Settings) -> None:
    """Raise `LitPruneError` where vLLM's decoder would have to do what it doesn't."""
    plugin, name = settings.plugin, type(settings.pruner).__name__
    if isinstance(settings.keep, dict) and settings.keep.keys() != {0}:
        raise LitPruneError(f"{KEY}.keep={format_budget(settings.keep)}: vLLM prunes before decoder layer 0 only")
    layers = settings.pruner.stages(settings.depth)
    if any(layer > 0 for layer in layers):
        raise LitPruneError(
            f"{name} prunes before decoder layers {', '.join(map(str, layers))}, and in vLLM all layers share one "
            f"table of cached tokens: use a method that acts before the decoder, such as divprune or visionzip"
        )
    if plugin.trained or plugin.repair is not None:
        raise LitPruneError(f"{name} has trained parts or repairs the decoder's states, which vLLM computes itself")
    if plugin.options.proportional_attention != "none":
        raise LitPruneError(f"{name}: proportional attention changes the decoder's logits, which vLLM computes itself")


def prepare(model_config: Any) -> None:
    """Make vLLM carry original positions: M-RoPE with three equal rows, and the mark of a model that sets them itself.

    Raises `LitPruneError` for what `settings_of` refuses, and for rotary embeddings that M-RoPE doesn't reproduce.
    """
    config = model_config.hf_config
    settings = settings_of(config)
    if settings is None or settings.positions != "original":
        return
    text = config.get_text_config()
    rope = dict(text.rope_parameters)
    if "mrope_section" not in rope:
        if rope.get("rope_type", "default") != "default":
            raise LitPruneError(f"rotary embeddings of type {rope['rope_type']} can't carry positions of pruned images")
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        third, rest = divmod(width // 2, 3)
        rope["mrope_section"] = [third + rest, third, third]
        text.rope_parameters = rope
    model_config.multimodal_config.video_pruning_rate = MARK
