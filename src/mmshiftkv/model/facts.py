"""What a look at an attention module with made-up tokens tells of how it makes its queries and logits."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from shiftkv_kernels import rotate_queries
from shiftkv_kernels.reference.attention import soft_capped, softmax_with_sinks

from .asking import (
    Handed,
    StoredTokens,
    ask,
    eager_function,
    keys_given,
    takes_query_by_function,
    unknown_arguments,
    with_weights,
)
from .positions import Factors, Positions
from .precision import PLAIN_DTYPES, without_autocast
from .rebuilding import Rebuilder
from .rotary import Rotary
from .rotation import LAYOUTS, Rotation

# What modules pass to their attention function by name, and what of it changes nothing but the mask or the speed.
_HARMLESS = ("cache_position", "dropout", "is_causal", "output_attentions", "position_ids", "sliding_window")
_KNOWN = (*_HARMLESS, "scaling", "softcap", "s_aux")
_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class Facts:
    """How an attention module makes its queries and logits.

    Attributes:
        is_rebuilt: whether queries rebuilt from its parts are its own; else it must be asked.
        pairs_halves: whether rebuilt queries rotate feature i with feature i + rotary dim / 2.
        rotation: of asked queries; None where it is not one of the known layouts.
        scaling: factor on the logits.
        softcap: bound of the logits, or None.
        has_sinks: whether a learned logit of each head, its attribute `sinks`, takes part in the softmax.
        is_latent: whether keys and values are made of what is stored: of latents of all heads, for instance.
        repeats_stored_heads: whether the heads made of one that is stored do not lie side by side: the first of each
            come first, then the second of each, and so on.
    """

    is_rebuilt: bool
    pairs_halves: bool
    rotation: Rotation | None
    scaling: float
    softcap: float | None = None
    has_sinks: bool = False
    is_latent: bool = False
    repeats_stored_heads: bool = False


def look_at(module: nn.Module, rotary: Rotary, hidden_size: int, last_position: int) -> Facts:
    """Runs three made-up tokens through an attention module.

    It is asked for its queries, and they are compared with those rebuilt from its parts, which are made faster where
    both agree, also at the last position.  Of the logits, which need more than queries and keys, the module's own
    attention function says whether scaling, soft-capping and sinks are all there is to them.

    Args:
        module: the attention module.
        rotary: its rotary embedding.
        hidden_size: features of its input.
        last_position: the highest position that the model is made for.

    Raises:
        ValueError: it is not understood; the message says why.
    """
    if getattr(module, "lambda_q1", None) is not None:
        raise ValueError("it has differential attention (lambda_q1)")
    if unknown := unknown_arguments(module):
        names = ", ".join(unknown)
        if any("cross" in name for name in unknown):
            raise ValueError(f"it attends to other states than those of the tokens ({names})")
        raise ValueError(f"its attention takes {names}, which is not understood")
    device = _device_of(module)
    if device.type == "meta":
        raise ValueError("it has no weights yet (they are on the meta device); build the cache when they are loaded")
    made_up = _MadeUp.of(module, rotary, hidden_size, last_position, device)
    with torch.no_grad(), without_autocast(device), with_weights(module):
        if not takes_query_by_function(module):
            return _of_keys(module, rotary, made_up)
        return _of_answer(module, rotary, made_up)


@dataclass(frozen=True)
class _MadeUp:
    """Three tokens at a low, a middle and the highest position."""

    hidden_states: torch.Tensor
    positions: Positions

    @classmethod
    def of(
        cls, module: nn.Module, rotary: Rotary, hidden_size: int, last_position: int, device: torch.device
    ) -> "_MadeUp":
        parameter = next(module.parameters())
        dtype = parameter.dtype if parameter.dtype in PLAIN_DTYPES else torch.get_default_dtype()
        hidden = torch.arange(3 * hidden_size, device=device).sin().view(1, 3, hidden_size).to(dtype)
        places = torch.tensor([[3, 11, max(last_position, 12)]], device=device)
        try:
            found = rotary.factors(places)
        except _ERRORS as error:
            raise ValueError(f"its rotary embedding gives nothing for it ({_words(error)})") from error
        if isinstance(found, tuple):
            found = found[0].to(dtype), found[1].to(dtype)
        return cls(hidden, Positions(found, places, places[0]))


def _of_answer(module: nn.Module, rotary: Rotary, made_up: _MadeUp) -> Facts:
    """Facts of a module that can be asked."""
    store = StoredTokens(made_up.positions.columns)
    try:
        handed = ask(module, made_up.hidden_states, made_up.positions, cache=store, attention=_plain_attention)
    except _ERRORS as error:
        raise ValueError(f"it could not be asked for its queries: {_words(error)}") from error
    if handed.mask is not None:
        raise ValueError("it adds a term of its own to the logits (it makes an attention mask)")
    for name, value in handed.options.items():
        if name not in _KNOWN and value is not None and value is not False:
            raise ValueError(f"it gives its attention function {name}, which is not understood")
    if store.given is None:
        raise ValueError("it does not pass its keys to the cache's update")
    heads, kv_heads = handed.query.shape[1], handed.keys.shape[1]
    if heads % kv_heads or handed.query.shape[3] != handed.keys.shape[3]:
        raise ValueError(
            f"{heads} query heads of {handed.query.shape[3]} do not fit {kv_heads} of {handed.keys.shape[3]}"
        )
    sinks = handed.options.get("s_aux")
    if sinks is not None and sinks is not getattr(module, "sinks", None):
        raise ValueError("its attention sinks are not its attribute sinks")
    _check_logits(module, handed)
    parts, pairs_halves = _rebuilt(module, rotary, made_up, handed.query)
    return Facts(
        is_rebuilt=parts is not None,
        pairs_halves=pairs_halves,
        rotation=None if parts is not None else _rotation_of(module, rotary, made_up, handed.query),
        scaling=_scaling(handed),
        softcap=handed.options.get("softcap"),
        has_sinks=sinks is not None,
        is_latent=not all(_is_same(*pair) for pair in zip(store.given, (handed.keys, handed.values), strict=True)),
        repeats_stored_heads=_repeats_heads(store.given[0], handed.keys),
    )


def _is_same(stored: torch.Tensor, attended: torch.Tensor) -> bool:
    return stored.shape == attended.shape and torch.equal(stored, attended)


def _repeats_heads(stored: torch.Tensor, attended: torch.Tensor) -> bool:
    """Whether the heads that are stored are repeated one after another to become those that are attended to.

    Raises:
        ValueError: several are stored, and it is not known which becomes which.
    """
    heads, made = stored.shape[1], attended.shape[1]
    if heads in (1, made):
        return False
    if stored.shape[3] == attended.shape[3] and torch.equal(stored.repeat(1, made // heads, 1, 1), attended):
        return True
    raise ValueError(f"it makes {made} KV heads of {heads} that are stored, and it is not known which of which")


def _scaling(handed: Handed) -> float:
    scaling = handed.options.get("scaling")
    return handed.query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _plain_attention(handed: Handed) -> torch.Tensor:
    """(B, n, H, D_v): what scaling, soft-capping, sinks and a softmax over all keys make of what was handed over."""
    shared = handed.query.shape[1] // handed.keys.shape[1]
    keys, values = (part.float().repeat_interleave(shared, dim=1) for part in (handed.keys, handed.values))
    sinks = handed.options.get("s_aux")
    logits = soft_capped(
        handed.query.float() @ keys.transpose(-1, -2) * _scaling(handed), handed.options.get("softcap")
    )
    weights = softmax_with_sinks(logits, None if sinks is None else sinks.float().reshape(-1, 1, 1))
    return (weights @ values).to(handed.query.dtype).transpose(1, 2).contiguous()


def _check_logits(module: nn.Module, handed: Handed) -> None:
    """Raises ValueError if the module's own attention function in plain torch gives something else."""
    function = eager_function(module)
    if function is None:
        return
    # In 16 bits what large logits round to would hide what is compared.
    handed = handed.in_float32()
    options = {**handed.options, "dropout": 0.0, "scaling": _scaling(handed)}
    # Some of these functions need a mask.
    nothing_hidden = handed.query.new_zeros(1, 1, handed.query.shape[2], handed.keys.shape[2])
    try:
        own = function(module, handed.query, handed.keys, handed.values, nothing_hidden, **options)[0]
    except _ERRORS as error:
        raise ValueError(f"its attention function could not be tried: {_words(error)}") from error
    expected = _plain_attention(handed)
    if own.shape != expected.shape or not _agree(own, expected):
        raise ValueError("its attention is not a softmax of scaled queries times keys")


