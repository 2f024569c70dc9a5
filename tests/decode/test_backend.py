"""`decoding_backend` joins the linear layers of one token of each row, leaves others alone, and changes no token."""

import operator
import shutil
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from transformers import CompileConfig

import models
from mmshiftkv import ShiftKVCache, decode_ahead, decoding_backend
from mmshiftkv.decode.backend import merge_projections

NEW_TOKENS = 25
PROJECT, GATE = torch.ops.mmshiftkv.project_token.default, torch.ops.mmshiftkv.project_gate.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Merging:
    """A backend that merges and then runs what Dynamo traced as it is; it counts the layers and launches.

    Of norms, gates, and sums it counts those that are gone.
    """

    def __init__(self):
        self.layers, self.launches, self.left = 0, 0, 0
        self.norms, self.gates, self.residuals = 0, 0, 0

    def __call__(self, graph_module, example_inputs):
        before = Counter(node.target for node in graph_module.graph.nodes)
        merge_projections(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        after = Counter(node.target for node in graph_module.graph.nodes)
        self.layers += before[linear]
        self.launches += after[PROJECT] + after[GATE]
        self.left += after[linear]
        norms, sums = (before[target] - after[target] for target in (torch.rsqrt, operator.add))
        self.norms += norms
        self.gates += before[silu] - after[silu]
        self.residuals += sums - norms  # a norm adds its epsilon
        return graph_module

    def config(self):
        # A config is copied with its backend, and of all that can be called only functions stay the same.
        config = CompileConfig(backend=lambda *inputs: self(*inputs), mode=None, fullgraph=True)
        config._compile_all_devices = True
        return config


def answer(model, rows=1, **options):
    cache = ShiftKVCache(model, budget=9, max_new_tokens=NEW_TOKENS)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(models.prompt_ids(rows), past_key_values=cache, **options)


@pytest.mark.parametrize(("rows", "launches", "left"), [(2, 13, 0), (16, 13, 0), (17, 0, 22)])
def test_up_to_sixteen_rows(rows, launches, left):
    model, backend = models.text_model(), Merging()
    assert answer(model, rows, compile_config=backend.config()).equal(answer(model, rows))
    assert (backend.layers, backend.launches, backend.left) == (22, launches, left)


def test_image_prompts(vision_case):
    for family in ("qwen2_5_vl", "vicuna"):
        case, backend = vision_case(family), Merging()
        answers = []
        for options in ({}, {"compile_config": backend.config()}):
            cache = ShiftKVCache(case.model, budget=24, max_new_tokens=8)
            options = {"max_new_tokens": 8, "do_sample": False, **options}
            answers.append(case.model.generate(**case.prompts(1), past_key_values=cache, **options))
        assert answers[0].equal(answers[1])
        layers = case.model.config.get_text_config().num_hidden_layers
        assert (backend.launches, backend.left) == (4 * layers + 1, 0)


class Layers(nn.Module):
    """Seven linear layers, five of the same input."""

    def __init__(self):
        super().__init__()
        self.same = nn.ModuleList(nn.Linear(8, outputs, bias=outputs % 2 == 0) for outputs in (3, 4, 1, 6, 5))
        self.after = nn.Linear(19, 8)
        self.last = nn.Linear(8, 2, bias=False)

    def forward(self, state):
        return self.last(state + self.after(torch.cat([layer(state) for layer in self.same], dim=-1)))


def merged(module, *inputs):
    """Launches of the module, layers left, and its result, which is the same as before."""
    backend = Merging()
    with torch.no_grad():
        found = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, module(*inputs))
    return backend.launches, backend.left


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (3, 8), (16, 1, 8), (2, 4, 8)])
def test_any_number_of_layers(shape):
    assert merged(Layers(), torch.randn(shape)) == (3, 0)


def test_one_graph_serves_all_numbers_of_several_rows():
    layers, backend = Layers(), Merging()
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    # The second number of rows makes it a symbol.
    for rows, launches, left in (
        (1, 3, 0),
        (8, 6, 0),
        (4, 6, 0),
        (16, 6, 0),
        (2, 6, 0),
        (17, 6, 7),
        (20, 6, 7),
        (3, 6, 7),
    ):
        state = torch.randn(rows, 1, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(state), layers(state))
        assert (backend.launches, backend.left) == (launches, left)


