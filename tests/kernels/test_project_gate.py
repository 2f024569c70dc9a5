"""What the launches of projections do besides: norms of the states, residuals, and gates."""

import pytest
import torch

from shiftkv_kernels import MOST_ROWS, project_gate, project_token, reference

DTYPES, EPS = (torch.float32, torch.bfloat16, torch.float16), 1e-5
# Outputs and biases; what is added goes to a single layer, and only two of one shape are a gate and what it multiplies.
THREE, ONE, PAIR = [(28, True), (4, False), (5, True)], [(37, True)], [(37, True), (37, False)]
KINDS = {
    "norm": (THREE, True, False),
    "norm, more than a launch takes": ([(3, True), (2, False), (6, True), (1, True), (5, False)], True, False),
    "residual": (ONE, False, True),
    "norm and residual": (ONE, True, True),
    "gate": (PAIR, False, False),
    "norm and gate": (PAIR, True, False),
    "single outputs": ([(1, False), (1, True)], True, False),
    "outputs of several tiles": ([(97, False), (97, True)], True, False),
}


class Problem:
    """Inputs of one of the two operations: a gate where there are two layers of one shape."""

    def __init__(self, kind, features, dtype, device, shape=(1, 1)):
        layers, has_norm, has_residual = KINDS[kind]
        generator = torch.Generator().manual_seed(features)

        def random(*size):
            return torch.randn(size, generator=generator).to(device, dtype)

        self.is_gate = len(layers) == 2
        self.state = 3 * random(*shape, features)
        self.weights = [random(outputs, features) for outputs, _ in layers]
        self.biases = [random(outputs) if has_bias else None for outputs, has_bias in layers]
        self.norm = (random(features), EPS) if has_norm else None
        self.residual = 5 * random(*shape, layers[0][0]) if has_residual else None

    def changed(self, change):
        """The same with other numbers, or a part of them."""
        twin = object.__new__(Problem)
        twin.is_gate, twin.state = self.is_gate, change(self.state)
        twin.weights = [change(part) for part in self.weights]
        twin.biases = [None if part is None else change(part) for part in self.biases]
        twin.norm = None if self.norm is None else (change(self.norm[0]), self.norm[1])
        twin.residual = None if self.residual is None else change(self.residual)
        return twin

    def of_row(self, row):
        """The same for one row alone."""
        twin = self.changed(lambda part: part)
        twin.state = self.state[row]
        twin.residual = None if self.residual is None else self.residual[row]
        return twin

    def solve(self, module=None, **options):
        """The outputs, those of a gate as a list of one."""
        given = self.state, self.weights, self.biases, self.norm
        if self.is_gate:
            return [(module.project_gate if module else project_gate)(*given, **options)]
        return (module.project_token if module else project_token)(*given, self.residual, **options)

    def layers(self):
        """The outputs of the layers alone."""
        return reference.project_token(self.state, self.weights, self.biases, self.norm)

    def rounding(self):
        """What rounding of the outputs comes to, by output: of each step in the dtype, and of sums by their terms.

        The interpreter cuts bfloat16 off instead of rounding, so an error may be a whole unit in the last place.
        """
        eps, exact = torch.finfo(self.state.dtype).eps, self.changed(torch.Tensor.double)
        sizes = self.changed(lambda part: part.double().abs()).layers()
        errors = [eps * part.abs() + 2**-22 * size for part, size in zip(exact.layers(), sizes, strict=True)]
        outputs = exact.solve(reference)
        if self.is_gate:
            (gate, up), activated = exact.layers(), torch.nn.functional.silu(exact.layers()[0])
            # The slope of SiLU is at most 1.1, and its own value is rounded too.
            inner = (1.1 * errors[0] + eps * activated.abs()) * up.abs() + activated.abs() * errors[1]
            errors = [inner + 2**-20 * (gate * up).abs()]
        return [error + eps * output.abs() for error, output in zip(errors, outputs, strict=True)]


def check(problem):
    """At most twice the reference's error, and what rounding comes to."""
    found, expected = problem.solve(backend="triton"), problem.solve(reference)
    wanted = problem.changed(torch.Tensor.double).solve(reference)
    for mine, theirs, exact, rounding in zip(found, expected, wanted, problem.rounding(), strict=True):
        assert mine.dtype == problem.state.dtype
        assert mine.shape == theirs.shape
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm() + rounding.norm()


