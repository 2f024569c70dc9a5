"""How a selection is launched on a CUDA device; skipped where there is none."""

import pytest
import torch

import models
from benchmarks.speed.compilations import CompilationCounter
from mmshiftkv import CACHE_ARGUMENT, PrefillSelectionCache, ShiftKVCache, ShiftKVConfig
from mmshiftkv.methods.shiftkv import ShiftKV
from mmshiftkv.side_stream import SideStream

pytestmark = [pytest.mark.gpu, models.requires_gpu]
SETTINGS = {
    "published": {},
    "values": {"preset": "value-aware", "refit_queries": 0},
    "refit": {"preset": "value-aware"},
}
BUDGET = 16


class EveryLayer(ShiftKV):
    """Is called for every layer: nothing is said of another `score`."""

    def score(self, *arguments):
        return super().score(*arguments)


def build(layers=6, model_type="qwen2"):
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return models.text_model(model_type, num_hidden_layers=layers, **sizes).to("cuda", torch.bfloat16)


def prefilled(model, ids, cache, **inputs):
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **inputs)
    return cache


def held(cache):
    return [(cache.kept_indices(index), layer.keys, layer.values) for index, layer in enumerate(cache.layers)]


def assert_same(found, expected):
    for layer, wanted in zip(held(found), held(expected), strict=True):
        for part, other in zip(layer, wanted, strict=True):
            assert torch.equal(part, other)


def config_of(settings):
    if "preset" not in settings:
        return ShiftKVConfig(budget=BUDGET)
    values = {"score": "values", "last_query_weight": 4.0, "refit_queries": 128}
    return ShiftKVConfig(budget=BUDGET, **{**values, **{name: settings[name] for name in settings if name != "preset"}})


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_repeated_launches_keep_what_every_layer_by_itself_would(name, is_padded):
    model, ids = build(), models.prompt_ids(3, 300).cuda()
    mask = torch.ones_like(ids)
    if is_padded:
        mask[1, :40] = 0
    expected = prefilled(
        model, ids, PrefillSelectionCache(model, EveryLayer(config_of(SETTINGS[name])), BUDGET), attention_mask=mask
    )
    method = ShiftKV(config_of(SETTINGS[name]))
    assert_same(prefilled(model, ids, PrefillSelectionCache(model, method, BUDGET), attention_mask=mask), expected)


class Doubled(torch.nn.Linear):
    """A projection with code of its own."""

    def forward(self, states):
        return 2 * super().forward(states)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "a layer of its own", "a hook"])
def test_what_is_repeated_is_right_for_each_projection_and_each_later_prompt(model_type):
    """Without a bias, with norms of each head and of all; all settings in turn, several prompts of one length."""
    is_special = model_type.startswith("a ")
    model = build(model_type="qwen2" if is_special else model_type)
    attention = model.model.layers[3].self_attn
    if model_type == "a layer of its own":
        projection = Doubled(256, 512, dtype=torch.bfloat16, device="cuda")
        projection.load_state_dict(attention.q_proj.state_dict())
        attention.q_proj = projection
    if model_type == "a hook":
        attention.q_proj.register_forward_hook(lambda module, args, output: 2 * output)
    for seed in range(2):
        ids = models.prompt_ids(2, 200, seed=seed).cuda()
        for settings in SETTINGS.values():
            config = config_of(settings)
            expected = prefilled(model, ids, PrefillSelectionCache(model, EveryLayer(config), BUDGET))
            assert_same(prefilled(model, ids, PrefillSelectionCache(model, ShiftKV(config), BUDGET)), expected)


@pytest.mark.parametrize("storage", [{}, {"max_new_tokens": 8}])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_selection_beside_the_model_is_that_in_its_place(name, storage, monkeypatch):
    model, ids = build(12), models.prompt_ids(2, 700).cuda()
    with monkeypatch.context() as patched:
        patched.setattr("mmshiftkv.prefill.takes_side_stream", lambda *_: False)
        expected = prefilled(model, ids, ShiftKVCache(model, budget=BUDGET, **SETTINGS[name]))
    beside, running = [], SideStream.running
    # What it is given is not kept: its memory is to be given to others.
    monkeypatch.setattr(SideStream, "running", lambda *inputs: beside.append(True) or running(*inputs))
    for _ in range(20):
        # Small models leave the device nothing to do.
        torch.cuda._sleep(20_000_000)
        found = prefilled(model, ids, ShiftKVCache(model, budget=BUDGET, **SETTINGS[name], **storage))
        for index, layer in enumerate(found.layers):
            wanted = expected.layers[index]
            assert torch.equal(found.kept_indices(index), expected.kept_indices(index))
            assert torch.equal(layer.keys[:, :, :BUDGET], wanted.keys)
            assert torch.equal(layer.values[:, :, :BUDGET], wanted.values)
        # Memory of the selection is given to others, which write to it, while the next prompt is selected from.
        del found
        torch.empty(64 * 2**20, device="cuda").fill_(torch.nan)
    assert len(beside) > 20


def test_nothing_runs_beside_a_device_that_waits_for_python():
    device, side = torch.device("cuda", 0), SideStream()
    torch.cuda.synchronize()
    assert not side.has_time(device)
    torch.cuda._sleep(100_000_000)
    assert side.has_time(device)
    torch.cuda.synchronize()
    assert not side.has_time(device)


def test_prompts_of_other_lengths_compile_nothing():
    model = build(2)
    with torch.no_grad():
        for settings in SETTINGS.values():
            prefilled(model, models.prompt_ids(1, 100).cuda(), ShiftKVCache(model, budget=BUDGET, **settings))
        counter = CompilationCounter()
        for tokens in (33, 700, 4095, 4097, 9000, 17001):
            for settings in SETTINGS.values():
                prefilled(model, models.prompt_ids(1, tokens).cuda(), ShiftKVCache(model, budget=BUDGET, **settings))
    assert counter.count().kernels == 0


def test_a_prefill_that_breaks_off_leaves_the_device_in_order():
    model, ids = build(), models.prompt_ids(1, 300).cuda()
    expected = prefilled(model, ids, ShiftKVCache(model, budget=BUDGET))
    cache = ShiftKVCache(model, budget=BUDGET)
    broken = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        prefilled(model, ids, cache)
    broken.remove()
    assert_same(prefilled(model, ids, cache), expected)
