"""What the tiny configs of single families need besides: settings on top, by model type."""

from typing import Any

_MIXED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"audio_config": {"codebook_dim": 32}},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 10}},
    "cohere_compass_text": {"rope_parameters": _MIXED},
    "cohere_compass": {"text_config": {"rope_parameters": _MIXED}},
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"hidden_size": 64}},
    "emu3": {"vocabulary_map": {"<image>": 10}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32]}},
    "gemma3n_text": {**_SHARING, "activation_sparsity_pattern": None},
    "gemma3n": {"text_config": {**_SHARING, "activation_sparsity_pattern": None}},
    "gemma4_text": _SHARING,
    "gemma4": {"text_config": _SHARING},
    "gemma4_unified_text": _SHARING,
    "gemma4_unified": {"text_config": _SHARING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"downsample_rate": "1/2"},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}
