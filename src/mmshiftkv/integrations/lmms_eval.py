"""What lmms-eval is told of the models with a compressed cache, through its entry point group `lmms_eval.models`.

    python -m lmms_eval --model qwen2_5_vl_shiftkv --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,budget=64 \
        --tasks docvqa_val

The models themselves are in `lmms_eval_models`: lmms-eval reads the entry points while it is being imported, when its
own model classes cannot be imported yet.
"""

from typing import Any

MODELS = {"qwen2_5_vl_shiftkv": "Qwen2_5_VLShiftKV", "llava_hf_shiftkv": "LlavaHfShiftKV"}


def model_manifests() -> list[Any]:
    """One `ModelManifest` for each of `MODELS`; ModuleNotFoundError without lmms-eval."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ModuleNotFoundError as error:
        raise missing(error) from error
    models = f"{__package__}.lmms_eval_models"
    return [ModelManifest(model_id=name, chat_class_path=f"{models}.{kind}") for name, kind in MODELS.items()]


def missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The same error, with what installs the module."""
    return ModuleNotFoundError(
        f'{error.name} is not installed, and evaluation needs it: pip install "mmshiftkv[eval]"', name=error.name
    )