class Scaled(nn.Linear):
    """A layer whose weights are made anew at each call."""

    def forward(self, state):
        return linear(state, 2 * self.weight, self.bias)


class Transposed(nn.Linear):
    """A layer whose weights are stored the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous().T)


class Half(nn.Linear):
    """A layer under autocast."""

    def forward(self, state):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(state)


@pytest.mark.parametrize("layer", [Scaled, Transposed, Half])
def test_weights_that_are_not_used_as_they_are_stored_are_left_alone(layer):
    assert merged(layer(8, 4), torch.randn(1, 8)) == (0, 1)


@pytest.mark.parametrize("rows", [(17,), (2, 9), (0,)])
def test_no_row_and_many_are_left_alone(rows):
    assert merged(nn.Linear(8, 4), torch.randn(*rows, 8)) == (0, 1)


def set_first(state):
    state[..., 0] = 3


@torch.library.custom_op("test_projections::double", mutates_args=("state",))
def custom_operation(state: torch.Tensor) -> None:
    state.mul_(2)


@torch._dynamo.allow_in_graph
def opaque_function(state):
    return state.mul_(2)


class Changing(nn.Module):
    """Two layers of one state that is changed in place between them."""

    def __init__(self, change):
        super().__init__()
        self.change, self.first, self.second = change, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, state):
        state = state - 1
        before = self.first(state)
        self.change(state)
        return before, self.second(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.mul_(2),
        lambda state: state.view(-1).neg_(),
        lambda state: operator.iadd(state, 1),
        set_first,
        torch.relu_,
        lambda state: nn.functional.relu(state, inplace=True),
        lambda state: nn.functional.relu(state, True),
        lambda state: torch.mul(state, 2, out=state),
        lambda state: nn.functional.batch_norm(
            torch.cat([state, 2 * state]), state[0], state[0].abs(), training=True, momentum=1.0
        ),
        torch.ops.aten.mul_.Tensor,
        torch.ops.test_projections.double,
        custom_operation,
        opaque_function,
        lambda state: checkpoint(lambda part: part.mul_(2), state, use_reentrant=False),
    ],
)
def test_a_state_that_changes_in_between_is_read_before_and_after(change):
    more = (torch.tensor(2.0),) if change is torch.ops.aten.mul_.Tensor else ()
    assert merged(Changing(lambda state: change(state, *more)), torch.randn(1, 8)) == (2, 0)


def test_where_gradients_are_wanted_layers_are_left_alone():
    backend, layer, state = Merging(), nn.Linear(8, 4), torch.randn(1, 8)
    found = torch.compile(layer, backend=backend, fullgraph=True)(state)
    assert (backend.launches, backend.left) == (0, 1)
    found.sum().backward()
    assert layer.weight.grad.equal(state.expand(4, -1))


def test_weights_of_several_parts_are_left_alone():
    """As quantized and distributed ones are."""
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()), requires_grad=False)
    backend = Merging()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(1, 8))
    assert (backend.launches, backend.left) == (0, 1)


def test_weights_of_embeddings_may_be_shared():
    model = models.text_model(tie_word_embeddings=True)
    backend = Merging()
    assert answer(model, compile_config=backend.config()).equal(answer(model))
    assert backend.launches == 13


@pytest.mark.parametrize("rows", [1, 3])
def test_the_operations_are_what_the_compiler_takes_them_for(rows):
    state, weights, biases = torch.randn(rows, 1, 8), [torch.randn(5, 8), torch.randn(3, 8)], [None, torch.randn(3)]
    torch.library.opcheck(PROJECT, (state, weights, biases, None, 0.0, None))
    for norm in ((None, 0.0), (torch.randn(8), 1e-5)) if rows == 1 else ():
        torch.library.opcheck(PROJECT, (state, weights, biases, *norm, None))
        torch.library.opcheck(PROJECT, (state, weights[:1], [None], *norm, torch.randn(1, 1, 5)))
        torch.library.opcheck(GATE, (state, [weights[1], 2 * weights[1]], biases, *norm))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler for a CPU")
def test_compiled_for_a_cpu():
    model = models.text_model("qwen2")
    config = CompileConfig(backend=decoding_backend, mode=None)
    config._compile_all_devices = True
    expected = answer(model)
    for loop in ({}, {"custom_generate": decode_ahead}):
        assert answer(model, compile_config=config, **loop).equal(expected)
