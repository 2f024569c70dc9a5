import pytest
import torch

from benchmarks.speed.selection import GAMMA, LAST_QUERY_WEIGHT, MASS, RIDGE, STEPS, TINY, Layer
from mmshiftkv import ShiftKVConfig, refit_values, select_tokens
from mmshiftkv.methods.config import PRESETS


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer(TINY, 2, 40, torch.device("cpu"), torch.float32, "torch")


@pytest.mark.parametrize("method", STEPS)
def test_the_steps_that_are_timed_keep_what_a_selection_keeps(layer, method):
    layer.select(method)
    scored = {"num_groups": TINY.groups, "mass": MASS}
    if method != "published":
        scored = {"values": layer.values, "last_query_weight": LAST_QUERY_WEIGHT}
    expected = select_tokens(layer.proxies, layer.last, layer.keys, budget=TINY.budget, **scored)
    assert layer.indices.equal(expected)
    columns = expected[..., None].expand(-1, -1, -1, TINY.head_dim)
    for kept, whole in zip(layer.stored, (layer.keys, layer.values), strict=True):
        assert kept.equal(whole.gather(2, columns))


def test_the_refit_that_is_timed_is_that_of_heads_without_a_sink(layer):
    layer.select("values, refitted")
    queries = layer.proxies[:, :, : TINY.refitted_to]
    refitted = refit_values(queries, layer.keys, layer.values, layer.indices, ridge=RIDGE)
    has_sink = layer.has_sink[..., None, None]
    assert not layer.has_sink.all()
    torch.testing.assert_close(layer.refitted, torch.where(has_sink, layer.stored[1], refitted))
    assert not layer.refitted.equal(layer.stored[1])


def test_its_settings_are_those_of_the_cache():
    published = ShiftKVConfig(budget=64)
    assert (published.mass, published.gamma) == (MASS, GAMMA)
    counting = ShiftKVConfig(budget=64, **PRESETS["value-aware"])
    assert (counting.last_query_weight, counting.refit_ridge) == (LAST_QUERY_WEIGHT, RIDGE)
