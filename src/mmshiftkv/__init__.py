"""A KV cache for Hugging Face transformers that compresses itself during prefill."""

from .cache import PrefillSelectionCache, ShiftKVCache
from .config import ShiftKVConfig
from .policies import Policy
from .report import CacheReport
from .selection import select_tokens

__all__ = ["CacheReport", "Policy", "PrefillSelectionCache", "ShiftKVCache", "ShiftKVConfig", "select_tokens"]
