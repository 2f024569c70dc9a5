"""Recordings of runs, with launches that are made on a CPU: Python functions that get addresses, as kernels do."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiftkv_kernels.replaying import Replays, report_launch
from shiftkv_kernels.workspace import Workspace

SIZE = 6


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: a recording sees whoever writes to what has been allocated."""


def numbers(place):
    """The numbers at a tensor or an address."""
    address = place if isinstance(place, int) else place.data_ptr()
    return np.ctypeslib.as_array((ctypes.c_float * SIZE).from_address(address))


def add_scaled(left, right, result, scale):
    numbers(result)[:] = numbers(left) + scale * numbers(right)


def launch(*arguments):
    add_scaled(*arguments)
    report_launch(add_scaled, arguments)


class Counted:
    """2 a + 3 b of rows a and b, by way of memory of its own; counts how often Python was run for it."""

    def __init__(self):
        self.calls = 0
        self.replays = Replays()

    def __call__(self, a, b, more=lambda result: result, key="key"):
        def function():
            self.calls += 1
            between = a.new_empty(3, SIZE)
            result = torch.empty(SIZE)
            launch(a, b, between[1], 3.0)
            launch(between[1], a, result, 1.0)
            return more(result), None

        found, nothing = self.replays.run(function, (a, b, None), key)
        assert nothing is None
        return found


def rows():
    return torch.randn(SIZE), torch.randn(SIZE)


def test_launches_alone_give_the_same_for_other_tensors():
    counted, kept = Counted(), []
    for _ in range(4):
        a, b = rows()
        kept.append((counted(a, b), 2 * a + 3 * b))
    assert counted.calls == 1
    # Each result has memory of its own.
    for found, expected in kept:
        torch.testing.assert_close(found, expected)


def test_parts_of_an_input_are_read_where_they_are():
    replays = Replays()
    for _ in range(3):
        both = torch.randn(2, SIZE)

        def function(both=both):
            result = torch.empty(SIZE)
            launch(both[0], both[1], result, 1.0)
            return (result,)

        (found,) = replays.run(function, (both,), "key")
        torch.testing.assert_close(found, both.sum(dim=0))


def test_a_run_within_a_run_is_a_part_of_it():
    inner, outer = Counted(), Counted()
    inner(*rows())
    for _ in range(3):
        a, b = rows()

        def twice(result, a=a, b=b):
            launch(result, inner(a, b), result, 1.0)
            return result

        torch.testing.assert_close(outer(a, b, more=twice), 4 * a + 6 * b)
    assert (inner.calls, outer.calls) == (2, 1)


@pytest.mark.parametrize("change", ["shape", "stride", "alignment", "key"])
def test_what_looks_otherwise_is_run_anew(change):
    counted = Counted()
    counted(*rows())
    a, b = rows()
    if change == "shape":
        a = torch.randn(2, SIZE)
    elif change == "stride":
        a = torch.randn(2 * SIZE)[::2]
    elif change == "alignment":
        a = torch.randn(SIZE + 1)[1:]
    counted(a, b, key="other" if change == "key" else "key")
    assert counted.calls == 2


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(lambda result: result.sin(), id="an operation of torch"),
        pytest.param(lambda result: result * 2, id="what an operation gave as the result"),
        pytest.param(lambda result: result.mul_(1), id="an operation in place"),
        pytest.param(lambda result: result[:3], id="a part as the result"),
        pytest.param(lambda result: report_launch(None, ()) or result, id="a launch that cannot be repeated"),
    ],
)
def test_what_cannot_be_repeated_is_run_each_time(more):
    counted = Counted()
    for _ in range(3):
        a, b = rows()
        torch.testing.assert_close(counted(a, b, more), more(2 * a + 3 * b))
    assert counted.calls == 3


def test_a_tensor_from_elsewhere_is_not_written_down():
    elsewhere, replays, calls = torch.randn(SIZE), Replays(), []

    def function(a):
        calls.append(a)
        result = torch.empty(SIZE)
        launch(a, elsewhere, result, 1.0)
        return (result,)

    for _ in range(2):
        a = torch.randn(SIZE)
        (found,) = replays.run(lambda a=a: function(a), (a,), "key")
        torch.testing.assert_close(found, a + elsewhere)
    assert len(calls) == 2


class Normed(torch.nn.Module):
    """A norm, as models write it."""

    def __init__(self, features):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(features))

    def forward(self, states):
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(states.dtype)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers_and_norms_are_called_again_with_other_weights(has_bias, mode):
    """What they read lies in an input, in memory of the run, and in what another gave."""
    replays, calls = Replays(), []
    with mode():
        check_linear_layers(replays, calls, has_bias)
    assert len(calls) == 1


