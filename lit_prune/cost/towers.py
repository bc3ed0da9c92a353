"""Vision towers with stages inside: sizes read off a configuration, and the trace that a method would leave there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_prune.cost.formulas import TOWERS
from lit_prune.cost.shapes import Config
from lit_prune.cost.sizes import first_side, merged
from lit_prune.cost.trace import TowerTrace
from lit_prune.errors import LitPruneError
from lit_prune.ops.budget import Budget, tokens
from lit_prune.pruners.base import PruningMethod

NOMINAL = 672  # pixels along the sides of an image where images keep their own size [ours]
DEPTH = ("num_hidden_layers", "depth", "num_layers", "layers")


@dataclass(frozen=True)
class TowerSize:
    """A vision tower, as far as stages inside it need to know.

    `features` layers of `layers` lead to what the projector gets; `prefix` tokens (the class token) precede the patches
    of a tile, which become `side` x `side` visual tokens, each out of `merge` x `merge` patches; an image has nominally
    `tiles` tiles: the whole image and four crops where the model cuts it up. Where images keep their own size, `side`
    is that of a usual one.
    """

    layers: int
    features: int
    prefix: int
    side: int
    tiles: int
    merge: int = 1

    def share(self, keep: Budget, visual: int | None = None) -> int:
        """Visual tokens of each tile for a budget, or for what a schedule lets into layer 0; rounded up.

        A share is one of each tile's `visual` tokens, by default those of a nominal tile.
        """
        visual = self.side**2 if visual is None else visual
        keep = tokens(keep, self.tiles * visual)
        arriving = keep[0] if isinstance(keep, dict) else keep
        return min(visual, -(-arriving // self.tiles))

    def read(self, patches: int, values: bool) -> int:
        """Tokens projected once more for a stage that finds so many patches: to keys, values, and queries.

        The class token's query, or that of every patch where there is none.
        """
        return (patches + self.prefix) + patches * values + (1 if self.prefix else patches)


def tower_size(config: Config) -> TowerSize:
    """Sizes of a model's vision tower.

    Raises `LitPruneError` where the configuration doesn't say them.
    """
    vision, chosen = getattr(config, "vision_config", None), getattr(config, "vision_feature_layer", -1)
    layers = next((n for name in DEPTH if isinstance(n := getattr(vision, name, None), int)), None)
    patch = first_side(getattr(vision, "patch_size", None))
    if layers is None or patch is None:
        raise LitPruneError(
            f"the configuration of models of type {config.model_type} doesn't say how their vision tower cuts images "
            f"into patches, so nothing can be pruned inside the tower; use a method of the decoder"
        )
    features = [
        layer if layer >= 0 else layers + 1 + layer for layer in (chosen if isinstance(chosen, Sequence) else [chosen])
    ]
    packed = first_side(getattr(vision, "image_size", None)) is None or hasattr(vision, "spatial_merge_size")
    image = NOMINAL if packed else first_side(vision.image_size)
    merge = merged(config)
    return TowerSize(
        layers=layers,
        features=max(features),
        prefix=TOWERS.get(getattr(vision, "model_type", ""), (0, 2))[0],
        side=max(1, image // (patch * merge)),
        tiles=5 if getattr(config, "image_grid_pinpoints", None) or hasattr(config, "downsample_ratio") else 1,
        merge=merge,
    )


def tower_trace(config: Config, pruner: PruningMethod, keep: Budget, patches: int) -> TowerTrace | None:
    """Trace that an image of `patches` patches would leave in the tower; None if the method has no stages inside.

    Nothing runs.
    """
    method = pruner.tower
    if method is None:
        return None
    size = tower_size(config)
    members = size.merge**2
    full = size.side**2 if not _own_size(config) else max(1, patches // members)
    tiles, leaving = max(1, patches // (full * members)), pruner.leaving(size.share(keep, full), full)
    schedule = method.vision_schedule(leaving, full, size.features)
    now = full if _own_size(config) else method.image_side(leaving, size.side) ** 2
    lengths, scored, rated, stages, merged = [], 0, 0, [], []
    taps = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    entered, one = now, torch.ones(tiles, dtype=torch.long)
    for layer in range(size.features + 1):
        if layer == size.features:  # the layers behind the features run too, before the stage there
            lengths += [torch.full((tiles,), now * members + size.prefix)] * (size.layers - layer)
        if schedule.get(layer, now) < now:
            if layer > 0:
                scored += size.read(now, method.needs_values) if members == 1 else 0
                rated += now * members + size.prefix
            stages.append((one * now, one * schedule[layer]))
            now = schedule[layer]
        merged += [now] * (layer in taps and layer + 1 < size.layers)
        if layer < size.features:
            lengths.append(torch.full((tiles,), now * members + size.prefix))
    rows = (sum(merged) + now * (1 + len(taps) - len(merged))) / (1 + len(taps)) if taps else now
    ends = (entered * members, rows, scored, rated)
    patches_in, projected, scored_all, rated_all = (one * end for end in ends)
    return TowerTrace(patches_in, lengths, projected, scored_all, rated_all, stages, unit=members)


def _own_size(config: Config) -> bool:
    """True where the tower takes images in their own size."""
    return hasattr(config.vision_config, "spatial_merge_size")
