import pytest
import torch

from shiftkv_kernels import MOST_ROWS, project_token, reference

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
# Several rows take 64 outputs at once, and 64 features of float32 or 128.  Each: the shape in front of the features,
# layers, and features.
SEVERAL = [
    ((2, 1), LAYERS["queries, keys, values"], 1),
    ((3, 1), [(130, False), (64, True), (65, False)], 128),
    ((3,), [(5, True)], 40),
    ((8,), LAYERS["more than a launch takes"], 129),
    ((16, 1), [(63, False), (1, True)], 200),
]
# Those of Qwen2.5-VL-7B, and features of no full tile.
SEVERAL_LARGE = [
    ((2, 1), [(3584, True), (512, True), (512, True)], 3584),
    ((3,), [(18944, False), (18944, False)], 3584),
    ((8, 1), [(3584, False)], 18944),
    ((16, 1), [(1000, True), (77, False)], 3583),
]


def inputs(device, layers, features, dtype, shape=(1, 1)):
    generator = torch.Generator().manual_seed(features)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    weights = [random(outputs, features) for outputs, _ in layers]
    return random(*shape, features), weights, [random(outputs) if has_bias else None for outputs, has_bias in layers]


def exact(state, weights, biases, change=torch.Tensor.double):
    biases = [None if part is None else change(part) for part in biases]
    return reference.project_token(change(state), [change(part) for part in weights], biases)


def check(arguments, dtype):
    """At most twice the reference's error, and what rounding comes to: once in the dtype, and of a sum by its terms.

    The interpreter cuts bfloat16 off instead of rounding, so an error may be a whole unit in the last place.
    """
    found, expected = project_token(*arguments, backend="triton"), reference.project_token(*arguments)
    terms = exact(*arguments, change=lambda part: part.double().abs())
    for mine, theirs, wanted, size in zip(found, expected, exact(*arguments), terms, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == theirs.shape
        rounding = torch.finfo(dtype).eps * wanted.norm() + 2**-24 * size.norm()
        assert (mine - wanted).norm() <= 2 * (theirs - wanted).norm() + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 40, 512, 1025, 3584])
@pytest.mark.parametrize("layers", LAYERS)
def test_is_the_reference(layers, features, dtype, device):
    check(inputs(device, LAYERS[layers], features, dtype), dtype)


# Triton's interpreter multiplies no bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "layers", "features"), SEVERAL)
def test_several_rows_are_the_reference(shape, layers, features, dtype, device):
    check(inputs(device, layers, features, dtype, shape), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layers", "features"), SEVERAL + SEVERAL_LARGE)
def test_several_rows_of_every_dtype_are_the_reference(shape, layers, features, dtype):
    check(inputs(torch.device("cuda"), layers, features, dtype, shape), dtype)


def assert_each_row_is_what_it_gives_alone(arguments, dtype):
    """Up to two roundings in the dtype, and those of float32 sums in another order, which matrix units cut off."""
    state, *layers = arguments
    together = project_token(state, *layers, backend="triton")
    terms = exact(*arguments, change=lambda part: part.double().abs())
    for row in range(state.shape[0]):
        alone = project_token(state[row], *layers, backend="triton")
        for mine, wanted, size in zip(together, alone, terms, strict=True):
            allowed = torch.finfo(dtype).eps * wanted.double().abs() + 2**-20 * size[row]
            assert ((mine[row].double() - wanted.double()).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [2, MOST_ROWS])
def test_each_row_is_what_it_gives_alone(rows, device):
    arguments = inputs(device, [(65, True), (4, False)], 70, torch.float32, (rows, 1))
    assert_each_row_is_what_it_gives_alone(arguments, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_of_every_dtype_is_what_it_gives_alone(dtype):
    arguments = inputs(torch.device("cuda"), [(3584, True), (512, False)], 3584, dtype, (5, 1))
    assert_each_row_is_what_it_gives_alone(arguments, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4,), (2, 3), (4, 1, 4)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_number_of_dimensions(shape, backend, device):
    state, weights, biases = inputs(device, LAYERS["two"], 33, torch.float32, shape)
    for found, (outputs, _) in zip(project_token(state, weights, biases, backend=backend), LAYERS["two"], strict=True):
        assert found.shape == (*shape, outputs)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_part_of_a_larger_state(rows, device):
    """Addresses need not be those that an allocation starts with."""
    state, weights, biases = inputs(device, LAYERS["two"], 100, torch.float32, (rows,))
    wide = torch.full((2 + rows, 101), torch.nan, device=device).flatten()
    part = wide[101 : 101 + 100 * rows].view(rows, 100)
    part.copy_(state)
    for found, wanted in zip(
        project_token(part, weights, biases, backend="triton"), exact(part, weights, biases), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_infinity_and_nan_in_weights_stay_in_their_outputs(rows, device):
    state, weights, biases = inputs(device, [(5, True), (3, False)], 50, torch.float32, (rows, 1))
    weights[0][1, 3], weights[0][3, 7], biases[0][4] = torch.inf, torch.nan, torch.inf
    found = project_token(state, weights, biases, backend="triton")
    assert found[0].isinf().flatten().tolist() == [False, True, False, False, True] * rows
    assert found[0].isnan().flatten().tolist() == [False, False, False, True, False] * rows
    assert found[1].isfinite().all()


def test_infinity_and_nan_in_a_state_stay_in_its_row(device):
    state, weights, biases = inputs(device, LAYERS["two"], 50, torch.float32, (4, 1))
    expected = project_token(state, weights, biases, backend="triton")
    state[1, 0, 7], state[3, 0, 49] = torch.inf, torch.nan
    for mine, wanted in zip(project_token(state, weights, biases, backend="triton"), expected, strict=True):
        assert mine[[0, 2]].equal(wanted[[0, 2]])
        assert mine[1].isinf().all()
        assert mine[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_weights_beyond_32_bits(rows):
    outputs, features = 2**21 + 3, 1024
    weight = torch.zeros(outputs, features, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 1
    (found,) = project_token(torch.ones(rows, features, dtype=torch.bfloat16, device="cuda"), [weight], [None])
    assert found[:, -1].eq(features).all()
    assert not found[:, :-1].any()