def check_linear_layers(replays, calls, has_bias):
    for _ in range(3):
        layer, norm = torch.nn.Linear(SIZE, 2 * SIZE, bias=has_bias), Normed(SIZE)
        a, b = rows()

        def function(layer=layer, norm=norm, a=a, b=b):
            calls.append(layer)
            states, result = a.new_empty(1, 2, SIZE), torch.empty(SIZE)
            launch(a, b, states[0, 0], 1.0)
            launch(a, b, states[0, 1], -1.0)
            heads = norm(layer(states).unflatten(-1, (2, SIZE))).transpose(1, 2)
            launch(heads[0, 0, 1], heads[0, 1, 0], result, 3.0)
            return (result,)

        weights = (layer.weight, layer.bias, norm.weight)
        (found,) = replays.run(function, (a, b, *weights), "key")
        heads = norm(layer(torch.stack([a + b, a - b])).view(2, 2, SIZE)).transpose(0, 1)
        torch.testing.assert_close(found, heads[0, 1] + 3 * heads[1, 0])


@torch.no_grad()
def test_weights_that_are_no_inputs_are_not_written_down():
    replays = Replays()
    for _ in range(3):
        layer, (a, b) = torch.nn.Linear(SIZE, SIZE), rows()

        def function(layer=layer, a=a, b=b):
            result = torch.empty(SIZE)
            launch(layer(a[None])[0], b, result, 1.0)
            return (result,)

        (found,) = replays.run(function, (a, b), "key")
        torch.testing.assert_close(found, layer(a) + b)


def scaled(a, b, replays, scale, calls, passed=lambda scale: scale):
    def function():
        calls.append(scale)
        result = torch.empty(SIZE)
        arguments = (a, b, result, passed(scale))
        add_scaled(*arguments)
        report_launch(add_scaled, arguments, ("p_left", "p_right", "p_result", "scale"))
        return (result,)

    return replays.run(function, (a, b), "key", {"scale": scale})[0]


def test_numbers_of_a_run_are_passed_to_the_parameters_of_their_names():
    replays, calls = Replays(), []
    for scale in (2.0, 5.0, -1.0):
        a, b = rows()
        torch.testing.assert_close(scaled(a, b, replays, scale, calls), a + scale * b)
    assert len(calls) == 1


def test_numbers_that_are_changed_on_their_way_are_not_replaced():
    replays, calls = Replays(), []
    for scale in (2.0, 5.0, -1.0):
        a, b = rows()
        found = scaled(a, b, replays, scale, calls, lambda scale: 2 * scale)
        torch.testing.assert_close(found, a + 2 * scale * b)
    assert len(calls) == 3


def test_a_result_may_be_an_input():
    replays, calls = Replays(), []
    for _ in range(3):
        a, b = rows()
        out = torch.empty(SIZE)

        def function(a=a, b=b, out=out):
            calls.append(out)
            launch(a, b, out, 1.0)
            return (out,)

        (found,) = replays.run(function, (a, b, out), "key")
        assert found is out
        torch.testing.assert_close(found, a + b)
    assert len(calls) == 1


@given(
    lives=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 2000)), min_size=1, max_size=12),
)
def test_tensors_share_memory_only_if_one_is_used_after_the_other(lives):
    """And no more is needed than for all side by side."""
    made = [torch.empty(size, dtype=torch.uint8) for _, _, size in lives]
    uses = [
        [part for part, (one, other, _) in zip(made, lives, strict=True) if step in (one, other)] for step in range(10)
    ]
    workspace = Workspace((), made, uses)
    places = [workspace.find(part) for part in made]
    for index, (place, (one, other, size)) in enumerate(zip(places, lives, strict=True)):
        assert place.offset % 256 == 0
        assert place.offset + size <= workspace.bytes
        for later in range(index + 1, len(lives)):
            first, last, length = *sorted(lives[later][:2]), lives[later][2]
            if min(one, other) <= last and first <= max(one, other):
                start = places[later].offset
                assert start >= place.offset + size or place.offset >= start + length
    assert workspace.bytes <= sum(-(size // -256) * 256 for _, _, size in lives)


def test_one_tensor_as_two_inputs_is_not_taken_for_two_tensors():
    counted, (a, b) = Counted(), rows()
    torch.testing.assert_close(counted(a, a), 5 * a)
    torch.testing.assert_close(counted(a, b), 2 * a + 3 * b)


def test_an_error_leaves_nothing_behind():
    counted = Counted()

    def fail(result):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        counted(*rows(), fail)
    a, b = rows()
    torch.testing.assert_close(counted(a, b), 2 * a + 3 * b)
    assert counted.calls == 2
