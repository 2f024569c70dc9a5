"""A KV cache for Hugging Face transformers that compresses itself during prefill."""

from .analysis.calibration import Calibration, measure_statistics
from .analysis.heatmap import draw_heatmap
from .analysis.visual_tokens import TokenGrid, VisualTokenMap, visual_token_map
from .cache import PrefillSelectionCache
from .decode.backend import decoding_backend
from .decode.loop import decode_ahead
from .joining import join
from .methods.base import Method
from .methods.config import ShiftKVConfig
from .methods.selection import refit_values, select_tokens
from .model.arguments import CACHE_ARGUMENT
from .model.hooks import LayerInput
from .registry import (
    METHODS,
    ExpectedAttentionCache,
    KeyDiffCache,
    RandomCache,
    ShiftKVCache,
    SnapKVCache,
    StreamingLLMCache,
    make_cache,
    register_method,
)
from .report import CacheReport
from .support import ModelSupport, model_support
from .use.conversation import Conversation
from .use.document import Document
from .use.warming import warm_up

__all__ = [
    "CACHE_ARGUMENT",
    "METHODS",
    "CacheReport",
    "Calibration",
    "Conversation",
    "Document",
    "ExpectedAttentionCache",
    "KeyDiffCache",
    "LayerInput",
    "Method",
    "ModelSupport",
    "PrefillSelectionCache",
    "RandomCache",
    "ShiftKVCache",
    "ShiftKVConfig",
    "SnapKVCache",
    "StreamingLLMCache",
    "TokenGrid",
    "VisualTokenMap",
    "decode_ahead",
    "decoding_backend",
    "draw_heatmap",
    "join",
    "make_cache",
    "measure_statistics",
    "model_support",
    "refit_values",
    "register_method",
    "select_tokens",
    "visual_token_map",
    "warm_up",
]
