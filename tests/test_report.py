import torch

import models
from mmshiftkv import ShiftKVCache
from mmshiftkv.report import format_bytes


def test_the_report_counts_tokens_and_bytes():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=6, max_new_tokens=2)
    with torch.no_grad():
        model(models.prompt_ids(2), past_key_values=cache, use_cache=True)
        model(models.prompt_ids(2, 1), past_key_values=cache, use_cache=True)
    report = cache.report()
    token = 2 * 2 * 16 * 4 * 2  # rows, KV heads, head dim, bytes, keys and values
    assert (report.tokens_seen, report.tokens_stored) == (41, 7)
    assert [layer.bytes_stored for layer in report.layers] == [8 * token] * 3
    assert report.bytes_stored == 3 * 8 * token
    assert report.bytes_full == 3 * 41 * token
    assert report.bytes_saved == 3 * 33 * token


def test_the_report_prints_as_a_table():
    model = models.text_model()
    cache = ShiftKVCache(model, budget=6)
    with torch.no_grad():
        model(models.prompt_ids(), past_key_values=cache, use_cache=True)
    assert str(cache.report()).splitlines() == [
        "layer  seen  stored    bytes  full cache",
        "    0    40       6  1.5 KiB    10.0 KiB",
        "    1    40       6  1.5 KiB    10.0 KiB",
        "    2    40       6  1.5 KiB    10.0 KiB",
        "  all    40       6  4.5 KiB    30.0 KiB",
    ]


def test_bytes_are_written_in_the_unit_that_fits():
    assert [format_bytes(count) for count in (0, 1023, 1024, 5 << 20, 7 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "7.00 GiB",
    ]
