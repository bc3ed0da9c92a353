"""Settings of single classes, beyond the names of their fields."""

from typing import Any

_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "embed_dim": 16,
    "latent_channels": 16,
    "resolution": 16,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
_SAM = {"hidden_size": 32, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "image_size": 64}
_SAM |= {"patch_size": 4, "mlp_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


def _words(first: int, codes: int, word: str) -> dict[str, int]:
    """Names of the codes of an image's tokenizer, which are words of the vocabulary."""
    return {word.format(code): first + code for code in range(codes)}


# Fields by their path, on top of the shrunk ones. The last part replaces what is there.
_HALF = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
FIELDS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config.codebook_size": 16,
        "vision_config.codebook_size": 64,
        "vision_config.base_channels": 32,
        "vision_config.channel_multiplier": [1, 2],
        "vision_config.num_res_blocks": 1,
        "vision_config.embed_dim": 16,
        "vision_config.latent_channels": 16,
        "vision_config.spatial_scale_factor": 2,
        "vision_config.resolution": 16,
        "image_token_offset": 100,
        "audio_token_offset": 164,
    },
    "chameleon": {
        "vocabulary_map": {
            "<image>": 250,
            **{f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 100 + i for i in range(64)},
        },
        "vq_config": {**_VQ, "num_embeddings": 64},
    },
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE},
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense"] + ["sparse"] * 7,
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config": {**_SAM, "downsample_channels": [24, 32], "scale": 8},
    },
    "deepseek_vl_hybrid": {
        "high_res_vision_config.output_channels": 32,
    },
    "dots3_note": {"vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 64},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 250,
            "<|extra_200|>": 251,
            **_words(100, 64, "<|visual token {:06}|>"),
        },
        "vq_config.codebook_size": 64,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 2],
        "vq_config.num_res_blocks": 1,
        "vq_config.hidden_size": 64,
        "vq_config.num_attention_heads": 1,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        "text_config.moe_intermediate_size": [32, 32],
    },
    "aria": {"max_value_projector_patch_to_query_dict": 8, "projector_patch_to_query_dict": {16: 8}},
    **{
        kind: {
            "image_token_id": 250,
            "image_token_index": 250,
            "video_token_id": 250,
            "video_token_index": 250,
            "text_config.word_embed_proj_dim": 64,
            "text_config.ffn_dim": 96,
        }
        for kind in ("blip-2", "instructblip", "instructblipvideo")
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "image_token_id": 250,
        "text_config.layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"] * 2,
    },
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE | {"mrope_section": [4, 6, 6]}},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config.vision_use_head": False},
    "shieldgemma2": {"mm_tokens_per_image": 4, "vision_config.vision_use_head": False},
    "gemma4": {"vision_config.pooling_kernel_size": 2, "vision_config.position_embedding_size": 64},
    "gemma4_unified": {
        "vision_config.mm_embed_dim": 32,
        "vision_config.mm_posemb_size": 64,
        "vision_config.output_proj_dims": 32,
        "vision_config.pooling_kernel_size": 2,
    },
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_5_vl"), _HALF),
    "qwen2_5_omni_thinker": {**_HALF, "vision_start_token_id": 240},
    "glm4v_moe": {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "qwen2_vl": {**_HALF, "vision_config.hidden_size": 64},
    "fuyu": {"patch_size": 8},
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.qk_nope_head_dim": 32, "text_config.head_dim": 0},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 2, 2],
        "vision_config.hidden_size": 64,
        "qformer_config.hidden_size": 64,
        "qformer_config.num_attention_heads": 2,
        "qformer_config.encoder_hidden_size": 64,
    },
    "hunyuan_vl": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
    },
    "hy_v4_vl": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    },
    "inkling_mm_model": {"vision_config.patch_size": 8, "vision_config.n_layers": 3},
    "inkling2": {"vision_config.projection_hidden_dim": 64, "vision_config.posemb_grid_size": 8},
    **{kind: {"image_token_id": 250, "video_token_id": 249} for kind in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    **{kind: {"vision_config.image_size": 128} for kind in ("got_ocr2", "pp_chart2table")},
    "granite_docling": {"vision_config.image_size": 128},
    "inkling2_loop": {
        "text_config.loop_layer_index_start": 2,
        "text_config.loop_layer_index_end": 6,
        "text_config.n_layers_per_attn_res_block": 2,
        "vision_config.projection_hidden_dim": 64,
        "vision_config.posemb_grid_size": 8,
    },
    "janus": {"vq_config": {**_VQ, "num_embeddings": 64, "num_patches": 4, "projection_dim": 64}},
    "llama4": {
        "vision_config.intermediate_size": 128,
        "vision_config.projector_input_dim": 32,
        "vision_config.projector_output_dim": 32,
        "vision_config.vision_output_dim": 32,
    },
    **{kind: {"vision_config.image_size": 64} for kind in ("mistral3", "lighton_ocr", "mistral_large4")},
    "minimax_m3_vl": {"text_config.shared_intermediate_size": 32},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"] * 4},
    "molmo2": {
        "adapter_config.vision_feature_layer": [-1, -2],
        "adapter_config.text_hidden_size": 64,
        "vision_config.num_position_embeddings": 16,
    },
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 64},
    "muse_spark": {
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": [8, 8, 16, 16],
        "audio_config.out_hidden_size": 64,
        "out_hidden_size": 128,
        "projector_hidden_size": 64,
    },
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 32,
        "text_config.indexer_budget": 512,
        "text_config.indexer_compress_ratio": 4,
        "text_config.hc_lowrank": 8,
    },
    "kimi_k25": {"projection_hidden_size": 32},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 240},
    "step3p7": {"text_config.sliding_window": 24, "vision_config.image_size": 128},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "video_llama_3": {},
    "unlimited_ocr": {"vision_config.sam_config": {**_SAM, "downsample_channels": [24, 32]}},
}
