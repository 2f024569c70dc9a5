"""The variance-expanded samples (steps 1 and 2): statistics of the prompt, noise and scaling in one launch."""

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from ..launching import launch
from ..sizes import divided_up

_TOKENS_AT_ONCE = 2048
_COUNTERS_AT_ONCE = 512


@triton.jit
def _prompt_statistics(p_means, p_squares, p_valid, first, T, D: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and deviation of all features of the tokens from `first` on; those that are not finite are left out.

    One pass: deviations of the tokens' means are taken from the last one's, which is as good as any of them.
    """
    origin = tl.load(p_means + T - 1)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    counts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    between = tl.zeros([BLOCK], tl.float32)
    within = tl.zeros([BLOCK], tl.float32)
    for start in range(first, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        is_counted = t < T
        if p_valid is not None:
            is_counted &= tl.load(p_valid + t, mask=is_counted, other=0) != 0
        mean = tl.load(p_means + t, mask=is_counted, other=origin)
        square = tl.load(p_squares + t, mask=is_counted, other=0.0)
        is_counted &= (tl.abs(mean) < float("inf")) & (square < float("inf"))
        deviation = tl.where(is_counted, mean - origin, 0.0)
        within += tl.where(is_counted, square, 0.0)
        counts += tl.where(is_counted, 1.0, 0.0)
        sums += deviation
        between += deviation * deviation
    count, shift = tl.sum(counts, 0), tl.sum(sums, 0)
    shift /= count
    variance = (tl.sum(within, 0) + D * (tl.sum(between, 0) - count * shift * shift)) / (count * D - 1)
    return origin + shift, tl.sqrt(variance)


@triton.jit
def _normal_pair(first, second):
    """Two independent standard normal values of two blocks of random 32-bit integers (Box-Muller)."""
    # Never 0, whose logarithm is infinite, and never 1.
    radius = (tl.cast(tl.cast(first, tl.uint32, bitcast=True) >> 9, tl.float32) + 0.5) * (1.0 / 8388608)
    angle = tl.cast(tl.cast(second, tl.uint32, bitcast=True) >> 9, tl.float32) * (6.283185307179586 / 8388608)
    length = tl.sqrt(-2.0 * tl.log(radius))
    return length * tl.cos(angle), length * tl.sin(angle)


@triton.jit
def _store_samples(p_samples, index, noise, mean, deviation, mask, SIZE):
    tl.store(p_samples + index, tl.fma(noise, deviation, mean), mask=mask & (index < SIZE))


@triton.jit(do_not_specialize=["seed", "stream", "first", "T"])
def _samples_kernel(
    p_means,
    p_squares,
    p_valid,
    p_last,
    p_samples,
    seed,
    stream,
    gamma,
    first,
    T,
    SIZE,
    stride_lb,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every so-many-th block of the samples of one row of the batch.

    The four values that one counter of the generator gives go to the four quarters of the samples.  The first program
    copies the state that follows them.
    """
    batch = tl.cast(tl.program_id(1), tl.int64)
    if p_valid is not None:
        p_valid += batch * T
    mean, deviation = _prompt_statistics(p_means + batch * T, p_squares + batch * T, p_valid, first, T, D, BLOCK_T)
    deviation *= gamma
    p_samples += batch * SIZE
    if p_last is not None:
        p_samples += batch * D
        if tl.program_id(0) == 0:
            for start in range(0, D, BLOCK):
                d = start + tl.arange(0, BLOCK)
                state = tl.load(p_last + batch * stride_lb + d, mask=d < D, other=0.0)
                tl.store(p_samples + SIZE + d, state, mask=d < D)
    key = (tl.cast(tl.cast(seed, tl.uint32, bitcast=True), tl.uint64) << 32) | tl.cast(
        tl.cast(stream, tl.uint32, bitcast=True), tl.uint64
    )
    quarter = (SIZE + 3) // 4
    for start in range(tl.program_id(0) * BLOCK, quarter, tl.num_programs(0) * BLOCK):
        counter = start + tl.arange(0, BLOCK)
        bits_0, bits_1, bits_2, bits_3 = tl.randint4x(key, counter)
        noise_0, noise_1 = _normal_pair(bits_0, bits_1)
        noise_2, noise_3 = _normal_pair(bits_2, bits_3)
        m_counter = counter < quarter
        _store_samples(p_samples, counter, noise_0, mean, deviation, m_counter, SIZE)
        _store_samples(p_samples, quarter + counter, noise_1, mean, deviation, m_counter, SIZE)
        _store_samples(p_samples, 2 * quarter + counter, noise_2, mean, deviation, m_counter, SIZE)
        _store_samples(p_samples, 3 * quarter + counter, noise_3, mean, deviation, m_counter, SIZE)


def draw_samples(
    means: torch.Tensor,
    squares: torch.Tensor,
    *,
    count: int,
    features: int,
    gamma: float,
    seed: int,
    stream: int,
    dtype: torch.dtype,
    valid: torch.Tensor | None = None,
    window: int | None = None,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.draw_samples`, on a GPU."""
    batch, tokens = means.shape
    means, squares = means.contiguous(), squares.contiguous()
    if last is not None and last.stride(-1) != 1:
        last = last.contiguous()
    samples = means.new_empty((batch, count + (last is not None), features), dtype=dtype)
    size = count * features
    # Each program finds the statistics anew, so that no launch is needed for them: one program per multiprocessor.
    programs = min(divided_up(divided_up(size, 4), _COUNTERS_AT_ONCE), gpu_of(means.device).multiprocessors)
    with torch.cuda.device_of(means):
        launch(
            _samples_kernel,
            (programs, batch),
            means,
            squares,
            None if valid is None else valid.contiguous().view(torch.uint8),
            last,
            samples,
            _as_int32(seed),
            _as_int32(stream),
            float(gamma),
            0 if window is None else max(tokens - window, 0),
            tokens,
            size,
            0 if last is None else last.stride(0),
            D=features,
            BLOCK_T=_TOKENS_AT_ONCE,
            BLOCK=_COUNTERS_AT_ONCE,
            num_warps=8,
        )
    return samples


def _as_int32(value: int) -> int:
    """The signed integer with the same 32 bits, so that a kernel is compiled for one type only."""
    return (value + 2**31) % 2**32 - 2**31
