"""The part of a model in vLLM that all pruned ones share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import AutoWeightsLoader

from lit_prune.errors import LitPruneError
from lit_prune.plugin.vllm.encoder import Encoder
from lit_prune.plugin.vllm.positions import placed, with_indices, without_indices
from lit_prune.plugin.vllm.settings import settings_of


class PrunedModel:
    """Goes before a model of vLLM in the bases of a class, which deletes its own vision tower in the constructor.

    Such a class says where images begin (`starts`), and which index of a kept token goes to which row of positions
    (`indices`).
    """

    def encode_with(self, config: Any) -> None:
        """Encode images by transformers' tower, pruned as the configuration says."""
        self.settings = settings_of(config)
        self.encoder = Encoder(config, self.settings)

    def indices(self, columns: Tensor, image: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Distances (kept, rows) of an image's kept tokens from its start, from their places (kept,) in it."""
        raise NotImplementedError

    def starts(self, visual: Tensor, positions: Tensor) -> Tensor:
        """The position (tokens,) of its image's start for each token that `visual` marks."""
        raise NotImplementedError

    def embed_pixels(self, image_input: Mapping[str, Any] | None, *names: str) -> list[Tensor]:
        """The kept tokens of each image; where some are pruned, their indices are in further channels.

        `names`: the encoder's inputs among those of the model. Raises `LitPruneError` for embeddings without pixels.
        """
        if image_input is None:
            return []
        if image_input["type"] != "pixel_values":
            raise LitPruneError(f"{type(self).__name__} prunes images, and embeddings don't tell their tokens' places")
        inputs = {name: image_input[name] for name in names}
        found = self.encoder(inputs)
        if self.settings is None or self.settings.positions != "original":
            return [embeds for embeds, _ in found]
        return [with_indices(embeds, self.indices(kept, i, inputs)) for i, (embeds, kept) in enumerate(found)]

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings without their indices, and the positions (3, tokens) of a prompt that these complete."""
        width = self.config.get_text_config().hidden_size
        parts = [without_indices(carried, (carried.shape[1] - width) // 2) for carried in multimodal_embeddings]
        visual = torch.as_tensor(input_ids, device=mrope_positions.device) == self.config.image_token_id
        indices = [found.to(mrope_positions.device) for _, found in parts]
        starts = self.starts(visual, mrope_positions)
        positions = placed(mrope_positions, visual, starts, num_computed_tokens, indices)
        return [embeds for embeds, _ in parts], positions, lead(positions)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the decoder as vLLM loads them, those of tower and projector as `Encoder` does."""
        own: set[str] = set()
        rest = AutoWeightsLoader(self).load_weights(self.encoder.load(weights, own), mapper=self.hf_to_vllm_mapper)
        return rest | {f"encoder.model.{name}" for name in own}


def lead(positions: Tensor) -> int:
    """Offset of the answer's positions (3, tokens) from its places; the prompt ends in text."""
    return int(positions[0, -1]) + 1 - positions.shape[1]
