"""Runs of a model on a cache, what must hold of the cache after them, and comparisons of two runs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from masked_reference import dropped_entries_masked
from mmshiftkv import CACHE_ARGUMENT, PrefillSelectionCache

from .bench import tokens_kept
from .case import Outcome

# Attention over fewer terms, or over terms in another order, sums otherwise; logits are of the order of 10.
TOLERANCE = 1e-3


def run_pass(
    model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any
) -> torch.Tensor:
    """One forward pass; the logits (B, t, vocabulary)."""
    if mask is not None:
        inputs["attention_mask"] = mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **inputs).logits


def prefilled(model: PreTrainedModel, cache: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """The cache, after a pass with a prompt."""
    run_pass(model, cache, inputs["input_ids"], inputs["attention_mask"])
    return cache


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that drops nothing."""
    return DynamicCache(config=model.config)


def generate(model: PreTrainedModel, inputs: Mapping[str, Any], cache: Any, *, seed: int = 0, **options: Any) -> Any:
    """`generate` with all that it can return, eager unless a `compile_config` is given."""
    torch.manual_seed(seed)
    if "compile_config" not in options and model.device.type == "cuda":
        options["disable_compile"] = True
    return model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        **{
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "output_scores": True,
            **options,
        },
    )


def kept_by_layer(cache: PrefillSelectionCache) -> dict[int, torch.Tensor | None]:
    """`kept_indices` of all layers."""
    return {index: cache.kept_indices(index) for index in range(len(cache.layers))}


def check_kept(cache: PrefillSelectionCache, mask: torch.Tensor, budget: int | float) -> None:
    """The prompt, mask (B, T), has been selected from as the documents say.

    Ascending columns, the last one among them, as many as the budget, and no padding while a token is left out.
    """
    width = mask.shape[1]
    count = tokens_kept(budget, width)
    for index, kept in kept_by_layer(cache).items():
        if kept is None:
            continue
        assert kept.shape[-1] == count, f"layer {index} keeps {kept.shape[-1]} columns of {width}, not {count}"
        assert (kept.diff(dim=-1) > 0).all(), f"layer {index}: columns are not ascending"
        assert (kept[..., -1] == width - 1).all(), f"layer {index}: the last column is not kept"
        assert kept.min() >= 0, f"layer {index}: a negative column"
        tokens = mask.bool()[:, None].expand(*kept.shape[:2], -1).gather(-1, kept).sum(-1)
        expected = mask.sum(1).clamp(max=count)[:, None].expand_as(tokens)
        assert tokens.equal(expected), f"layer {index} keeps {tokens.tolist()} tokens, not {expected.tolist()}"


def check_lengths(cache: PrefillSelectionCache, seen: int, stored: int) -> None:
    """All layers have seen and hold the same number of tokens, and the report says so."""
    report = cache.report()
    assert int(cache.get_seq_length()) == seen, f"the cache says {int(cache.get_seq_length())} tokens, not {seen}"
    assert report.tokens_seen == seen, f"the report says {report.tokens_seen} tokens seen, not {seen}"
    for layer in report.layers:
        if layer.selected:
            found = layer.tokens_seen, layer.tokens_stored
            assert found == (seen, stored), f"layer {layer.index} has seen and holds {found}, not {(seen, stored)}"
            assert 0 <= layer.bytes_reserved <= layer.bytes_stored or not stored
    assert report.tokens_stored == stored
    assert report.bytes_saved == report.bytes_full - report.bytes_stored
    assert str(report)


def masked_generation(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    kept: Mapping[int, torch.Tensor | None],
    **options: Any,
) -> Any:
    """`generate` on the full cache with the dropped entries masked; rows of `inputs` may be repeated in `kept`."""
    with dropped_entries_masked(model, kept, _repeated(inputs["attention_mask"].bool(), kept)):
        return generate(model, inputs, full_cache(model), **options)


