"""Sizes of launches; Triton's own functions for them are slow outside of kernels."""

MOST_ROWS = 16  # of a decoding step's kernels: matrix units multiply no fewer at once


def divided_up(number: int, by: int) -> int:
    """`number` / `by`, rounded up."""
    return -(number // -by)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
