import pytest

import models
from mmshiftkv import ShiftKVCache, ShiftKVConfig
from mmshiftkv.checks import tokens_to_keep

NAN = float("nan")


def test_published_settings_of_the_families(vision_case):
    qwen = ShiftKVConfig.for_model(vision_case("qwen2_5_vl").model, budget=64)
    assert (qwen.num_proxies, qwen.num_groups, qwen.stats_window, qwen.gamma, qwen.last_token_layers) == (
        512,
        32,
        None,
        10.0,
        0,
    )
    for family in ("vicuna", "mistral"):
        llava = ShiftKVConfig.for_model(vision_case(family).model, budget=64)
        assert (llava.num_proxies, llava.num_groups, llava.stats_window, llava.gamma, llava.last_token_layers) == (
            512,
            16,
            512,
            10.0,
            2,
        )
    assert ShiftKVConfig.for_model(models.text_model(), budget=64) == ShiftKVConfig(budget=64)


def test_keywords_override_the_family_and_a_config_is_taken_as_it_is(vision_case):
    model = vision_case("vicuna").model
    assert ShiftKVCache(model, budget=8, num_groups=8).config == ShiftKVConfig.for_model(model, budget=8, num_groups=8)
    config = ShiftKVConfig(budget=0.1, seed=7, max_new_tokens=256)
    assert ShiftKVCache(model, config).config is config


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 0}, ValueError, r"budget=0 must be an int >= 1 .* or a float in \(0, 1\]"),
        ({"budget": -3}, ValueError, "budget=-3"),
        ({"budget": NAN}, ValueError, "budget=nan"),
        ({"budget": 1.5}, ValueError, "budget=1.5"),
        ({"budget": 0.0}, ValueError, "budget=0.0"),
        ({"budget": True}, TypeError, "budget=True"),
        ({"budget": "64"}, TypeError, "budget='64'"),
        ({"budget": None}, TypeError, "budget=None"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be an int >= 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens=2.0"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of 'auto', 'triton', 'torch'"),
        ({"prefill": "lazy"}, ValueError, "prefill='lazy' must be one of 'single', 'chunked'"),
        ({"num_proxies": 500}, ValueError, "num_proxies=500 must be a multiple of num_groups=32"),
        ({"num_proxies": 0}, ValueError, "num_proxies=0"),
        ({"num_groups": False}, TypeError, "num_groups=False"),
        ({"gamma": -1}, ValueError, "gamma=-1 must be a finite number >= 0"),
        ({"gamma": NAN}, ValueError, "gamma=nan"),
        ({"gamma": float("inf")}, ValueError, "gamma=inf"),
        ({"gamma": "10"}, TypeError, "gamma='10' must be a finite number >= 0, or one for each decoder layer"),
        ({"gamma": []}, ValueError, r"gamma=\[\] must be"),
        ({"gamma": [1, -2, 3]}, ValueError, r"gamma\[1\]=-2 must be a finite number >= 0"),
        ({"gamma": (1, 2, NAN)}, ValueError, r"gamma\[2\]=nan"),
        ({"gamma": [1, "2", 3]}, TypeError, r"gamma\[1\]='2'"),
        ({"gamma": [1, 2]}, ValueError, "gamma has 2 numbers, but the model has 3 decoder layers"),
        ({"gamma": [1, 2, 3, 4]}, ValueError, "gamma has 4 numbers, but the model has 3 decoder layers"),
        ({"mass": 0}, ValueError, r"mass=0 must be a number in \(0, 1\]"),
        ({"mass": 1.01}, ValueError, "mass=1.01"),
        ({"mass": NAN}, ValueError, "mass=nan"),
        ({"score": "value"}, ValueError, "score='value' must be one of 'votes', 'values'"),
        ({"score": None}, ValueError, "score=None must be one of 'votes', 'values'"),
        ({"last_query_weight": -0.5}, ValueError, "last_query_weight=-0.5 must be a finite number >= 0"),
        ({"last_query_weight": NAN}, ValueError, "last_query_weight=nan must be a finite number >= 0"),
        ({"last_query_weight": float("inf")}, ValueError, "last_query_weight=inf must be a finite number >= 0"),
        ({"last_query_weight": "4"}, TypeError, "last_query_weight='4' must be a finite number >= 0"),
        ({"last_query_weight": True}, TypeError, "last_query_weight=True must be a finite number >= 0"),
        ({"refit_queries": -1}, ValueError, "refit_queries=-1 must be an int >= 0"),
        ({"refit_queries": 64.0}, TypeError, "refit_queries=64.0 must be an int >= 0"),
        ({"refit_queries": None}, TypeError, "refit_queries=None must be an int >= 0"),
        ({"refit_ridge": 0}, ValueError, "refit_ridge=0 must be a finite number > 0"),
        ({"refit_ridge": -3.0}, ValueError, "refit_ridge=-3.0 must be a finite number > 0"),
        ({"refit_ridge": float("inf")}, ValueError, "refit_ridge=inf must be a finite number > 0"),
        ({"refit_ridge": NAN}, ValueError, "refit_ridge=nan must be a finite number > 0"),
        ({"refit_ridge": "3"}, TypeError, "refit_ridge='3' must be a finite number > 0"),
        ({"stats_window": 0}, ValueError, "stats_window=0"),
        ({"future_stride": 0}, ValueError, "future_stride=0"),
        ({"last_token_layers": -1}, ValueError, "last_token_layers=-1"),
        ({"seed": -1}, ValueError, "seed=-1 must be an int from 0 to 4294967295"),
        ({"prompt_length": 5}, ValueError, 'prompt_length=5 is only for prefill="chunked"'),
        ({"gama": 3}, TypeError, "unknown setting gama; allowed are budget, gamma"),
    ],
)
def test_bad_settings_are_named(changes, error, words):
    with pytest.raises(error, match=words):
        ShiftKVCache(models.text_model(), **{"budget": 8, **changes})


