"""Models with the shapes of real checkpoints and random weights, for timing."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _qwen2_5_vl_7b() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def _llava_1_6_vicuna_7b() -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlavaNextForConditionalGeneration, LlavaNextConfig(text_config=text)


def _tiny() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig

    model_class, config = _qwen2_5_vl_7b()
    small = {"vocab_size": 512, "hidden_size": 224, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {**config.text_config.to_dict(), **small, **heads, "rope_parameters": rope, "layer_types": None}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 224}
    return model_class, Qwen2_5_VLConfig(text_config=text, vision_config=vision)


SHAPES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "llava-1.6-vicuna-7b": _llava_1_6_vicuna_7b,
    "tiny": _tiny,
}


def random_model(
    name: str, device: "torch.device", dtype: "torch.dtype", *, attention: str = "sdpa", seed: int = 0
) -> "PreTrainedModel":
    """A model of one of `SHAPES` with random weights, made on `device`; it has no tokens that end a text.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"name={name!r} must be one of {', '.join(SHAPES)}")
    import torch

    model_class, config = SHAPES[name]()
    config._attn_implementation = attention
    default = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = model_class(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval()
