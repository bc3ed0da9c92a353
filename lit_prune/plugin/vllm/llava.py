"""LLaVA-1.5 in vLLM, whose images are encoded and pruned by `Encoder`."""

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from lit_prune.errors import LitPruneError
from lit_prune.plugin.vllm.positions import outline
from lit_prune.plugin.vllm.pruned import PrunedModel, lead
from lit_prune.plugin.vllm.settings import Settings, planned, settings_of


class PrunedInfo(LlavaProcessingInfo):
    """Lengths of images in a prompt."""

    @cached_property
    def settings(self) -> Settings | None:
        """The method and its budget."""
        return settings_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens kept of an image; all if nothing prunes."""
        visual = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return planned(self.settings, visual)


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=PrunedInfo, dummy_inputs=LlavaDummyInputsBuilder)
class LitPruneLlava(PrunedModel, LlavaForConditionalGeneration, SupportsMultiModalPruning, SupportsMRoPE):
    """LLaVA-1.5, pruned before its decoder by the method in `hf_overrides`.

    Raises:
        LitPruneError: a method that can't run here, or Pixtral's vision tower.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.vision_config.model_type == "pixtral":
            raise LitPruneError("LitPruneLlava: images of Pixtral's tower differ in size, which it can't prune")
        del self.vision_tower, self.multi_modal_projector
        self.encode_with(self.config)
        self.total = self.encoder.visual  # of every image
        self.kept = planned(self.settings, self.total)

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """See `embed_pixels`."""
        return self.embed_pixels(self._parse_and_validate_image_input(**kwargs), "pixel_values")

    def indices(self, columns: Tensor, image: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """One for all rows of positions: the token's place in the image."""
        return columns[:, None]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions (3, tokens) of a prompt before it is known which tokens of its images are kept, and their lead."""
        offsets = sorted(feature.mm_position.offset for feature in mm_features)
        positions = self._outline(len(input_tokens), offsets)
        return positions, lead(positions)

    def starts(self, visual: Tensor, positions: Tensor) -> Tensor:
        """Counted again, since all rows of `positions` may be complete: every image has as many tokens."""
        offsets = visual.nonzero()[:: self.kept, 0].tolist()
        return self._outline(len(visual), offsets)[0].to(visual.device)

    def _outline(self, length: int, offsets: list[int]) -> Tensor:
        return outline(length, [(place, self.kept, self.total) for place in offsets])