def masked_logits(
    model: PreTrainedModel,
    pieces: Iterable[torch.Tensor],
    mask: torch.Tensor,
    kept: Mapping[int, torch.Tensor | None],
    later: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The logits of passes with these ids, the prompt first, on the full cache with the dropped entries masked.

    Args:
        model: the model.
        pieces: ids (B, t) of each pass.
        mask: (B, T), the prompt's attention mask.
        kept: by layer, the columns that are kept.
        later: (B, L), the mask of what comes after the prompt; None: no padding.
    """
    cache, logits, fed = full_cache(model), [], 0
    pieces = list(pieces)
    if later is None:
        later = mask.new_ones(mask.shape[0], sum(piece.shape[1] for piece in pieces) - mask.shape[1])
    whole = torch.cat([mask, later], dim=1)
    with dropped_entries_masked(model, kept, mask.bool(), later.bool()):
        for piece in pieces:
            fed += piece.shape[1]
            logits.append(run_pass(model, cache, piece, whole[:, :fed]))
    return logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """The two are finite and equal up to rounding."""
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    if not found.numel():
        return
    assert found.isfinite().all(), f"{what}: not all numbers are finite"
    error = ((found - expected).abs() - tolerance * expected.abs()).max().item()
    assert error <= tolerance, f"{what}: off by {(found - expected).abs().max().item():.3g}"


def compare_generations(
    found: Any, expected: Any, width: int, *, exact: bool = False, tolerance: float = TOLERANCE
) -> Outcome:
    """The same tokens and logits; tokens may differ behind a step whose best scores are equal up to rounding.

    Args:
        found, expected: what `generate` returned.
        width: columns of the prompt.
        exact: the logits must be equal to the bit.
        tolerance: of the logits otherwise.
    """
    one, other = found.sequences, expected.sequences
    if found.get("sequences_scores") is not None and expected.get("sequences_scores") is not None:
        return _compare_beams(found, expected, exact=exact, tolerance=tolerance)
    steps = min(one.shape[1], other.shape[1]) - width
    for step in range(steps):
        alike = (one[:, : width + step] == other[:, : width + step]).all(dim=1)
        mine, theirs = found.logits[step][alike], expected.logits[step][alike]
        if exact:
            assert mine.equal(theirs), f"logits of step {step} differ by {(mine - theirs).abs().max().item():.3g}"
        assert_close(mine, theirs, f"logits of step {step}", tolerance)
    if one.equal(other):
        return Outcome.PASSED
    assert not exact, f"sequences differ: {one.tolist()}, expected {other.tolist()}"
    for row, (mine, theirs) in enumerate(zip(one[:, width:].tolist(), other[:, width:].tolist(), strict=True)):
        step = next((step for step in range(steps) if mine[step] != theirs[step]), None)
        if step is not None:
            _assert_tie(expected.scores[step][row], mine[step], theirs[step], f"row {row}, step {step}", tolerance)
    return Outcome.TIED


def _assert_tie(scores: torch.Tensor, mine: int, theirs: int, where: str, tolerance: float) -> None:
    gap = (scores[mine] - scores[theirs]).abs().item()
    size = scores[theirs].abs().item()
    # A sampled token may differ whatever the gap, if its probability mass ends where the random number lies.
    sampled = scores.isinf().any().item() or scores.argmax().item() != theirs
    assert sampled or gap <= 4 * tolerance * max(size, 1.0), f"{where}: token {mine}, expected {theirs}, gap {gap:.3g}"


def _compare_beams(found: Any, expected: Any, *, exact: bool, tolerance: float) -> Outcome:
    if found.sequences.equal(expected.sequences):
        assert_close(found.sequences_scores, expected.sequences_scores, "scores of the sequences", tolerance)
        return Outcome.PASSED
    assert not exact, f"sequences differ: {found.sequences.tolist()}, expected {expected.sequences.tolist()}"
    # Beams of nearly the same score may change places, and the best of them then has nearly the expected score.
    assert_close(found.sequences_scores, expected.sequences_scores, "scores of other sequences", 10 * tolerance)
    return Outcome.TIED


def compare_kept(found: Mapping[int, torch.Tensor | None], expected: Mapping[int, torch.Tensor | None]) -> Outcome:
    """The same columns, but for scores that nearly tie: two columns at most, or one of 500, in all layers together."""
    same = total = 0
    for index, theirs in expected.items():
        mine = found[index]
        if theirs is None or mine is None:
            assert theirs is mine, f"layer {index}: only one of two caches has selected"
            continue
        assert mine.shape == theirs.shape, f"layer {index}: keeps {tuple(mine.shape)}, not {tuple(theirs.shape)}"
        same += (mine[..., None] == theirs[..., None, :]).any(-1).sum().item()
        total += mine.numel()
    assert total - same <= max(2, total // 500), f"only {same} of {total} kept columns are those expected"
    return Outcome.PASSED if same == total else Outcome.TIED


def _repeated(valid: torch.Tensor, kept: Mapping[int, torch.Tensor | None]) -> torch.Tensor:
    rows = next(part.shape[0] for part in kept.values() if part is not None)
    return valid.repeat_interleave(rows // valid.shape[0], dim=0)
