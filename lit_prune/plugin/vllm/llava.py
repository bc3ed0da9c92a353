"""LLaVA-1.5 in vLLM, whose images are encoded and pruned by `Encoder`."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from lit_prune.errors import LitPruneError
from lit_prune.plugin.vllm.encoder import Encoder
from lit_prune.plugin.vllm.positions import outline, placed, with_indices, without_indices
from lit_prune.plugin.vllm.settings import Settings, settings_of


class PrunedInfo(LlavaProcessingInfo):
    """Lengths of images in a prompt."""

    @cached_property
    def settings(self) -> Settings | None:
        """The method and its budget."""
        return settings_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens kept of an image; all if nothing prunes."""
        visual = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return visual if self.settings is None else self.settings.planned(visual)


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=PrunedInfo, dummy_inputs=LlavaDummyInputsBuilder)
class LitPruneLlava(LlavaForConditionalGeneration, SupportsMultiModalPruning, SupportsMRoPE):
    """LLaVA-1.5, pruned before its decoder by the method in `hf_overrides`.

    Raises:
        LitPruneError: a method that can't run here, or a vision tower of another kind than CLIP's or SigLIP's.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.vision_config.model_type == "pixtral":
            raise LitPruneError("LitPruneLlava: images of Pixtral's tower differ in size, which it can't prune")
        del self.vision_tower, self.multi_modal_projector
        self.settings = settings_of(self.config)
        self.encoder = Encoder(self.config, self.settings)
        self.visual = self.encoder.visual
        self.kept = self.visual if self.settings is None else self.settings.planned(self.visual)

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """The kept tokens of each image; where some are pruned, their indices are in two more channels."""
        image_input = self._parse_and_validate_image_input(**kwargs)
        if image_input is None:
            return []
        if image_input["type"] != "pixel_values":
            raise LitPruneError("LitPruneLlava prunes images, not embeddings that come without their positions")
        found = self.encoder({"pixel_values": image_input["pixel_values"]})
        if self.settings is None:
            return [embeds for embeds, _ in found]
        return [with_indices(embeds, indices[:, None]) for embeds, indices in found]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions (3, tokens) of a prompt before it is known which tokens of its images are kept, and their lead."""
        places = sorted(feature.mm_position.offset for feature in mm_features)
        positions = outline(len(input_tokens), [(place, self.kept, self.visual) for place in places])
        return positions, len(places) * (self.visual - self.kept)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings without their indices, and the positions (3, tokens) of a prompt that these complete."""
        visual = torch.as_tensor(input_ids, device=mrope_positions.device) == self.config.image_token_index
        parts = [without_indices(carried, 1) for carried in multimodal_embeddings]
        places = visual.nonzero()[:: self.kept, 0].tolist()
        starts = outline(len(visual), [(place, self.kept, self.visual) for place in places])[0]
        indices = [found.to(mrope_positions.device) for _, found in parts]
        positions = placed(mrope_positions, visual, starts.to(visual.device), num_computed_tokens, indices)
        return [embeds for embeds, _ in parts], positions, len(places) * (self.visual - self.kept)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the decoder as vLLM loads them, those of tower and projector as `Encoder` does."""
        own: set[str] = set()
        rest = AutoWeightsLoader(self).load_weights(self.encoder.load(weights, own), mapper=self.hf_to_vllm_mapper)
        return rest | {f"encoder.model.{name}" for name in own}
