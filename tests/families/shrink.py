"""Makes any config of transformers tiny: the settings of a model that is built in a moment and has every part."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

LAYERS = 4
VOCABULARY = 320
# Patches along each side of an image, where a tower takes images of one size.
PATCHES = 4
# Ids of tokens with a meaning, in the order in which they are met; those of a prompt's text come after them.
FIRST_SPECIAL_TOKEN, FIRST_TEXT_TOKEN = 3, 64

# What a size becomes in a text decoder, in a tower beside it, and the names that configs have for it.
_SIZES = (
    (
        (64, 32),
        "hidden_size d_model n_embd dim dim_model dim_model_base embed_dim embedding_dim emb_dim lru_width "
        "embedding_size attention_hidden_size input_embedding_size output_embedding_size hidden_size_global "
        "backbone_hidden_size",
    ),
    (
        (LAYERS, 2),
        "num_hidden_layers n_layer n_layers num_layers layers depth decoder_layers encoder_layers num_blocks "
        "num_encoder_layers num_decoder_layers decoder_num_layers resampler_depth num_transformer_layers",
    ),
    (
        (4, 2),
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads resampler_heads "
        "num_sliding_attention_heads linear_num_value_heads linear_num_heads resampler_n_heads",
    ),
    (
        (2, 2),
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_kv_shared_layers "
        "num_experts_per_tok moe_topk moe_k hc_mult hc_count mamba_n_groups n_groups o_groups num_layers_per_stack",
    ),
    ((1, 1), "n_group topk_group first_k_dense_replace moe_layer_start_index num_dense_layers num_global_layers"),
    (
        (16, 16),
        "head_dim global_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim v_head_dim "
        "qk_nope_head_dim swa_head_dim dim_head kv_channels d_kv d_head resampler_head_dim resampler_dim_head "
        "attention_head_size hidden_size_per_layer_input laurel_rank loop_gate_rank o_lora_rank adapter_rank "
        "mamba_d_head mamba_head_dim ssm_state_size mamba_d_state state_size query_pre_attn_scalar",
    ),
    ((8, 8), "qk_rope_head_dim rotary_dim d_rel mamba_n_heads mamba_num_heads"),
    ((24, 24), "qk_head_dim"),
    ((4, 4), "index_n_heads num_query_tokens resampler_n_latents resampler_num_latents latent_query_num"),
    ((32, 32), "q_lora_rank kv_lora_rank mamba_dt_rank time_step_rank hc_lowrank gated_norm_rank"),
    (
        (96, 48),
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff ffn_hidden_size n_inner mlp_dim "
        "intermediate_size_mlp dense_intermediate_size feed_forward_size decoder_intermediate_size "
        "projection_intermediate_size alignment_intermediate_size",
    ),
    (
        (32, 16),
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size shared_intermediate_size",
    ),
    ((4, 4), "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (
        (VOCABULARY, VOCABULARY),
        "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab",
    ),
    ((64, 64), "out_hidden_size text_hidden_size adapter_out_dim output_dim output_proj_dims projector_output_dim"),
    (
        (32, 32),
        "projection_dim projector_hidden_size downsample_hidden_size adapter_input_size adapter_in_dim "
        "projection_hidden_size",
    ),
    ((512, 512), "max_source_positions n_positions n_ctx context_length"),
)
SIZES = {name: sizes for sizes, names in _SIZES for name in names.split()}
# Numbers of layers, as a tower of two has them.
_TOWER_LAYERS = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "insert_layer_id": 0,
}
# What a text decoder is given where the default is None and the class would work it out from sizes no longer so.
_FILLED = {"head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1}
# So that attention is far from even.
_LARGE_WEIGHTS = 0.1
_FIXED_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_TOKEN_ENDINGS = ("_token_id", "_token_index", "_patch_id", "_start_id", "_end_id", "_newline_id")
_TOWERS = ("vision", "audio", "vq", "qformer", "perceiver", "encoder", "sam", "protein")


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The settings that make a config's class tiny.

    Args:
        config: one with the defaults of its class; it is not changed.
    """
    return _shrunk(config, is_tower=False, tokens={})


def _shrunk(config: PretrainedConfig, is_tower: bool, tokens: dict[str, int]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    parts = parts_of(type(config))
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    for name in names:
        # Not getattr: what differs by layer cannot be asked for in this way.
        value = vars(config).get(name)
        if name in parts or isinstance(value, bool):
            continue
        if value is None:
            if name in _FILLED and not is_tower:
                settings[name] = _FILLED[name]
            continue
        if name in _FIXED_TOKENS:
            settings[name] = _FIXED_TOKENS[name]
        elif name.endswith(_TOKEN_ENDINGS) and isinstance(value, int):
            settings[name] = tokens.setdefault(name, FIRST_SPECIAL_TOKEN + len(tokens))
        elif name == "initializer_range" and not is_tower:
            settings[name] = _LARGE_WEIGHTS
        elif name in SIZES and isinstance(value, int | list | tuple) and value:
            settings[name] = SIZES[name][is_tower]
        elif is_tower and name in _TOWER_LAYERS:
            settings[name] = _TOWER_LAYERS[name]
        elif is_tower and name == "image_size":
            patch = vars(config).get("patch_size", 14)
            sides = [PATCHES * side for side in ([patch] if isinstance(patch, int) else patch)]
            settings[name] = sides[0] if isinstance(value, int) else [*sides, *sides][:2]
    if settings.get("kv_lora_rank"):
        # Latent attention has as many heads of keys as of queries.
        settings["num_key_value_heads"] = settings.get("num_attention_heads", 4)
    for name in parts:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            inside = is_tower or any(word in name for word in _TOWERS)
            kind = {"model_type": part.model_type} if part.model_type else {}
            settings[name] = {**kind, **_given(part), **_shrunk(part, inside, tokens)}
    return settings


def _given(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of a part that are not those of its class: the whole config gave them."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    plain = (bool, int, float, str)
    values = {field.name: vars(config).get(field.name) for field in fields if isinstance(field.default, plain)}
    return {
        field.name: values[field.name]
        for field in fields
        if field.name in values and isinstance(values[field.name], plain) and values[field.name] != field.default
    }


def parts_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The parts of a config that are configs themselves, by name."""
    older = getattr(config_class, "sub_configs", None) or {}
    return {**older, **(getattr(config_class, "sub_configs_defaults", None) or {})}


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes on top, in the parts too."""
    result = dict(settings)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if is_part else value
    return result
