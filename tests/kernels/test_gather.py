import pytest
import torch

from shiftkv_kernels import gather, reference


def inputs(device, batch=2, kv_heads=3, tokens=30, head_dim=40, value_dim=24, count=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator).to(device, dtype)
    values = torch.randn(batch, kv_heads, tokens, value_dim, generator=generator).to(device, dtype)
    indices = torch.randint(0, tokens, (batch, kv_heads, count), generator=generator).sort(-1).values
    return keys, values, indices.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 16, 17, 30])
def test_rows_are_copied(count, dtype, device):
    keys, values, indices = inputs(device, count=count, dtype=dtype)
    for found, wanted in zip(
        gather(keys, values, indices, backend="triton"), reference.gather(keys, values, indices), strict=True
    ):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)


def test_capacity_leaves_room_behind(device):
    keys, values, indices = inputs(device)
    found = gather(keys, values, indices, capacity=33, backend="triton")
    for part, wanted in zip(found, reference.gather(keys, values, indices), strict=True):
        assert part.shape[2] == 33
        assert torch.equal(part[:, :, :20], wanted)


def test_any_strides(device):
    keys, values, indices = inputs(device)
    expected = reference.gather(keys, values, indices)
    for order in ((0, 2, 1, 3), (3, 2, 1, 0)):
        back = tuple(torch.tensor(order).argsort().tolist())
        layout = [part.permute(order).contiguous().permute(back) for part in (keys, values)]
        swapped = indices.transpose(1, 2).contiguous().transpose(1, 2)
        for found, wanted in zip(gather(*layout, swapped, backend="triton"), expected, strict=True):
            assert torch.equal(found, wanted)


def test_offsets_beyond_32_bits(device):
    # Memory that is never touched costs nothing.
    stride = 2**30
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=device)
    keys = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    keys.copy_(torch.arange(48).view(1, 1, 3, 16))
    kept, _ = gather(keys, keys, torch.tensor([[[0, 2]]], device=device), backend="triton")
    assert torch.equal(kept, keys[:, :, ::2])
