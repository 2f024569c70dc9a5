"""A KV cache for Hugging Face transformers that compresses itself during prefill."""

from .analysis.calibration import Calibration, measure_statistics
from .analysis.heatmap import draw_heatmap
from .analysis.visual_tokens import TokenGrid, VisualTokenMap, visual_token_map
from .baselines import (
    METHODS,
    ExpectedAttentionCache,
    KeyDiffCache,
    RandomCache,
    SnapKVCache,
    StreamingLLMCache,
    make_cache,
)
from .cache import PrefillSelectionCache, ShiftKVCache
from .config import ShiftKVConfig
from .decode.backend import decoding_backend
from .decode.loop import decode_ahead
from .policies import Policy
from .report import CacheReport
from .selection import select_tokens

__all__ = [
    "METHODS",
    "CacheReport",
    "Calibration",
    "ExpectedAttentionCache",
    "KeyDiffCache",
    "Policy",
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
    "make_cache",
    "measure_statistics",
    "select_tokens",
    "visual_token_map",
]
