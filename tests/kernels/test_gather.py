import pytest
import torch

from shiftkv_kernels import gather, reference


def inputs(device, batch=2, kv_heads=3, tokens=30, head_dim=40, value_dim=24, count=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator).to(device, dtype)
    values = torch.randn(batch, kv_heads, tokens, value_dim, generator=generator).to(device, dtype)
    indices = torch.randint(0, tokens, (batch, kv_heads, count), generator=generator).sort(-1).values
    return keys, values, indices.to(device)


def room_for(keys, values, slots):
    """Storage that holds NaN in every slot."""
    return tuple(part.new_full((*part.shape[:2], slots, part.shape[3]), torch.nan) for part in (keys, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 16, 17, 30])
def test_rows_are_copied(count, dtype, device):
    keys, values, indices = inputs(device, count=count, dtype=dtype)
    for found, wanted in zip(
        gather(keys, values, indices, backend="triton"), reference.gather(keys, values, indices), strict=True
    ):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spare", [0, 1, 15, 40])
@pytest.mark.parametrize("count", [1, 16, 17, 30])
def test_storage_is_filled_and_what_it_held_gives_way_to_zeros(count, spare, dtype, backend, device):
    keys, values, indices = inputs(device, count=count, dtype=dtype)
    out = room_for(keys, values, count + spare)
    found = gather(keys, values, indices, out=out, backend=backend)
    assert found[0] is out[0]
    assert found[1] is out[1]
    for stored, wanted in zip(found, reference.gather(keys, values, indices), strict=True):
        assert torch.equal(stored[:, :, :count], wanted)
        assert torch.equal(stored[:, :, count:], torch.zeros_like(stored[:, :, count:]))


def test_nothing_beside_the_storage_is_written(device):
    keys, values, indices = inputs(device)
    rows = [part.new_full((4, *part.shape[1:2], 25, part.shape[3]), torch.nan) for part in (keys, values)]
    gather(keys, values, indices, out=(rows[0][1:3], rows[1][1:3]), backend="triton")
    for part in rows:
        assert part[1:3].isfinite().all()
        assert part[[0, 3]].isnan().all()


def test_storage_can_be_filled_without_tokens(device):
    keys, values, indices = inputs(device)
    found = gather(keys, values, indices[..., :0], out=room_for(keys, values, 5), backend="triton")
    for stored in found:
        assert torch.equal(stored, torch.zeros_like(stored))


def test_any_strides(device):
    keys, values, indices = inputs(device)
    expected = reference.gather(keys, values, indices, out=room_for(keys, values, 33))
    for order in ((0, 2, 1, 3), (3, 2, 1, 0)):
        back = tuple(torch.tensor(order).argsort().tolist())
        layout = [part.permute(order).contiguous().permute(back) for part in (keys, values)]
        swapped = indices.transpose(1, 2).contiguous().transpose(1, 2)
        out = room_for(keys, values, 33)
        for found, wanted in zip(gather(*layout, swapped, out=out, backend="triton"), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(("tokens", "head_dim", "far"), [(3, 16, 2), (16, 3, 3)], ids=["tokens", "features"])
def test_offsets_beyond_32_bits(tokens, head_dim, far, device):
    # Memory that is never touched costs nothing.
    strides = [0, 0, 1, 1]
    strides[far] = 2**30
    storage = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device=device)
    keys = storage.as_strided((1, 1, tokens, head_dim), strides)
    keys.copy_(torch.arange(48).view(1, 1, tokens, head_dim))
    indices = torch.tensor([[[0, 2]]], device=device)
    kept, _ = gather(keys, keys, indices, out=room_for(keys, keys, 5), backend="triton")
    assert torch.equal(kept[:, :, :2], keys[:, :, [0, 2]])
    assert not kept[:, :, 2:].any()
