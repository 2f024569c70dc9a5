"""Norms, gates and residuals of one row become part of the launches of the layers next to them; nothing else does."""

import pytest
import torch
from test_backend import Merging, answer
from torch import nn
from torch.nn.functional import silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import models
from mmshiftkv import decode_ahead


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "launches", "norms", "gates", "residuals"),
    # Queries, keys and values, the output, gate and up, down: four launches in each of three layers, and the logits.
    # Two norms, a gate and two residuals in each layer.  The norm in front of the head, those of heads, and those
    # behind the layers stay.
    [
        ("llama", 13, 6, 3, 6),
        ("mistral", 13, 6, 3, 6),
        ("qwen2", 13, 6, 3, 6),
        ("qwen3", 13, 6, 3, 6),
        ("mixtral", 10, 3, 0, 3),  # the router takes each token's state in a shape of its own
        ("olmo2", 13, 0, 3, 0),
        ("glm", 13, 6, 0, 6),  # one layer makes the gate and what it multiplies
        ("granite", 13, 6, 3, 0),  # multiplies before it adds
        ("gemma", 13, 0, 0, 6),  # norms by 1 + weight, and another gate
        ("starcoder2", 13, 0, 0, 0),  # norms of another kind, no gate, and dropout before it adds
        ("cohere", 13, 0, 3, 6),  # norms of another kind
    ],
)
def test_what_is_fused_of_each_family(name, launches, norms, gates, residuals):
    model, backend = models.text_model(name, **models.SUPPORTED[name]), Merging()
    assert answer(model, compile_config=backend.config()).equal(answer(model))
    assert (backend.launches, backend.left) == (launches, 0)
    assert (backend.norms, backend.gates, backend.residuals) == (norms, gates, residuals)


@pytest.mark.parametrize(("rows", "fused_parts"), [(1, (6, 3, 6)), (5, (0, 0, 0))])
def test_one_row_and_several_in_decode_ahead(rows, fused_parts):
    model, backend = models.text_model("qwen2"), Merging()
    found = answer(model, rows, compile_config=backend.config(), custom_generate=decode_ahead)
    assert found.equal(answer(model, rows))
    assert (backend.launches, backend.left) == (13, 0)
    assert (backend.norms, backend.gates, backend.residuals) == fused_parts


def fused(module, *inputs):
    """Launches of the module, and the norms, gates and residuals in them; its result is the same as before."""
    backend = Merging()
    module.requires_grad_(False)
    expected, found = module(*inputs), torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected)
    assert backend.left == 0
    return backend.launches, backend.norms, backend.gates, backend.residuals


class Around(nn.Module):
    """A function of states of 8 features, and of a norm and four layers, as they are needed."""

    def __init__(self, function, norm=LlamaRMSNorm, dtype=torch.float32):
        super().__init__()
        self.function, self.norm = function, norm(8)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.single = nn.Linear(8, 1)
        with torch.no_grad():
            for part in self.norm.parameters():
                part.uniform_(0.5, 2)
        self.to(dtype)

    def forward(self, *states):
        return self.function(self, *states)


def a_state(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (1, 1)), 8, dtype=dtype)


def block(net, state):
    state = state + net.first(net.norm(state))
    return net.third(silu(net.first(state)) * net.second(state)) + state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "fused_parts"), [((), (1, 1, 2)), ((1, 1), (1, 1, 2)), ((3,), (0, 0, 0)), ((2, 4), (0, 0, 0))]
)
def test_all_together(shape, fused_parts, dtype):
    assert fused(Around(block, dtype=dtype), torch.randn(*shape, 8, dtype=dtype)) == (3, *fused_parts)


def test_one_graph_serves_all_numbers_of_several_rows():
    net, backend = Around(block).requires_grad_(False), Merging()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for rows, launches in ((1, 3), (8, 6), (4, 6), (16, 6), (17, 6), (20, 6), (2, 6)):
        state = a_state(rows, 1)
        torch.testing.assert_close(compiled(state), net(state))
        assert (backend.launches, backend.norms, backend.gates, backend.residuals) == (launches, 1, 1, 2)


def shared(net, state):
    normed = net.norm(state)
    return net.first(normed) * net.second(normed)


def with_another_user(net, state):
    normed = net.norm(state)
    return net.first(normed) + normed.sum()


def written_in_between(net, state):
    state = state.clone()
    normed = net.norm(state)
    state.mul_(2)
    return net.first(normed) * state


def weight_made_anew(net, state):
    return net.first((2 * net.norm.weight) * (state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6)))


def of_other_states(net, state):
    wide = state.to(torch.float32)
    normed = (2 * wide) * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.first(net.norm.weight * normed.to(state.dtype))


def of_cubes(net, state):
    wide = state.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + 1e-6)
    return net.first(net.norm.weight * normed.to(state.dtype))


def over_all(net, state):
    wide = state.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean((-1, -2), keepdim=True) + 1e-6)
    return net.first(net.norm.weight * normed.to(state.dtype))


def of_a_view(net, state):
    return net.first(net.norm(state.expand(3, 1, 8)))


def with_one_weight(net, state):
    return net.first(net.single.bias * (net.norm(state) / net.norm.weight))


def other_layer_is_left(net, state):
    normed = net.norm(state)
    return net.first(normed) * nn.functional.linear(normed, net.second.weight.T)


