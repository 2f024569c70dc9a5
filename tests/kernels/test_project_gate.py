"""What the launches of projections of one row do besides: norms of the state, residuals, and gates."""

import pytest
import torch

from shiftkv_kernels import project_gate, project_token, reference

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

    def __init__(self, kind, features, dtype, device):
        layers, has_norm, has_residual = KINDS[kind]
        generator = torch.Generator().manual_seed(features)

        def random(*size):
            return torch.randn(size, generator=generator).to(device, dtype)

        self.is_gate = len(layers) == 2
        self.state = 3 * random(1, 1, features)
        self.weights = [random(outputs, features) for outputs, _ in layers]
        self.biases = [random(outputs) if has_bias else None for outputs, has_bias in layers]
        self.norm = (random(features), EPS) if has_norm else None
        self.residual = 5 * random(1, 1, layers[0][0]) if has_residual else None

    def changed(self, change):
        """The same with other numbers, or a part of them."""
        twin = object.__new__(Problem)
        twin.is_gate, twin.state = self.is_gate, change(self.state)
        twin.weights = [change(part) for part in self.weights]
        twin.biases = [None if part is None else change(part) for part in self.biases]
        twin.norm = None if self.norm is None else (change(self.norm[0]), self.norm[1])
        twin.residual = None if self.residual is None else change(self.residual)
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


@pytest.mark.parametrize("features", [1, 40, 1025])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_reference(kind, dtype, features, device):
    check(Problem(kind, features, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("features", [3583, 18944])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_states_are_the_reference(kind, dtype, features):
    check(Problem(kind, features, dtype, torch.device("cuda")))


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_a_norm_takes_states_of_any_size(size, device):
    """The state is divided by its own size, up to epsilon."""
    problem = Problem("norm", 100, torch.float32, device)
    problem.norm = problem.norm[0], 0.0
    expected = problem.solve(backend="triton")
    problem.state = problem.state * size
    for mine, wanted in zip(problem.solve(backend="triton"), expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_a_norm_of_float16_takes_products_beyond_its_range(device):
    """What a state is times the norm's weight may be too large for the dtype before it is divided."""
    state, weight = (torch.full((1, 64), value, dtype=torch.float16, device=device) for value in (6e4, 8.0))
    (found,) = project_token(state, [torch.eye(64).to(weight)], [None], (weight[0], EPS), backend="triton")
    torch.testing.assert_close(found, torch.full_like(found, 8.0))


def test_epsilon_keeps_a_state_of_zeros(device):
    problem = Problem("norm", 40, torch.float32, device)
    problem.state.zero_()
    for mine, bias in zip(problem.solve(backend="triton"), problem.biases, strict=True):
        assert mine.equal(torch.zeros_like(mine) if bias is None else bias.expand_as(mine))


@pytest.mark.parametrize("kind", ["norm and residual", "norm and gate"])
def test_parts_of_larger_tensors(kind, device):
    """Addresses need not be those that an allocation starts with; what lies around is not read."""

    def part(tensor):
        wide = torch.full((tensor.numel() + 2,), torch.nan, device=device)
        return wide[1:-1].copy_(tensor.flatten()).view(tensor.shape)

    check(Problem(kind, 100, torch.float32, device).changed(part))


def test_large_gates_are_open_or_closed(device):
    """SiLU of -200 is less than any float, not NaN."""
    state, up = torch.ones(1, 1, device=device), torch.full((3, 1), 2.0, device=device)
    gate = torch.tensor([[-200.0], [0.0], [200.0]], device=device)
    assert project_gate(state, [gate, up], [None, None], backend="triton").tolist() == [[0, 0, 400]]


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(number, device):
    problem = Problem("norm and gate", 50, torch.float32, device)
    problem.state[..., 7] = number
    (found,) = problem.solve(backend="triton")
    assert found.isnan().all()