def takes(kind, dtype):
    """The kernels take no norm of float16."""
    return not KINDS[kind][1] or dtype != torch.float16


CASES = [(kind, dtype) for kind in KINDS for dtype in DTYPES if takes(kind, dtype)]


@pytest.mark.parametrize("features", [1, 40, 1025])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_one_row_is_the_reference(kind, dtype, features, device):
    check(Problem(kind, features, dtype, device))


# Triton's interpreter multiplies no bfloat16.
@pytest.mark.parametrize(("shape", "features"), [((2, 1), 1), ((3,), 129), ((MOST_ROWS, 1), 40)])
@pytest.mark.parametrize(("kind", "dtype"), [case for case in CASES if case[1] != torch.bfloat16])
def test_several_rows_are_the_reference(kind, dtype, shape, features, device):
    check(Problem(kind, features, dtype, device, shape))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "features"), [((1, 1), 3584), ((2, 1), 3584), ((8,), 3583), ((MOST_ROWS, 1), 129)])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_dtype_is_the_reference(kind, dtype, shape, features):
    check(Problem(kind, features, dtype, torch.device("cuda"), shape))


def assert_each_row_is_what_it_gives_alone(problem):
    """Up to the rounding of either; the tiles of several rows round the state times the norm's weight besides."""
    dtype = problem.state.dtype
    slack = 4 if problem.norm is not None and dtype != torch.float32 else 2
    together, rounding = problem.solve(backend="triton"), problem.rounding()
    for row in range(len(problem.state)):
        for mine, wanted, error in zip(together, problem.of_row(row).solve(backend="triton"), rounding, strict=True):
            assert (mine[row] - wanted).double().norm() <= slack * error[row].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_gives_alone(kind, device):
    assert_each_row_is_what_it_gives_alone(Problem(kind, 150, torch.float32, device, (4, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_each_row_of_every_dtype_is_what_it_gives_alone(kind, dtype):
    assert_each_row_is_what_it_gives_alone(Problem(kind, 3584, dtype, torch.device("cuda"), (5, 1)))


def test_a_norm_takes_states_of_any_size(device):
    """Each row is divided by its own size, up to epsilon; rows that are not there count for none."""
    problem = Problem("norm", 100, torch.float32, device, (3, 1))
    problem.norm = problem.norm[0], 0.0
    sizes = torch.tensor([1e-15, 1.0, 1e15], device=device)[:, None, None]
    expected = problem.solve(backend="triton")
    problem.state = problem.state * sizes
    for mine, wanted in zip(problem.solve(backend="triton"), expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_epsilon_keeps_a_state_of_zeros(rows, device):
    problem = Problem("norm", 40, torch.float32, device, (rows, 1))
    problem.state.zero_()
    for mine, bias in zip(problem.solve(backend="triton"), problem.biases, strict=True):
        assert mine.equal(torch.zeros_like(mine) if bias is None else bias.expand_as(mine))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["norm and residual", "norm and gate"])
def test_parts_of_larger_tensors(kind, rows, device):
    """Addresses need not be those that an allocation starts with; what lies around is not read."""

    def part(tensor):
        wide = torch.full((tensor.numel() + 2,), torch.nan, device=device)
        return wide[1:-1].copy_(tensor.flatten()).view(tensor.shape)

    check(Problem(kind, 100, torch.float32, device, (rows, 1)).changed(part))


@pytest.mark.parametrize("rows", [1, 3])
def test_large_gates_are_open_or_closed(rows, device):
    """SiLU of -200 is less than any float, not NaN."""
    state, up = torch.ones(rows, 1, device=device), torch.full((3, 1), 2.0, device=device)
    gate = torch.tensor([[-200.0], [0.0], [200.0]], device=device)
    found = project_gate(state, [gate, up], [None, None], backend="triton")
    assert found.tolist() == rows * [[0, 0, 400]]


def test_infinity_and_nan_in_a_state_stay_in_its_row(device):
    problem = Problem("norm and gate", 50, torch.float32, device, (4, 1))
    (expected,) = problem.solve(backend="triton")
    problem.state[1, 0, 7], problem.state[3, 0, 49] = torch.inf, torch.nan
    (found,) = problem.solve(backend="triton")
    assert found[[0, 2]].equal(expected[[0, 2]])
    assert found[[1, 3]].isnan().all()