def test_a_config_and_settings_together_or_neither_are_refused():
    model = models.text_model()
    with pytest.raises(TypeError, match="config and budget were both given"):
        ShiftKVCache(model, ShiftKVConfig(budget=3), budget=4)
    with pytest.raises(TypeError, match="budget is missing"):
        ShiftKVCache(model)
    with pytest.raises(TypeError, match="must be a ShiftKVConfig"):
        ShiftKVCache(model, 64)


def test_a_preset_lies_between_the_family_and_the_settings(vision_case):
    model = vision_case("vicuna").model
    values = ShiftKVCache(model, budget=8, preset="value-aware").config
    assert (values.score, values.last_query_weight, values.refit_queries) == ("values", 4.0, 512)
    assert (values.num_groups, values.stats_window, values.last_token_layers) == (16, 512, 2)
    changed = ShiftKVConfig.for_model(model, budget=8, preset="value-aware", refit_queries=0)
    assert changed == values.replace(refit_queries=0)
    assert ShiftKVConfig.for_model(model, budget=8, preset="published") == ShiftKVConfig.for_model(model, budget=8)
    with pytest.raises(ValueError, match="preset='tiny' must be one of 'published', '"):
        ShiftKVCache(model, budget=8, preset="tiny")


def test_gamma_may_be_zero_and_mass_one():
    config = ShiftKVConfig(budget=0.5, gamma=0, mass=1)
    assert config.replace(budget=3) == ShiftKVConfig(budget=3, gamma=0, mass=1)
    with pytest.raises(ValueError, match="mass=2"):
        config.replace(mass=2)


def test_one_gamma_per_layer_is_kept_as_a_tuple():
    config = ShiftKVConfig(budget=8, gamma=[0, 2.5, 10])
    assert config.gamma == (0, 2.5, 10)
    assert hash(config) == hash(ShiftKVConfig(budget=8, gamma=(0, 2.5, 10)))
    assert config.replace(budget=3).gamma == config.gamma
    assert [config.gamma_of(layer) for layer in range(3)] == [0, 2.5, 10]
    assert ShiftKVCache(models.text_model(), config).config is config
    assert ShiftKVConfig(budget=8, gamma=3).gamma_of(7) == 3


@pytest.mark.parametrize(
    ("budget", "tokens", "kept"),
    [
        (64, 1000, 64),
        (64, 10, 10),
        (1, 1, 1),
        (1.0, 77, 77),
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (1e-9, 50, 1),
    ],
)
def test_a_share_is_rounded_up_as_written(budget, tokens, kept):
    assert tokens_to_keep(budget, tokens) == kept
