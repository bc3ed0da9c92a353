"""A tiny Qwen2.5-VL as a folder, of random weights, with its own processor: what vLLM and `load` read."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lit_prune.micro.world import WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = """{%- for message in messages %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{ ' ' + part['text'] }}{%- endif %}{%- endfor %}{%- endfor %}"""


def write(folder: Path, seed: int = 0) -> Path:
    """Write model and processor; images of 28 x 28 pixels a token."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 2048,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "patch_size": 14, "window_size": 56,
        "fullatt_block_indexes": [1], "out_hidden_size": 128, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "initializer_range": 0.2,
    }  # fmt: skip
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    marks = {name: SPECIAL.index("<|vision_start|>") + i for i, name in enumerate(names)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**limits), tokenizer, Qwen2VLVideoProcessor(**limits), chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder
