"""Tiny models with random weights, of the real classes, for tests that need no meaning."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from tiny_llava import document_image, save_tiny_llava

EMBEDDED_MODEL = Path(__file__).parents[1] / "examples" / "assets" / "tiny_qwen2_5_vl"

# head counts: grouped-query, multi-head and multi-query attention
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Decoders that the library supports, by a name that begins with the model type, and what their configs need besides.
SUPPORTED = {
    "llama": {},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-mqa": {"num_key_value_heads": 1},
    "llama-head_dim": {"head_dim": 40},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama-longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)],
            "original_max_position_embeddings": 128,
            "rope_theta": 1e4,
        }
    },
    "llama-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        }
    },
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "max_position_embeddings": 16,
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8},
    "granite": {"attention_multiplier": 0.3},
    "olmo2": {},
    "cohere": {},
    "glm": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": None},
    "helium": {},
    "seed_oss": {},
}

# Decoders that cap their logits or have learned sinks, by model type: `sinks_or_capping_model` builds them.
SINKS_OR_CAPPING = {
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "gpt_oss": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}

_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# Decoders some of whose layers are not full attention, by model type: sliding windows, chunks, shared keys and values,
# convolutions and linear attention.
HYBRIDS = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention": "eager",  # sdpa has no sinks
    },
    "cohere2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], **_DELTA},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **_DELTA,
    },
}


def text_model(model_type: str = "llama", *, attention: str = "sdpa", seed: int = 0, **changes) -> PreTrainedModel:
    """A decoder of `model_type` in float32 whose weights are large enough for attention to be far from even."""
    config = AutoConfig.for_model(model_type, **{**SHAPE, "initializer_range": 0.2, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def sinks_or_capping_model(model_type: str, **changes) -> PreTrainedModel:
    """A decoder like those of `SINKS_OR_CAPPING`, all layers full attention; sinks take about half of the mass."""
    given = {"layer_types": ["full_attention"] * 3, **SINKS_OR_CAPPING.get(model_type, {}), **changes}
    model = text_model(model_type, attention="eager", **given)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data = 4 + torch.randn(parameter.shape, generator=generator)
    return model


def prompt_ids(rows: int = 1, tokens: int = 40, *, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, tokens), none of them special."""
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths in one left-padded batch: input_ids and attention_mask."""
    width = max(lengths)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    ids = prompt_ids(len(lengths), width, seed=seed) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


class VisionCase:
    """A multimodal model and its processor; `inputs` makes prompts with real images."""

    def __init__(self, model: PreTrainedModel, processor) -> None:
        self.model = model
        self.processor = processor

    def inputs(self, *prompts: tuple[str, Image.Image | Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """A left-padded batch of prompts: questions with an image each, or with several."""
        self.processor.tokenizer.padding_side = "left"
        conversations = []
        for question, given in prompts:
            images = [given] if isinstance(given, Image.Image) else given
            content = [{"type": "image", "image": image} for image in images]
            conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def prompts(self, count: int = 1) -> dict[str, torch.Tensor]:
        """A batch of `count` prompts of different lengths and image sizes."""
        sizes = [(224, 168), (140, 280), (112, 112)]
        questions = ["What is the Total?", "What are the Name and the Date?", "Read line 1."]
        return self.inputs(
            *((question, document_image(*size)) for question, size in zip(questions[:count], sizes, strict=False))
        )


def qwen2_5_vl(attention: str = "sdpa", dtype: str = "float32") -> VisionCase:
    """The embedded model."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        EMBEDDED_MODEL, dtype=dtype, attn_implementation=attention
    )
    return VisionCase(model.eval(), AutoProcessor.from_pretrained(EMBEDDED_MODEL))


def llava_next(folder: Path, family: str = "vicuna", attention: str = "sdpa") -> VisionCase:
    """A random LLaVA-NeXT, written to `folder` and loaded from there."""
    if not (folder / "config.json").exists():
        save_tiny_llava(folder, family)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    return VisionCase(model.eval(), AutoProcessor.from_pretrained(folder))


def device_map(model: PreTrainedModel, of_block: Callable[[int], Any], others: Any) -> dict[str, Any]:
    """Where the parts of a vision model go: each decoder block by its number, all else to one place."""
    text = model.model.language_model
    found = {f"model.language_model.layers.{index}": of_block(index) for index in range(len(text.layers))}
    for name, module in (("", model), ("model.", model.model), ("model.language_model.", text)):
        parts = [*module.named_children(), *module.named_parameters(recurse=False)]
        found |= {f"{name}{part}": others for part, _ in parts if part not in ("model", "language_model", "layers")}
    return found


def hooks_on(model: torch.nn.Module) -> int:
    """How many forward hooks there are on the modules of a model."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
