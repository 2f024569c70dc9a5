"""Which prompt columns hold tokens, read off the mask an attention layer was given."""

from typing import Any

import torch


class PromptPadding:
    """The padding of one prompt: read off a mask at once, looked at when it is first needed, and then only once.

    Args:
        mask: what an attention layer was given, see `valid_columns`.
        batch: rows of the prompt.
        tokens: columns of the prompt.
        device: where the prompt's keys are.
    """

    def __init__(self, mask: Any, batch: int, tokens: int, device: torch.device) -> None:
        self._valid = valid_columns(mask, batch, tokens, device)
        self._is_checked = False

    def unchecked(self, device: torch.device) -> torch.Tensor | None:
        """As `valid`, without a look at it, so without waiting for the device: all columns may prove to be tokens."""
        return None if self._valid is None else self._valid.to(device)

    def valid(self, device: torch.device) -> torch.Tensor | None:
        """(B, T) bool on `device`, False for padding; None where there is none.

        Raises:
            ValueError: the prompt is padded elsewhere than on the left.
        """
        if self._valid is not None and not self._is_checked:
            self._valid = check_left_padding(self._valid)
        self._is_checked = True
        return self.unchecked(device)


def valid_columns(mask: Any, batch: int, tokens: int, device: torch.device) -> torch.Tensor | None:
    """The columns that the last token may attend to: (B, T) bool, or None where no mask was given.

    In a left-padded prompt these are exactly the columns that hold a token.  No host synchronisation.

    Args:
        mask: None; (B, T) of flash attention; (B or 1, heads or 1, t, T), boolean or additive; or a BlockMask.
        batch: B.
        tokens: T, all columns seen so far.
        device: where the result is wanted.

    Raises:
        TypeError: a mask of another kind.
    """
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim in (2, 4):
        row = mask[:, 0, -1] if mask.ndim == 4 else mask
        # Additive masks hold 0 or the dtype's lowest value.
        valid = row > torch.finfo(row.dtype).min / 2 if row.dtype.is_floating_point else row.bool()
    elif hasattr(mask, "mask_mod"):
        rows = torch.arange(batch, device=device)[:, None]
        columns = torch.arange(tokens, device=device)[None]
        zero = torch.zeros((), dtype=torch.long, device=device)
        valid = mask.mask_mod(rows, zero, zero + mask.seq_lengths[0] - 1, columns)
    else:
        raise TypeError(f"attention_mask of type {type(mask).__name__} is not understood: None, 2-D, 4-D or BlockMask")
    return valid[..., -tokens:].to(device).expand(batch, -1)


def check_left_padding(valid: torch.Tensor) -> torch.Tensor | None:
    """`valid` itself, or None where no column is padding.

    This is the one look a prefill takes at its mask, and so waits for the device.

    Args:
        valid: (B, T) bool.

    Raises:
        ValueError: a row of padding only, right padding, or padding between tokens.
    """
    empty = ~valid.any(dim=1)
    right = ~valid[:, -1] & ~empty
    middle = (valid[:, :-1] & ~valid[:, 1:]).any(dim=1) & ~right & ~empty
    padded, *wrong = torch.stack([(~valid).any(), empty.any(), right.any(), middle.any()]).tolist()
    kinds = {"nothing but padding": empty, "padding on the right": right, "padding between tokens": middle}
    for (what, rows), found in zip(kinds.items(), wrong, strict=True):
        if found:
            raise ValueError(
                f"attention_mask: row {rows.nonzero()[0].item()} has {what}; a prompt must be padded on the left only "
                '(set padding_side="left" on the tokenizer; prefix tuning puts its tokens in front of the padding: '
                "prompt such rows one by one)"
            )
    return valid if padded else None
