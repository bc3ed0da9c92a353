"""Images to the tokens that a method keeps: transformers' vision tower, with this project's stages inside."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host import Session
from lit_prune.host.compat import ENCODED
from lit_prune.host.encoding import encode_images
from lit_prune.host.parts import find
from lit_prune.host.towers.find import tower
from lit_prune.host.vision import TowerHost
from lit_prune.loading import random_model
from lit_prune.ops import selection
from lit_prune.plugin.vllm.settings import Settings
from lit_prune.pruners.base import Context, Dims

# What a decoder without vision has of a model: one layer, as thin as can be, which is dropped again.
THIN = {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8, "pad_token_id": None}
INNER = "vision_model."  # a prefix that some versions of transformers write into a tower's names, and others don't
UNREAD = "reads the question or the decoder's states, which vLLM doesn't have where it encodes images"


class Unread(Tensor):
    """Stands for what isn't known where images are encoded: the question, and the decoder's states."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__":  # shape, dtype, device
            return super().__torch_function__(func, types, args, kwargs or {})
        raise LitPruneError(UNREAD)


class Encoder(nn.Module):
    """Vision tower and projector of a transformers model, whose output a method prunes.

    Args:
        config: of the whole model.
        settings: the method and its budget. None: all tokens stay.

    Raises:
        LitPruneError: the method does what this tower doesn't allow, or reads the question.
    """

    def __init__(self, config: Any, settings: Settings | None) -> None:
        super().__init__()
        self.settings, self.width = settings, config.get_text_config().hidden_size
        self.model = random_model(_thin(config), torch.get_default_dtype(), torch.empty(0).device).eval()
        parts = find(self.model)
        self.visual = parts.dims.visual
        if settings is not None:
            settings.pruner.build(Dims(self.width, settings.depth, parts.dims.visual, parts.dims.varies))
            if settings.pruner.tower is not None:
                session = Session()
                found = tower(self.model, parts.decoder)
                self.hooks = list(TowerHost(found, settings.pruner, settings.keep, lambda: session).hook())
            self._check(parts.dims.visual)
        self.model.model.language_model = self.model.lm_head = None
        self.names = dict(self.model.named_parameters())

    def _check(self, visual: int) -> None:
        """Raise `LitPruneError` where the stage before the decoder reads what isn't there."""
        stage, name = self.settings.stage, type(self.settings.pruner).__name__
        if stage.reads(0) is not None or stage.needs_keys:
            raise LitPruneError(f"{name} {UNREAD}")
        features = torch.randn(1, visual, self.width)
        try:
            stage.prune(self._context(features, features.new_ones(1, visual, dtype=torch.bool)))
        except LitPruneError as error:
            raise LitPruneError(f"{name} {error}") from error

    @torch.inference_mode()
    def forward(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Embeddings (kept, width) of each image and the indices (kept,) of its tokens.

        Raises `LitPruneError` if the method keeps another number of tokens than planned.
        """
        encoded = encode_images(self.model, dict(inputs))[ENCODED]["image"].pooler_output
        if self.settings is None:
            return [(features, torch.arange(len(features), device=features.device)) for features in encoded]
        alike = len({len(features) for features in encoded}) == 1
        groups = [torch.stack(list(encoded))] if alike else [features[None] for features in encoded]
        return [pair for features in groups for pair in self._kept(features)]

    def _kept(self, features: Float[Tensor, "images visual width"]) -> list[tuple[Tensor, Tensor]]:
        """The pruned tokens of images of one size."""
        alive = torch.ones_like(features[..., 0], dtype=torch.bool)
        if self.settings.pruner.tower is not None:
            alive = (features != 0).any(-1)
        kept = self.settings.stage.prune(self._context(features, alive))
        states = features if kept.states is None else torch.where(kept.mask[..., None], kept.states, features)
        planned = self.settings.planned(features.shape[1])
        if (counts := kept.mask.sum(1).tolist()) != [planned] * len(counts):
            raise LitPruneError(
                f"{type(self.settings.pruner).__name__} kept {', '.join(map(str, counts))} tokens of images for "
                f"which {planned} were planned: use a method that keeps a fixed number"
            )
        columns, _ = selection.compact(kept.mask, planned)
        return list(zip(selection.gather_rows(states.to(features.dtype), columns), columns, strict=True))

    def _context(self, features: Float[Tensor, "images visual width"], alive: Tensor) -> Context:
        """Context of the stage before the decoder; whatever else it reads raises an error."""
        images, visual, width = features.shape
        place = torch.arange(visual, device=features.device).expand(images, -1)
        none = torch.empty(images, 0, width, device=features.device).as_subclass(Unread)
        count = torch.full((images,), self.settings.planned(visual), device=features.device)
        return Context(
            stage=0,
            visual=features.new_empty(features.shape).as_subclass(Unread),
            alive=alive,
            ordinal=place,
            text=none,
            text_mask=torch.empty(images, 0, dtype=torch.bool, device=features.device).as_subclass(Unread),
            visual_embeds=features,
            text_embeds=none,
            attention=None,
            count=count,
            total=torch.full_like(count, visual),
            seed=count.as_subclass(Unread),
            states=features,
        )

    def load(self, weights: Iterable[tuple[str, Tensor]], loaded: set[str]) -> Iterable[tuple[str, Tensor]]:
        """Take a checkpoint's weights of tower and projector, add their names to `loaded`, and yield the others."""
        for name, weight in weights:
            if (own := self._own(name)) is None:
                yield name, weight
            else:
                self.names[own].data.copy_(weight)
                loaded.add(own)

    def _own(self, name: str) -> str | None:
        """The parameter of this tower or projector that a checkpoint's name means, whatever version wrote it."""
        plain = name.replace(INNER, "")
        return next((known for known in (name, f"model.{name}", plain, f"model.{plain}") if known in self.names), None)


def _thin(config: Any) -> Any:
    """A copy of a configuration whose decoder is next to nothing."""
    thin = copy.deepcopy(config)
    text = thin.get_text_config()
    for field, value in THIN.items():
        setattr(text, field, value)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return thin
