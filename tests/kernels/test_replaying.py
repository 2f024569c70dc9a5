"""Recordings of launches, with launches that are made on a CPU: Python functions that get addresses, as kernels do."""

import ctypes

import numpy as np
import pytest
import torch

from shiftkv_kernels.replaying import Replays, report_launch

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
        pytest.param(lambda result: result + 0, id="an operation of torch"),
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


def test_an_error_leaves_nothing_behind():
    counted = Counted()

    def fail(result):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        counted(*rows(), fail)
    a, b = rows()
    torch.testing.assert_close(counted(a, b), 2 * a + 3 * b)
    assert counted.calls == 2
