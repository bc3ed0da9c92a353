"""Tiny random models of the supported families, of their real classes, and prompts as their processors make them.

Every sample has another number of visual tokens. All share one vocabulary, 8 decoder layers of width 64, and the ways
of `tiny` to attach, run and compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tiny import DEPTH, IMAGE, PAD, VIDEO, VOCABULARY, WIDTH
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.sparsevlm import SparseVLM
from lit_prune.pruners.text_attention import TextAttention
from lit_prune.repair import RepairAdapter

PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}

Size = tuple[int, ...]  # an image as its family measures it: pixels, tiles, or a grid of patches


@dataclass(frozen=True)
class Picture:
    """An image or video of a prompt; its pixels are drawn from its own seed."""

    size: Size
    seed: int
    modality: str = "image"


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family, and what its processor makes of images.

    `sizes`: three images of different numbers of tokens where the family has them. `visual`: visual tokens of one.
    `inputs`: model inputs of all images of a batch. `frames_apart`: prompts name each frame of a video.
    """

    config: Callable[..., PreTrainedConfig]
    model: type[nn.Module]
    sizes: Sequence[Size]
    visual: Callable[[Size], int]
    inputs: Callable[[Sequence[Picture]], dict[str, Tensor]]
    video: Size | None = None
    video_visual: Callable[[Size], int] | None = None
    frames_apart: bool = False
    options: dict = field(default_factory=dict)

    def build(self, seed: int = 0, **options) -> nn.Module:
        """The model in fp32 and evaluation mode, frozen."""
        torch.manual_seed(seed)
        config = self.config(**{**self.options, **options})
        config._attn_implementation = "sdpa"
        model = self.model(config).eval().requires_grad_(False)
        model.generation_config.eos_token_id = None
        return model

    def length(self, picture: Picture) -> int:
        """Visual tokens of an image or video."""
        count = self.visual if picture.modality == "image" else self.video_visual
        return count(picture.size)


# -- families -------------------------------------------------------------------------------------------------------
def _clip(side: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION, **LAYERS, image_size=side, patch_size=4)


def _llava(**options) -> LlavaConfig:
    text = LlamaConfig(**{**TEXT, **options})
    grid = {"image_token_id": IMAGE, "image_seq_length": 36, "vision_feature_layer": -1}
    return LlavaConfig(vision_config=_clip(24), text_config=text, **grid)


def _next(text: type[PreTrainedConfig] = LlamaConfig, **options) -> LlavaNextConfig:
    grid = {"image_token_id": IMAGE, "image_seq_length": 16, "image_grid_pinpoints": PINPOINTS}
    return LlavaNextConfig(
        vision_config=_clip(16), text_config=text(**{**TEXT, **options}), vision_feature_layer=-1, **grid
    )


def _onevision(**options) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(**VISION, **LAYERS, image_size=16, patch_size=4, vision_use_head=False)
    text = Qwen2Config(**{**TEXT, **options})
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, **IDS)


def _internvl(**options) -> InternVLConfig:
    vision = InternVLVisionConfig(**VISION, **LAYERS, image_size=[32, 32], patch_size=[4, 4])
    text = Qwen2Config(**{**TEXT, **options})
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)


def _qwen25(**options) -> Qwen2_5_VLConfig:
    vision = {**VISION, "depth": 2, "num_heads": 2, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, "rope_parameters": rope, **options}
    return Qwen2_5_VLConfig(vision_config={**vision, "out_hidden_size": WIDTH}, text_config=text, **IDS)


def _qwen3(**options) -> Qwen3VLConfig:
    vision = {**VISION, "depth": 3, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 64}
    vision |= {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope, **options}
    return Qwen3VLConfig(vision_config=vision, text_config=text, **IDS)


# -- what processors make of images ---------------------------------------------------------------------------------
def _draw(picture: Picture, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(picture.seed))


def _plain(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([_draw(picture, 3, *picture.size) for picture in pictures])}


