"""What NVIDIA's kvpress keeps of some prompts, for tests/test_kvpress.py; run as a script it writes the record.

    python -m venv kvpress && kvpress/bin/pip install kvpress pillow pytest torchvision
    cd tests && PYTHONPATH=examples ../kvpress/bin/python kvpress_reference.py

kvpress requires an older transformers than mmshiftkv, so this file needs neither mmshiftkv nor its version of it.  The
models are the tiny random ones of models.py, with weights and prompts from NumPy's RandomState, whose numbers never
change.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import models

RECORD = Path(__file__).parent / "data" / "kvpress_reference.json"
TOKENS, BUDGET = 120, 40
# kvpress keeps int(tokens * (1 - ratio)) of them.
RATIO = 1 - (BUDGET + 0.5) / TOKENS
# Scores this close, relatively, may change places on another machine.
LEAST_GAP = 1e-5

MODELS: dict[str, dict[str, Any]] = {
    "grouped-query": {"model_type": "llama"},
    "multi-head": {"model_type": "llama", "num_key_value_heads": 4},
    "multi-query": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 24},
    "with biases": {"model_type": "qwen2"},
    "with query norms": {"model_type": "qwen3"},
}
# Method and settings of mmshiftkv, the press of kvpress and its settings.
METHODS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("streaming_llm", {}, "StreamingLLMPress", {}),
    ("streaming_llm", {"sinks": 9}, "StreamingLLMPress", {"n_sink": 9}),
    ("snapkv", {}, "SnapKVPress", {"window_size": 32}),
    ("snapkv", {"window": 7, "kernel_size": 3}, "SnapKVPress", {"window_size": 7, "kernel_size": 3}),
    ("keydiff", {}, "KeyDiffPress", {}),
    ("expected_attention", {}, "ExpectedAttentionPress", {}),
    (
        "expected_attention",
        {"future_positions": 24, "sinks": 0, "epsilon": 0.02},
        "ExpectedAttentionPress",
        {"n_future_positions": 24, "n_sink": 0, "epsilon": 0.02},
    ),
]
CASES = {
    f"{method} {settings or ''}, {model}".replace(" ,", ","): (model, method, settings, press, press_settings)
    for model in MODELS
    for method, settings, press, press_settings in METHODS
}


def model_of(name: str) -> PreTrainedModel:
    """One of MODELS, whose weights are the same with every version of torch and transformers."""
    model = models.text_model(**MODELS[name])
    random = np.random.RandomState(0)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            noise = torch.from_numpy(random.standard_normal(tuple(weight.shape)))
            weight.copy_(1 + 0.2 * noise if "norm" in key else 0.2 * noise)
    return model


def prompt() -> torch.Tensor:
    """Token ids (1, TOKENS)."""
    return torch.from_numpy(np.random.RandomState(1).randint(3, 128, (1, TOKENS)))


def prefilled(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What a press is given of each layer after the prompt: module, hidden states, keys, values and rotary factors."""
    seen: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        module.rotary_emb = model.model.rotary_emb  # where kvpress looks for it
        factors = {"position_embeddings": inputs["position_embeddings"]}
        seen.append({"module": module, "hidden_states": inputs["hidden_states"], "attentions": None, "kwargs": factors})

    cache = DynamicCache(config=model.config)
    hooks = [block.self_attn.register_forward_pre_hook(record, with_kwargs=True) for block in model.model.layers]
    with torch.no_grad():
        model(prompt(), past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return [
        {**inputs, "keys": layer.keys, "values": layer.values} for inputs, layer in zip(seen, cache.layers, strict=True)
    ]


def kept_by_kvpress(layers: list[dict[str, Any]], press: str, settings: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens with the best scores of a press and the last one, by layer and KV head."""
    import kvpress

    scorer = getattr(kvpress, press)(compression_ratio=RATIO, **settings)
    with torch.no_grad():
        return [best(scorer.score(**inputs)[0]) for inputs in layers]


def best(scores: torch.Tensor) -> list[list[int]]:
    """The tokens with the best scores (KV heads, TOKENS) and the last one, by KV head.

    A press that does not protect the last token may drop it; the caches of mmshiftkv never do, so it is taken here.
    """
    ordered, order = scores[:, :-1].sort(dim=-1, descending=True)
    inside, outside = ordered[:, BUDGET - 2], ordered[:, BUDGET - 1]
    assert ((inside - outside) > LEAST_GAP * inside.abs()).all(), "too close to call"
    return [sorted([*head, TOKENS - 1]) for head in order[:, : BUDGET - 1].tolist()]


def main() -> None:
    """Writes RECORD."""
    from importlib.metadata import version

    layers = {name: prefilled(model_of(name)) for name in MODELS}
    record = {
        "versions": {
            "kvpress": version("kvpress"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kept": {
            case: kept_by_kvpress(layers[model], press, settings)
            for case, (model, _, _, press, settings) in CASES.items()
        },
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
