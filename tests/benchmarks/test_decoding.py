from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from benchmarks.speed import decoding
from benchmarks.speed.decoding import (
    CacheKind,
    Measurement,
    Turn,
    decode_ahead_kind,
    dynamic_kind,
    random_prompt,
    schedule,
    shiftkv_kind,
    static_kind,
)
from benchmarks.speed.memory import out_of_memory
from benchmarks.speed.random_models import random_model

SMALL = {"lengths": [12], "new_tokens": 6, "repeats": 1}


@pytest.fixture(scope="module")
def model():
    made = random_model("tiny", torch.device("cpu"), torch.float32)
    made.generation_config = GenerationConfig()
    return made


def measured(model, kinds, **settings):
    """All rows, by name and prompt length."""
    settings = {"batches": [1], **SMALL} | settings
    batches = list(decoding.measure(model, kinds, **settings))
    return {(row.cache, row.tokens): row for rows in batches for row in rows}


def test_a_kind_of_ones_own_takes_turns_with_the_others(model):
    ahead = decode_ahead_kind(shiftkv_kind(model, 4))
    rows = measured(model, [dynamic_kind(model), ahead], repeats=2)
    assert list(rows) == [("DynamicCache", 12), ("ShiftKVCache, budget 4, decode_ahead", 12)]
    row = rows["ShiftKVCache, budget 4, decode_ahead", 12]
    assert 0 < row.fastest <= row.milliseconds <= row.slowest
    assert row.tokens_per_second == pytest.approx(1e3 / row.milliseconds)


def test_another_number_of_tokens_is_an_error(model):
    def too_short(model, input_ids, stopping_criteria, **kwargs):
        for _ in range(5):
            input_ids = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
            stopping_criteria(input_ids, None)
        return input_ids

    short = CacheKind("short", dynamic_kind(model).make_cache, {"custom_generate": too_short})
    with pytest.raises(RuntimeError, match="short: 5 tokens and 5 checks whether to stop, not 6"):
        measured(model, [short])


def test_tokens_that_end_a_text_do_not_end_it(tiny):
    model, _ = tiny
    asked = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=list(range(264)))
    try:
        # Raises if a run has another number of tokens.
        row = measured(model, [dynamic_kind(model)], new_tokens=9)["DynamicCache", 12]
    finally:
        model.generation_config = asked
    assert row.cache_bytes == 2 * 6 * 2 * 32 * 4 * (12 + 8)


def test_what_does_not_fit_is_said_and_the_rest_is_measured(model, capsys):
    plain = dynamic_kind(model)

    def make_cache(tokens, new):
        if tokens == 24:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.\nand more")
        return plain.make_cache(tokens, new)

    rows = measured(model, [CacheKind("large", make_cache), plain], lengths=[12, 24, 36], repeats=2)
    assert [key for key, row in rows.items() if row.error] == [("large", 24)]
    failed = rows["large", 24]
    assert failed.error == "out of memory"
    assert failed.milliseconds is failed.cache_bytes is failed.tokens_per_second is None
    assert all(row.milliseconds > 0 for row in rows.values() if not row.error)
    assert capsys.readouterr().err.count("large, 1 x 24: CUDA out of memory. Tried to allocate 40.00 GiB.\n") == 1


def test_a_large_batch_that_runs_out_of_memory_while_it_is_compiled_does_not_end_the_run(model, capsys):
    def too_large(graph, inputs):
        if any(torch.is_tensor(one) and one.dtype == torch.long and one.shape[:1] == (7,) for one in inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")
        return graph

    compiling = CompileConfig(backend=too_large, mode=None)
    compiling._compile_all_devices = True
    plain, failing = dynamic_kind(model), replace(static_kind(model), generate={"compile_config": compiling})
    # outlines, which snippets of the documents import, has errors of a backend passed over in the whole process.
    with torch._dynamo.config.patch(suppress_errors=False):
        rows = [row for rows in decoding.measure(model, [plain, failing], **SMALL, batches=[2, 7]) for row in rows]
    assert [(row.batch, row.cache, row.error) for row in rows] == [
        (2, "DynamicCache", None),
        (2, "StaticCache", None),
        (7, "DynamicCache", None),
        (7, "StaticCache", "out of memory"),
    ]
    assert capsys.readouterr().err.count("StaticCache, 7 x 12: ") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"), "CUDA out of memory. Tried"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("a fault"), None),
        (ValueError("not the words: out of memory"), None),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error, reason):
    found = out_of_memory(error)
    assert found is None if reason is None else reason in found and "\n" not in found


