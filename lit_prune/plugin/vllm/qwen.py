"""Qwen2.5-VL in vLLM, whose images are encoded and pruned by `Encoder`; videos are not taken."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.processing import PromptUpdate

from lit_prune.errors import LitPruneError
from lit_prune.plugin.vllm.positions import outline
from lit_prune.plugin.vllm.pruned import PrunedModel, lead
from lit_prune.plugin.vllm.settings import Settings, planned, settings_of


class PrunedInfo(Qwen2_5_VLProcessingInfo):
    """Lengths of images in a prompt."""

    @cached_property
    def settings(self) -> Settings | None:
        """The method and its budget."""
        return settings_of(self.get_hf_config())

    def planned(self, visual: int) -> int:
        """Tokens kept of an image; all if nothing prunes."""
        return planned(self.settings, visual)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images, any number of them."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Kept tokens of the largest image."""
        return {"image": self.planned(self.get_max_image_tokens())}


class PrunedProcessor(Qwen2_5_VLMultiModalProcessor):
    """Prompts with as many placeholders as tokens are kept."""

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(*args, **kwargs)
        return [self._shortened(update) for update in updates if update.modality == "image"]

    def _shortened(self, update: Any) -> PromptUpdate:
        whole = update.replacement

        def kept(image: int) -> list[int]:
            found = whole(image)
            return found[: self.info.planned(len(found))]

        return replace(update, replacement=kept)


@MULTIMODAL_REGISTRY.register_processor(PrunedProcessor, info=PrunedInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class LitPruneQwen2_5_VL(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, pruned before its decoder by the method in `hf_overrides`.

    Raises:
        LitPruneError: a method that can't run here.
    """

    supports_mm_device_do_normalize = False  # transformers' tower takes pixels as its image processor makes them

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.merge = self.config.vision_config.spatial_merge_size
        del self.visual
        self.encode_with(self.config)
        if self.settings is not None and self.settings.positions != "original":
            raise LitPruneError("Qwen2.5-VL's tokens have a row and a column: give lit_prune.positions original")

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """See `embed_pixels`."""
        image_input = self._parse_and_validate_image_input(**kwargs)
        return self.embed_pixels(image_input, "pixel_values", "image_grid_thw")

    def indices(self, columns: Tensor, image: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Time, which is 0, row and column in the image."""
        width = int(inputs["image_grid_thw"][image, 2]) // self.merge
        return torch.stack([torch.zeros_like(columns), columns // width, columns % width], 1)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions (3, tokens) of a prompt before it is known which tokens of its images are kept, and their lead."""
        if self.settings is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        images = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            side = int(feature.data["image_grid_thw"].data[1:].max()) // self.merge
            images.append((feature.mm_position.offset, feature.mm_position.length, side))
        positions = outline(len(input_tokens), images)
        return positions, lead(positions)

    def starts(self, visual: Tensor, positions: Tensor) -> Tensor:
        """The row of time, which does not change within an image."""
        return positions[0]