def _rebuilt(
    module: nn.Module, rotary: Rotary, made_up: _MadeUp, queries: torch.Tensor
) -> tuple[Rebuilder | None, bool]:
    """The parts of which the module's queries (B, H, n, D) can be rebuilt, if so, and whether they pair halves."""
    try:
        parts = Rebuilder(module)
        unrotated = parts.project("q", made_up.hidden_states)
        rebuilt = parts.rotate(unrotated, made_up.positions.factors)
    except _ERRORS:
        return None, False
    if rebuilt.shape != queries.shape or not _agree(rebuilt, queries):
        return None, False
    return parts, _pairs_halves(rotary, unrotated, rebuilt, made_up.positions.factors)


def _pairs_halves(rotary: Rotary, states: torch.Tensor, rotated: torch.Tensor, factors: Factors) -> bool:
    cos_and_sin = rotary.cos_and_sin(factors)
    if cos_and_sin is None:
        return False
    cos, sin = (factor[:, -1:] for factor in cos_and_sin)
    if cos.shape[-1] % 2 or cos.shape[-1] > states.shape[-1]:
        return False
    no_step = torch.ones_like(cos[0]).float(), torch.zeros_like(cos[0]).float()
    last = states[:, :, -1:]
    turned, _ = rotate_queries(last, last, cos, sin, *no_step, backend="torch")
    return _agree(turned, rotated[:, :, -1:])