def _crops(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Crops of the best canvas behind the whole image, padded to the same number; frames of videos."""
    found = {}
    images = [picture for picture in pictures if picture.modality == "image"]
    if images:
        canvases = [{(16, 32): 2, (32, 32): 4, (24, 32): 4}[picture.size] for picture in images]
        pixels = torch.zeros(len(images), max(canvases) + 1, 3, 16, 16)
        for row, (picture, count) in enumerate(zip(images, canvases, strict=True)):
            pixels[row, : count + 1] = _draw(picture, count + 1, 3, 16, 16)
        found |= {"pixel_values": pixels, "image_sizes": torch.tensor([picture.size for picture in images])}
    videos = [_draw(picture, picture.size[0], 3, 16, 16) for picture in pictures if picture.modality == "video"]
    return {**found, "pixel_values_videos": torch.stack(videos)} if videos else found


def _tiles(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([_draw(picture, picture.size[0], 3, 32, 32) for picture in pictures])}


def _grids(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Patches of all images in one row, and each image's grid (time, height, width) in patches."""
    found = {}
    for modality, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        mine = [picture for picture in pictures if picture.modality == modality]
        if mine:
            patches = [_draw(picture, torch.Size(picture.size).numel(), 3 * 2 * 4 * 4) for picture in mine]
            found[values] = torch.cat(patches)
            found[f"{modality}_grid_thw"] = torch.tensor([picture.size for picture in mine])
    return found


def _crop_tokens(size: Size) -> int:
    """Whole image (16), then the unpadded crops row by row, each row with a line break."""
    return {(16, 32): 16 + 4 * (8 + 1), (32, 32): 16 + 8 * (8 + 1), (24, 32): 16 + 6 * (8 + 1)}[size]


def _grid_tokens(size: Size) -> int:
    return size[0] * size[1] * size[2] // 4


CROPPED = {"sizes": [(16, 32), (32, 32), (24, 32)], "visual": _crop_tokens, "inputs": _crops}
GRID = {"sizes": [(1, 12, 12), (1, 16, 20), (1, 14, 16)], "visual": _grid_tokens, "inputs": _grids}
FAMILIES = {
    "llava-1.5": Family(_llava, LlavaForConditionalGeneration, [(24, 24)] * 3, lambda size: 36, _plain),
    "llava-next-vicuna": Family(_next, LlavaNextForConditionalGeneration, **CROPPED),
    "llava-next-mistral": Family(
        _next,
        LlavaNextForConditionalGeneration,
        **CROPPED,
        options={"text": MistralConfig, "sliding_window": None},
    ),
    "llava-onevision": Family(
        _onevision,
        LlavaOnevisionForConditionalGeneration,
        **CROPPED,
        video=(12,),
        video_visual=lambda size: size[0] * 4 + 1,
    ),
    "qwen2.5-vl": Family(
        _qwen25, Qwen2_5_VLForConditionalGeneration, **GRID, video=(3, 8, 8), video_visual=_grid_tokens
    ),
    "qwen3-vl": Family(
        _qwen3,
        Qwen3VLForConditionalGeneration,
        **GRID,
        video=(3, 8, 8),
        video_visual=_grid_tokens,
        frames_apart=True,
    ),
    "internvl": Family(
        _internvl, InternVLForConditionalGeneration, [(2,), (5,), (3,)], lambda size: size[0] * 16, _tiles
    ),
}


# -- prompts --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    """Token ids with the images' placeholders in place, and the images."""

    ids: Tensor
    pictures: tuple[Picture, ...]


def prompt(family: Family, pictures: Sequence[Picture], words: int, seed: int, between: int = 1) -> Prompt:
    """Two words, the images with `between` words behind each, and a question of `words` words."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randint(2, 50, (2,), generator=draw)]
    for picture in pictures:
        token = IMAGE if picture.modality == "image" else VIDEO
        runs = picture.size[0] if picture.modality == "video" and family.frames_apart else 1
        for _ in range(runs):
            words_between = torch.randint(2, 50, (between,), generator=draw)
            parts += [torch.full((family.length(picture) // runs,), token), words_between]
    return Prompt(torch.cat([*parts, torch.randint(2, 50, (words,), generator=draw)]), tuple(pictures))


def prompts(family: Family) -> list[Prompt]:
    """Three prompts of different numbers of visual tokens; where all images are alike, by their number."""
    alike = len(set(family.sizes)) == 1
    pictures = [[Picture(size, seed)] for seed, size in enumerate(family.sizes)]
    if alike:
        pictures[1].append(Picture(family.sizes[1], 7))
    return [prompt(family, mine, 5 + 2 * row, 100 + row) for row, mine in enumerate(pictures)]


def collate(family: Family, samples: Sequence[Prompt], side: str = "left", answers: int = 0) -> dict[str, Tensor]:
    """Model inputs, padded on one side; the last `answers` tokens of each sample are labelled."""
    length = max(len(sample.ids) for sample in samples)
    ids, mask = (torch.full((len(samples), length), PAD) for _ in range(2))
    labels = torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        start = length - count if side == "left" else 0
        ids[row, start : start + count] = sample.ids
        mask[row, start : start + count] = 1
        labels[row, start + count - answers : start + count] = sample.ids[count - answers :]
    pictures = [picture for sample in samples for picture in sample.pictures]
    inputs = {"input_ids": ids, "attention_mask": mask, **(family.inputs(pictures) if pictures else {})}
    if family.inputs is _grids:
        inputs["mm_token_type_ids"] = modalities(ids)
    return {**inputs, "labels": labels} if answers else inputs


def modalities(ids: Tensor) -> Tensor:
    """What Qwen's processors say about every token: 0 text, 1 image, 2 video."""
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


# -- methods --------------------------------------------------------------------------------------------------------

KEEP = 26
METHODS = {
    "rcp": (
        lambda: RCP(layers=[2, 4, 6], stage_ratios=[4.0, 2.0, 1.0], select="topk", inner=16),
        lambda: RepairAdapter([6, 7], [1, 2], bottleneck=16, condition=8, code=4),
    ),
    "fastv": (lambda: FastV([2]), lambda: RepairAdapter([6], [0], bottleneck=16, condition=8, code=4)),
    "text attention": (
        lambda: TextAttention([2, 5]),
        lambda: RepairAdapter([6], [1], bottleneck=16, condition=8, code=4),
    ),
    "sparsevlm": (  # merges, reads rows one by one, decides image by image
        lambda: SparseVLM([2, 5], [2.0, 1.0], per_cluster=2),
        lambda: RepairAdapter([6], [1], bottleneck=16, condition=8, code=4),
    ),
}
