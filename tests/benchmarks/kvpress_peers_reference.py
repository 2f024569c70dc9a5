"""What NVIDIA's kvpress keeps with methods that compare.py has as peers, for test_peers_and_kvpress.py.

As tests/methods/kvpress_reference.py, whose models and prompt these are; run as a script it writes the record:

    cd tests && PYTHONPATH=.:examples:methods ../kvpress/bin/python benchmarks/kvpress_peers_reference.py

DropKV is no part of a release of kvpress: `DropKVPress` is that of pull request 285 at commit 7fb8625, whose file
dropkv_press.py has to be put into the folder kvpress/presses.  The record was made with its score alone, without
`compress` and the checks of arguments.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import kvpress_reference as reference

RECORD = Path(__file__).parent / "data" / "kvpress_peers_reference.json"
# Ids that stand for "Repeat the previous context exactly." and what comes behind it.
INSTRUCTION = torch.tensor([5, 99, 31, 7])

# Peer and settings of compare.py, the press of kvpress and its settings.
METHODS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("criticalkv", {"window": 16}, "CriticalKVPress", {"window_size": 16}),
    (
        "criticalkv",
        {"window": 7, "kernel_size": 3, "first_stage_share": 0.25, "epsilon": 0.01},
        "CriticalKVPress",
        {"window_size": 7, "kernel_size": 3, "first_stage_ratio": 0.25, "epsilon": 0.01},
    ),
    ("dropkv", {}, "DropKVPress", {}),
    ("dropkv", {"window": 7, "kernel_size": 3}, "DropKVPress", {"window_size": 7, "kernel_size": 3}),
    ("kvzip", {}, "KVzipPress", {}),
    ("kvzip", {"sinks": 0}, "KVzipPress", {"n_sink": 0}),
]
CASES = {
    f"{peer} {settings or ''}, {model}".replace(" ,", ","): (model, peer, settings, press, press_settings)
    for model in reference.MODELS
    for peer, settings, press, press_settings in METHODS
}


def kept_by_kvpress(model: PreTrainedModel, press: str, settings: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens with the best scores of a press and the last one, by layer and KV head."""
    if press == "KVzipPress":
        return [reference.best(scores[0].float()) for scores in _kvzip_scores(model, settings)]
    scorer = _scorer(press, dict(settings))
    with torch.no_grad():
        return [reference.best(scorer.score(**inputs)[0]) for inputs in reference.prefilled(model)]


def _scorer(press: str, settings: dict[str, Any]) -> Any:
    import kvpress

    if press == "DropKVPress":
        from kvpress.presses.dropkv_press import DropKVPress

        return DropKVPress(compression_ratio=reference.RATIO, **settings)
    own = {name: settings.pop(name) for name in ("first_stage_ratio", "epsilon") if name in settings}
    return kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=reference.RATIO, **settings), **own)


def _kvzip_scores(model: PreTrainedModel, settings: dict[str, Any]) -> torch.Tensor:
    """The scores that KVzip gives the prompt, (layers, 1, KV heads, TOKENS): all of it is context, with no template."""
    import kvpress

    press = kvpress.KVzipPress(compression_ratio=reference.RATIO, **settings)
    ids, cache = reference.prompt(), DynamicCache(config=model.config)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # where kvpress looks for it
    # What the press itself reads off a forward pass and the tokenizer of a checkpoint.
    press._context_ids, press._cache, press._suffix_ids = ids, cache, ids[:, :0]
    tokenizer = SimpleNamespace(encode=lambda *arguments, **options: INSTRUCTION[None])
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        press._perform_kvzip_compression(model, tokenizer)
    return press.score_val


def main() -> None:
    """Writes RECORD."""
    from importlib.metadata import version

    models = {name: reference.model_of(name) for name in reference.MODELS}
    record = {
        "versions": {
            "kvpress": version("kvpress"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kept": {
            case: kept_by_kvpress(models[model], press, settings)
            for case, (model, _, _, press, settings) in CASES.items()
        },
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