def _rotation_of(module: nn.Module, rotary: Rotary, made_up: _MadeUp, queries: torch.Tensor) -> Rotation | None:
    """The layout with which unrotated queries become the module's."""
    positions = made_up.positions
    neutral = positions.with_factors(rotary.neutral(positions.factors))
    unrotated = ask(module, made_up.hidden_states, neutral).query
    factors = positions.factors if not isinstance(positions.factors, tuple) else rotary.cos_and_sin(positions.factors)
    for layout in LAYOUTS:
        with contextlib.suppress(*_ERRORS):
            turned = layout(unrotated, factors)
            if turned.shape == queries.shape and _agree(turned, queries):
                return layout
    return None


def _of_keys(module: nn.Module, rotary: Rotary, made_up: _MadeUp) -> Facts:
    """Facts of a module that computes attention by itself: its keys tell whether its parts are understood.

    Queries are made like keys in every decoder with a standard projection.
    """
    for name, reason in (("sinks", "attention sinks"), ("attn_logit_softcapping", "logit soft-capping")):
        if getattr(module, name, None) is not None:
            raise ValueError(f"it looks up no attention function, and it has {reason} ({name})")
    try:
        parts = Rebuilder(module)
        scaling = float(module.scaling)  # type: ignore[arg-type]
        unrotated = parts.project("k", made_up.hidden_states)
        rebuilt = parts.rotate(unrotated, made_up.positions.factors)
        expected = keys_given(module, made_up.hidden_states, made_up.positions)
        queries = parts.project("q", made_up.hidden_states)
    except _ERRORS as error:
        raise ValueError(
            f"it looks up no attention function, and its keys could not be rebuilt: {_words(error)}"
        ) from error
    if expected.shape != rebuilt.shape or not _agree(expected, rebuilt):
        raise ValueError(
            "it looks up no attention function, and its keys are not its k_proj, norm and apply_rotary_pos_emb in a row"
        )
    if queries.shape[1] % expected.shape[1]:
        raise ValueError(f"q_proj gives {queries.shape[1]} heads, for {expected.shape[1]} KV heads")
    return Facts(True, _pairs_halves(rotary, unrotated, rebuilt, made_up.positions.factors), None, scaling)


def _device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are when it runs."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    relative, absolute = (1e-3, 1e-4) if expected.dtype.itemsize >= 4 else (0.05, 0.01)
    # Rotation leaves small numbers of large ones, with the rounding of these.
    largest = max(float(expected.abs().max()), 1.0)
    return torch.allclose(found.float(), expected.float(), relative, absolute * largest)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
