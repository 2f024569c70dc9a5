import pytest
import torch

from shiftkv_kernels import attend_token, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "GQA 7": (14, 2), "MQA": (4, 1)}


def inputs(device, heads, slots, head_dim, dtype, rows=2, value_dim=None):
    generator = torch.Generator().manual_seed(slots)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    query, kv_heads = random(rows, 1, heads[0], head_dim).transpose(1, 2), heads[1]
    return query, random(rows, kv_heads, slots, head_dim), random(rows, kv_heads, slots, value_dim or head_dim)


def shown_slots(device, rows, slots):
    """Of each row another part, the first slot always."""
    mask = torch.rand(rows, 1, 1, slots, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    return mask.to(device)


def exact(query, keys, values, mask, scale):
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference.attend_token(query.double(), keys.double(), values.double(), mask, scale)


def check(arguments, dtype):
    """At most twice the reference's error, and what rounding comes to.

    The interpreter cuts bfloat16 off instead of rounding, so an error may be a whole unit in the last place.
    """
    found, expected = attend_token(*arguments, backend="triton"), reference.attend_token(*arguments)
    wanted = exact(*arguments)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    rounding = (torch.finfo(dtype).eps + 2**-20) * wanted.norm()
    assert (found - wanted).norm() <= 2 * (expected - wanted).norm() + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 64, 65, 200])
@pytest.mark.parametrize("heads", HEADS)
def test_is_the_reference(heads, slots, dtype, device):
    arguments = inputs(device, HEADS[heads], slots, 40, dtype)
    check((*arguments, shown_slots(device, 2, slots), 0.3), dtype)


def test_many_slots(device):
    arguments = inputs(device, HEADS["MQA"], 1023, 40, torch.float16, rows=1)
    check((*arguments, shown_slots(device, 1, 1023), 0.3), torch.float16)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 256])
def test_head_dims(head_dim, device):
    arguments = inputs(device, HEADS["GQA"], 100, head_dim, torch.bfloat16, rows=1)
    check((*arguments, shown_slots(device, 1, 100), head_dim**-0.5), torch.bfloat16)


def test_values_of_another_dimension(device):
    check((*inputs(device, HEADS["GQA"], 70, 48, torch.float32, value_dim=24), None, 0.2), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_of_mask", [1, 2])
def test_masks_that_are_added(rows_of_mask, dtype, device):
    shown = shown_slots(device, rows_of_mask, 150)
    mask = torch.where(shown, 0.5, torch.finfo(dtype).min).to(dtype)
    check((*inputs(device, HEADS["GQA"], 150, 16, dtype), mask, 0.25), dtype)


def test_one_mask_for_all_rows_and_none(device):
    arguments = inputs(device, HEADS["GQA"], 90, 16, torch.float32)
    check((*arguments, shown_slots(device, 1, 90), 0.25), torch.float32)
    check((*arguments, None, 0.25), torch.float32)


def test_hidden_slots_are_not_read(device):
    query, keys, values = inputs(device, HEADS["GQA"], 130, 16, torch.float32)
    mask = shown_slots(device, 1, 130)
    expected = attend_token(query, keys, values, mask, 0.25, backend="triton")
    for part in (keys, values):
        part[:, :, ~mask.flatten()] = torch.nan
    assert attend_token(query, keys, values, mask, 0.25, backend="triton").equal(expected)


def test_parts_of_a_larger_storage(device):
    query, keys, values = inputs(device, HEADS["GQA"], 200, 16, torch.float32)
    arguments = query, keys[:, :, 3:90], values[:, :, 3:90], shown_slots(device, 2, 87), 0.25
    torch.testing.assert_close(
        attend_token(*arguments, backend="triton").double(), exact(*arguments), atol=1e-5, rtol=1e-5
    )
