"""What the layers that are not selected can do."""

from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from .windows import check_window


def check_crop(layer: Any, tokens_to_remove: int) -> None:
    """Raises ValueError if a layer that is not selected cannot remove its last tokens.

    transformers' layers find that out while they crop, when others have been cropped already.

    Args:
        layer: the layer; selected ones are left to themselves.
        tokens_to_remove: how many are to be removed, negative; or 0.
    """
    if not tokens_to_remove:
        return
    if isinstance(layer, DynamicSlidingWindowLayer):
        check_window(layer, tokens_to_remove)
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return
    if not layer.record_past or any(layer.is_recurrent_states_initialized.values()):
        raise ValueError(
            f"tokens_to_remove={tokens_to_remove}: a layer of linear attention or convolution has one state for all "
            "tokens, and none can be removed from it"
        )
