import pytest
import torch

from shiftkv_kernels import project_token, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Outputs of each layer, and whether it has a bias.
LAYERS = {
    "one": [(5, False)],
    "bias": [(7, True)],
    "two": [(9, False), (4, True)],
    "queries, keys, values": [(28, True), (4, True), (4, True)],
    "single outputs": [(1, False), (1, True), (3, False)],
    "more than a launch takes": [(3, True), (2, False), (6, True), (1, True), (5, False), (2, True), (4, False)],
}


def inputs(device, layers, features, dtype, shape=(1, 1)):
    generator = torch.Generator().manual_seed(features)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    weights = [random(outputs, features) for outputs, _ in layers]
    return random(*shape, features), weights, [random(outputs) if has_bias else None for outputs, has_bias in layers]


def exact(state, weights, biases, change=torch.Tensor.double):
    biases = [None if part is None else change(part) for part in biases]
    return reference.project_token(change(state), [change(part) for part in weights], biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 2, 40, 1000, 1024, 1025, 3584])
@pytest.mark.parametrize("layers", LAYERS)
def test_is_the_reference(layers, features, dtype, device):
    """At most twice its error, and what rounding comes to: once in the dtype, and of a float32 sum by its terms.

    The interpreter cuts bfloat16 off instead of rounding, so an error may be a whole unit in the last place.
    """
    arguments = inputs(device, LAYERS[layers], features, dtype)
    found, expected = project_token(*arguments, backend="triton"), reference.project_token(*arguments)
    terms = exact(*arguments, change=lambda part: part.double().abs())
    for mine, theirs, wanted, size in zip(found, expected, exact(*arguments), terms, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == theirs.shape
        rounding = torch.finfo(dtype).eps * wanted.norm() + 2**-24 * size.norm()
        assert (mine - wanted).norm() <= 2 * (theirs - wanted).norm() + rounding


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_number_of_dimensions(shape, backend, device):
    state, weights, biases = inputs(device, LAYERS["two"], 33, torch.float32, shape)
    for found, (outputs, _) in zip(project_token(state, weights, biases, backend=backend), LAYERS["two"], strict=True):
        assert found.shape == (*shape, outputs)


def test_a_part_of_a_larger_state(device):
    """Addresses need not be those that an allocation starts with."""
    state, weights, biases = inputs(device, LAYERS["two"], 100, torch.float32)
    wide = torch.full((303,), torch.nan, device=device)
    part = wide[101:201]
    part.copy_(state.flatten())
    for found, wanted in zip(
        project_token(part, weights, biases, backend="triton"), exact(part, weights, biases), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_infinity_and_nan_stay_in_their_rows(device):
    state, weights, biases = inputs(device, LAYERS["one"], 50, torch.float32)
    weights[0][1, 3], weights[0][3, 7] = torch.inf, torch.nan
    (found,) = project_token(state, weights, biases, backend="triton")
    assert found.isfinite().flatten().tolist() == [True, False, True, False, True]
    assert found.isinf().flatten().tolist() == [False, True, False, False, False]


@pytest.mark.gpu
def test_weights_beyond_32_bits():
    outputs, features = 2**21 + 3, 1024
    weight = torch.zeros(outputs, features, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 1
    (found,) = project_token(torch.ones(features, dtype=torch.bfloat16, device="cuda"), [weight], [None])
    assert found[-1] == features
    assert not found[:-1].any()
