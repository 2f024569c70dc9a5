"""What the tiny configs of single families need besides: settings on top, by model type."""

from typing import Any

Settings = dict[str, Any]

_ROPE: Settings = {"rope_type": "default", "rope_theta": 1e4}
_BY_LAYER_TYPE: Settings = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
# Layers that read the cache of others, which are of the same kind.
_SHARED: Settings = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_SPARSE: Settings = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}


def _axes(*sections: int, **more: Any) -> Settings:
    """Rotary positions of several axes, of which each has so many frequencies."""
    return {"rope_parameters": {**_ROPE, "mrope_section": list(sections), **more}}


# A quarter of each head is rotated.
_QWEN3_5: Settings = {"head_dim": 32, **_axes(2, 1, 1, partial_rotary_factor=0.25)}
_INDEXER: Settings = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_GEMMA4_VISION: Settings = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 64,
}

_MINICPM: Settings = {
    "image_token_id": 10,
    "video_token_id": 11,
    "insert_layer_id": 0,
    "vision_config": {"insert_layer_id": 0},
}
# Sizes of images that are cut into two or four parts.
PINPOINTS = [[56, 112], [112, 56], [112, 112]]

# Families of which no tiny decoder is tried, and why.
NOT_COUNTED = {
    "blip": "generates from an image alone",
    "blip-2": "generates from images only, through the text model that it wraps",
    "diffusion_gemma": "fills blocks of text by diffusion",
    "fast_vlm": "its image tower is one of timm's, which the tests do not have",
    "gemma3n": "its image tower is one of timm's, which the tests do not have; `gemma3n_text` is tried",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "idefics": "every prompt needs an image, to which its layers attend apart from the text",
    "instructblip": "generates from images only, through the text model that it wraps",
    "instructblipvideo": "generates from videos only, through the text model that it wraps",
    "perception_lm": "its image tower is one of timm's, which the tests do not have",
    "pi0": "makes actions of a robot, not text",
    "trocr": "the decoder of an encoder-decoder",
}

EXCEPTIONS: dict[str, Settings] = {
    "apertus1p5": {
        "text_config": {"vocab_size": 512},
        "vision_config": {"codebook_size": 64, "embed_dim": 32, "latent_channels": 32, "base_channels": 32},
        "audio_config": {"codebook_dim": 32, "codebook_size": 64},
        "image_token_offset": 320,
        "audio_token_offset": 384,
    },
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"patcher_config": {"num_hidden_layers": 1}},
    "chameleon": {"vocabulary_map": {"<image>": 10}, "vq_config": {"base_channels": 32}},
    "cohere_compass": {"text_config": _BY_LAYER_TYPE},
    "cohere_compass_text": _BY_LAYER_TYPE,
    "cosmos3_edge": {"text_config": _axes(4, 2, 2)},
    "cosmos3_omni": {"text_config": _axes(4, 2, 2)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 64}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, **_SPARSE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "vision_config": _GEMMA4_VISION,
    },
    "dots1": {"num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"mlp_layer_types": ["dense", "dense"]}},
    "emu3": {"vocabulary_map": {"<image>": 10}, "vq_config": {"base_channels": 32, "codebook_size": 64}},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [32, 32], "head_dim": 16, **_axes(3, 3, 2), **_SPARSE}
    },
    "evolla": {"use_cache": True},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n": {"text_config": {**_SHARED, "activation_sparsity_pattern": None}},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": None},
    "gemma4": {"text_config": {**_SHARED, "global_head_dim": 32}, "vision_config": _GEMMA4_VISION},
    "gemma4_text": {**_SHARED, "global_head_dim": 32},
    "gemma4_unified": {
        "text_config": {**_SHARED, "global_head_dim": 32},
        "vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64},
    },
    "gemma4_unified_text": {**_SHARED, "global_head_dim": 32},
    "glm46v": {"text_config": _axes(2, 3, 3)},
    "glm4v": {"text_config": _axes(2, 3, 3)},
    "glm4v_moe": {"text_config": _axes(1, 1, 2, partial_rotary_factor=0.5)},
    "glm_ocr": {"text_config": _axes(2, 3, 3)},
    "glmga": {"text_config": _axes(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "vision_config": {"hidden_size": 128},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    # Each stack of layers runs several times, with a cache layer for each time.
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "hunyuan_vl": {"text_config": _axes(2, 2, 2, 2)},
    "hy_v4_vl": {"text_config": _axes(2, 1, 1)},
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 4}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "llava_next": {"image_grid_pinpoints": PINPOINTS},
    "llava_onevision": {"image_grid_pinpoints": PINPOINTS},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    # As in its checkpoints since 0.2: with a window in all layers there is nothing to compress.
    "mistral": {"sliding_window": None},
    "mistral3": {"text_config": {"sliding_window": None}},
    "idefics2": {"text_config": {"sliding_window": None}},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "minicpm_ocr": {"text_config": _QWEN3_5, **_MINICPM},
    "minicpmv4_6": {"text_config": _QWEN3_5, **_MINICPM},
    "minicpmv4_7": {
        "text_config": _QWEN3_5,
        **_MINICPM,
        "image_start_id": 12,
        "image_end_id": 13,
        "slice_start_id": 14,
        "slice_end_id": 15,
        "newline_id": 16,
    },
    "molmo2": {
        "adapter_config": {
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _axes(2, 3, 3)},
    "paligemma": {"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    "qwen2_5_omni_thinker": {"text_config": _axes(2, 3, 3), "vision_start_token_id": 50},
    "qwen2_5_vl": {"text_config": _axes(2, 3, 3)},
    # Its code cuts images into squares of this size.
    "phi4_multimodal": {"vision_config": {"image_size": 448}},
    "qwen2_vl": {"text_config": _axes(2, 3, 3), "vision_config": {"hidden_size": 64}},
    "qwen3_5": {"text_config": _QWEN3_5},
    "qwen3_5_moe": {"text_config": _QWEN3_5},
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_next": {"head_dim": 32},
    "qwen3_omni_moe_thinker": {"text_config": _axes(4, 2, 2), "vision_start_token_id": 50},
    "qwen3_vl": {"text_config": _axes(4, 2, 2)},
    "qwen3_vl_moe": {"text_config": _axes(4, 2, 2)},
    "qwen4_exp": {"text_config": {**_INDEXER, **_axes(4, 2, 2)}},
    "qwen4_exp_text": {**_INDEXER, **_axes(4, 2, 2)},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "step3p7": {
        "text_config": {
            "sliding_window": 512,
            "num_sliding_attention_heads": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **_BY_LAYER_TYPE,
            **_SPARSE,
        }
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