def test_other_errors_are_not_hidden(model):
    def make_cache(tokens, new):
        if tokens == 24:
            raise RuntimeError("a fault")
        return dynamic_kind(model).make_cache(tokens, new)

    with pytest.raises(RuntimeError, match="a fault"):
        measured(model, [CacheKind("faulty", make_cache)], lengths=[12, 24])


def turns_of(found, name):
    return [(turn.tokens, turn.measured, turn.starts_anew) for turn in found if turn.kind.name == name]


def test_what_is_compiled_has_the_lengths_in_a_row_and_the_others_take_turns():
    dynamic, shift = CacheKind("dynamic", None), CacheKind("shift", None)
    static = CacheKind("static", None, compiled_by_length=True)
    turns = list(schedule([dynamic, static, shift], {"static", "shift"}, [10, 20], 2))
    first, again = [(10, False), (10, True), (10, True)], [(20, False), (20, True), (20, True)]
    assert turns_of(turns, "static") == [(*one, not one[1]) for one in first + again]
    assert turns_of(turns, "shift") == [(*one, one == (10, False)) for one in first + again]
    names = [turn.kind.name for turn in turns]
    assert names.index("shift") > max(place for place, name in enumerate(names) if name == "static")
    # One of the two measured runs at each length while StaticCache has its turns, and one while ShiftKVCache has.
    half = names.index("shift")
    assert turns_of(turns[:half], "dynamic") == [
        (10, False, False),
        (10, True, False),
        (20, False, False),
        (20, True, False),
    ]
    assert turns_of(turns[half:], "dynamic") == [(10, True, False), (20, True, False)]


def test_what_decode_ahead_runs_is_compiled_anew():
    small, large = CacheKind("small", None), CacheKind("large", None)
    kinds = [kind for plain in (small, large) for kind in (plain, decode_ahead_kind(plain))]
    turns = list(schedule(kinds, {kind.name for kind in kinds}, [10, 20], 1))
    for place, kind in enumerate(kinds):
        assert turns[4 * place : 4 * place + 4] == [
            Turn(kind, 10, False, starts_anew=True),
            Turn(kind, 10, True),
            Turn(kind, 20, False),
            Turn(kind, 20, True),
        ]


def test_without_compilation_all_take_turns_run_by_run():
    one, two = CacheKind("one", None), CacheKind("two", None)
    turns = list(schedule([one, two], set(), [10, 20], 1))
    assert turns == [Turn(kind, tokens, run) for tokens in (10, 20) for run in (False, True) for kind in (one, two)]


def test_one_compilation_serves_shiftkv_at_all_lengths_and_static_needs_one_at_each(model):
    compiling = CompileConfig(backend="eager", mode=None)  # counts graphs, and takes no compiler
    compiling._compile_all_devices = True
    kinds = [
        replace(kind, generate={"compile_config": compiling}) for kind in (static_kind(model), shiftkv_kind(model, 4))
    ]
    kinds.append(decode_ahead_kind(kinds[-1]))
    measurement = Measurement(model, kinds, 2, [12, 20, 28], 6)
    for turn in schedule(kinds, {kind.name for kind in kinds}, [12, 20, 28], 1):
        measurement.run(turn)
    rows = measurement.rows()
    graphs = [[row.graphs for row in rows if row.cache == kind.name] for kind in kinds]
    assert graphs == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert not any(row.graphs_while_measured or row.cudagraph_skips for row in rows)


def test_prompts_are_text_and_the_same_every_time(tiny):
    model, _ = tiny
    ids = random_prompt(model, 3, 400)
    assert ids.shape == (3, 400)
    assert ids.equal(random_prompt(model, 3, 400))
    # The others from 256 end a text, or start, stand for or end an image.
    assert sorted(set(ids.flatten().tolist()) & set(range(256, 264))) == [257, 261]
    assert not ids[0].equal(ids[1])