@pytest.mark.parametrize(
    ("function", "norm", "launches", "norms"),
    [
        (shared, LlamaRMSNorm, 1, 1),
        (shared, GemmaRMSNorm, 1, 0),
        (shared, nn.LayerNorm, 1, 0),
        (shared, nn.RMSNorm, 1, 0),
        (with_another_user, LlamaRMSNorm, 1, 0),
        (written_in_between, LlamaRMSNorm, 1, 0),
        (weight_made_anew, LlamaRMSNorm, 1, 0),
        (of_other_states, LlamaRMSNorm, 1, 0),
        (of_cubes, LlamaRMSNorm, 1, 0),
        (over_all, LlamaRMSNorm, 1, 0),
        (of_a_view, LlamaRMSNorm, 1, 0),
        (with_one_weight, LlamaRMSNorm, 1, 0),
    ],
)
def test_norms(function, norm, launches, norms):
    found = fused(Around(function, norm), a_state())
    assert found[:3] == (launches, norms, 0)


def test_a_norm_that_another_layer_needs_too_is_left():
    net, backend = Around(other_layer_is_left).requires_grad_(False), Merging()
    state = a_state()
    torch.testing.assert_close(torch.compile(net, backend=backend, fullgraph=True)(state), net(state))
    assert (backend.launches, backend.left, backend.norms) == (1, 1, 0)


def test_a_norm_of_another_dtype_is_left():
    net = Around(lambda net, state: net.first(net.norm(state).to(torch.bfloat16)), dtype=torch.bfloat16)
    net.norm.float()
    assert fused(net, a_state(dtype=torch.bfloat16)) == (1, 0, 0, 0)


def gate_after_write(net, state):
    state = state.clone()
    gate, other = net.first(state), net.second(state)
    state.mul_(2)
    return silu(gate) * other + state


def kept_gate(net, state):
    gate = net.first(state)
    return silu(gate) * net.second(state) - gate


def kept_activation(net, state):
    activated = silu(net.first(state))
    return activated * net.second(state) - activated


@pytest.mark.parametrize(
    ("function", "launches", "gates"),
    [
        (lambda net, state: silu(net.first(state)) * net.second(state), 1, 1),
        (lambda net, state: net.first(state) * silu(net.second(state)), 1, 1),
        (lambda net, state: nn.SiLU()(net.first(state)) * net.second(state), 1, 1),
        (gate_after_write, 1, 1),
        (kept_gate, 1, 0),
        (kept_activation, 1, 0),
        (lambda net, state: silu(net.first(state), inplace=True) * net.second(state), 2, 0),
        (lambda net, state: nn.functional.gelu(net.first(state)) * net.second(state), 1, 0),
        (lambda net, state: silu(net.first(state)) + net.second(state), 1, 0),
        (lambda net, state: silu(net.first(state)) * net.single(state), 1, 0),
        (lambda net, state: silu(net.first(state)) * net.second(state) - net.third(state), 1, 0),
        (lambda net, state: silu(net.first(state)) * net.second(2 * state), 2, 0),
        (lambda net, state: silu(net.first(state)) * silu(net.second(state)), 1, 0),
    ],
)
def test_gates(function, launches, gates):
    assert fused(Around(function), a_state())[:3] == (launches, 0, gates)


def later_residual(net, state):
    output = net.first(state)
    return output + 2 * state


def residual_after_write(net, state):
    state = state.clone()
    output = net.first(state)
    state.mul_(2)
    return state + output


def kept_output(net, state):
    output = net.first(state)
    return (state + output) * output


@pytest.mark.parametrize(
    ("function", "launches", "residuals"),
    [
        (lambda net, state: state + net.first(state), 1, 1),
        (lambda net, state: net.first(state) + state, 1, 1),
        (later_residual, 1, 1),
        (lambda net, state: net.first(state) + net.second(2 * state), 2, 1),
        (lambda net, state: net.first(net.second(state) + state) + state, 2, 2),
        (lambda net, state: net.first(state) + net.second(state), 1, 0),
        (residual_after_write, 1, 0),
        (kept_output, 1, 0),
        (lambda net, state: net.first(state) + 1.5, 1, 0),
        (lambda net, state: net.first(state) + net.norm.weight, 1, 0),
        (lambda net, state: state + net.single(state), 1, 0),
        (lambda net, state: state.double() + net.first(state), 1, 0),
        (lambda net, state: torch.add(state, net.first(state), alpha=2), 1, 0),
        (lambda net, state: (output := net.first(state)) + output, 1, 0),
        (lambda net, state: state.clone().add_(net.first(state)), 1, 0),
        (lambda net, state: net.first(state) + state.expand(4, 1, 8), 1, 0),
        (lambda net, state: net.first(state) + torch.cat([state, state], -1)[..., ::2], 1, 0),
    ],
)
def test_residuals(function, launches, residuals):
    launched, _, _, found = fused(Around(function), a_state())
    assert (launched, found) == (launches, residuals)


def test_a_residual_of_another_row_count_is_left():
    """Of one row, added to several."""
    net = Around(lambda net, state, other: net.first(state) + other)
    assert fused(net, a_state(3, 1), a_state(1, 1)) == (1, 0, 0, 0)


def test_more_than_sixteen_rows_are_left_alone():
    net, backend = Around(block).requires_grad_(False), Merging()
    torch.compile(net, backend=backend, fullgraph=True)(a_state(17))
    assert (backend.launches, backend.norms, backend.gates, backend.residuals) == (0, 0, 0, 0)
