import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import fresh_process, speed_and_memory
from benchmarks.speed.checking import compare
from benchmarks.speed.compilations import CompilationCounter, Compilations

TESTS = Path(__file__).parents[1]
SMALL = ["--random-weights", "tiny", "--device", "cpu", "--lengths", "20", "40", "--new-tokens", "6"]
SETTINGS = {
    "model": None,
    "random_weights": "tiny",
    "dtype": "float32",
    "attn": "sdpa",
    "caches": ["dynamic", "static", "shiftkv"],
    "loops": ["generate", "decode_ahead"],
    "budgets": [8],
    "lengths": [20, 40],
    "new_tokens": 6,
    "cold_start": True,
    "device": "cpu",
    "count": 6,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file that one run writes, of DynamicCache in one new process."""
    path = tmp_path_factory.mktemp("starts") / "starts.json"
    asked = ["--cold-start", "--prompts-of-different-length", "5", "--caches", "dynamic"]
    speed_and_memory.main([*SMALL, *asked, "--json", str(path)])
    return path


def test_a_cold_start_and_prompts_are_measured_in_a_process_of_their_own(written, capsys):
    record = json.loads(written.read_text(encoding="utf-8"))
    assert record["settings"] == {
        "model": "tiny, random weights",
        "dtype": "float32",
        "attention": "sdpa",
        "lengths": [20, 40],
        "budgets": [64],
        "caches": ["dynamic"],
        "new_tokens": 6,
        "repeats": 1,
        "prompts": 5,
    }
    assert record["environment"]["torch"] == torch.__version__
    (start,) = record["cold_starts"]
    assert start["cache"] == "DynamicCache"
    assert start["tokens"] == 40
    assert 0 < start["first_token"] < start["second_token"] == start["fastest"] == start["slowest"]
    assert start["again"] > 0
    assert (start["decoding"], start["graphs"], start["kernels"]) == ("eager", 0, 0)
    (prompts,) = record["prompts"]
    assert len(prompts["tokens"]) == len(prompts["seconds"]) == 5
    assert set(prompts["tokens"]) <= set(range(20, 41))
    assert len(set(prompts["tokens"])) > 1
    assert prompts["first"] == prompts["seconds"][0]
    assert prompts["slowest"] == max(prompts["seconds"][3:])
    assert prompts["graphs"] == prompts["kernels"] == [0] * 5
    assert prompts["compiled_later"] == 0
    speed_and_memory.main(["--read", str(written)])
    printed = capsys.readouterr().out
    assert "tiny, random weights, float32, cpu" in printed
    assert "5 prompts of 20 to 40 tokens" in printed
    assert len(re.findall(r"^DynamicCache +eager", printed, re.MULTILINE)) == 2


@pytest.mark.parametrize("cache", ["StaticCache", "ShiftKVCache, budget 8", "ShiftKVCache, budget 8, decode_ahead"])
def test_each_cache_has_its_start(cache):
    found = fresh_process.main({**SETTINGS, "cache": cache, "count": 0 if cache == "StaticCache" else 6})
    assert 0 < found["cold_start"]["first_token"] < found["cold_start"]["second_token"]
    assert ("prompts" in found) == (cache != "StaticCache")


def test_prompts_are_the_same_for_each_cache():
    settings = {**SETTINGS, "cold_start": False}
    runs = [fresh_process.main({**settings, "cache": cache}) for cache in ("DynamicCache", "ShiftKVCache, budget 8")]
    assert [list(run) for run in runs] == [["decoding", "prompts"]] * 2
    assert runs[0]["prompts"]["tokens"] == runs[1]["prompts"]["tokens"]
    assert min(len(one) for one in runs[1]["prompts"].values()) == 6


COUNT = """
from triton import knobs

from benchmarks.speed.compilations import CompilationCounter
from compile_kernels import compile_kernel
from shiftkv_kernels.fused import rotation

heard = []
knobs.compilation.listener = lambda **compilation: heard.append(compilation["cache_hit"])
counter = CompilationCounter()
sizes = {"D": 128, "ROTATED": 64, "BLOCK_N": 32, "BLOCK_HALF": 32, "BLOCK_REST": 64}
for dtype in ("bf16", "bf16", "fp32"):
    compile_kernel(rotation._rotate_kernel, sizes, dtype, 80)
    print(counter.count().kernels)
print(heard)
"""


def test_kernels_are_counted_when_triton_compiles_them_and_not_when_it_finds_them(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [TESTS.parent / name for name in ("examples", "kernels", "src", "tests/kernels")]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:4] == ["1", "1", "2", "[False, True, False]"]


def test_graphs_are_counted_also_those_for_another_size():
    torch._dynamo.reset()
    counter = CompilationCounter()
    before = counter.count()
    double = torch.compile(lambda numbers: 2 * numbers, backend="eager", dynamic=False)
    for size in (3, 3, 4):
        double(torch.ones(size))
    assert counter.count() - before == Compilations(graphs=2, kernels=0)


def test_starts_are_compared_with_their_record(written):
    record = json.loads(written.read_text(encoding="utf-8"))
    start, prompts = record["cold_starts"][0], record["prompts"][0]
    exact = {"decoding": "compiled", "graphs": 1, "second_token": 40.0, "fastest": 40.0, "slowest": 40.0}
    static, shiftkv = ({**start, **exact, "cache": cache} for cache in ("StaticCache", "ShiftKVCache, budget 8"))
    record["cold_starts"] = [start, static, shiftkv]
    record["prompts"] = [prompts, {**prompts, "cache": "ShiftKVCache, budget 8"}]
    assert compare([record], record).passed
    worse = {
        **record,
        "cold_starts": [start, static, {**shiftkv, "second_token": 50.0, "graphs": 2}],
        "prompts": [prompts, {**record["prompts"][1], "compiled_later": 1, "median": 2 * prompts["median"]}],
    }
    found = [(*change.key, change.verdict) for change in compare([worse], record).changes if change.is_worse]
    assert found == [
        ("cold start, ShiftKVCache, budget 8", "graphs compiled", "more"),
        ("cold start, ShiftKVCache, budget 8", "time to StaticCache's", "slower"),
        ("5 prompts, ShiftKVCache, budget 8", "compiled again", "more"),
        ("5 prompts, ShiftKVCache, budget 8", "time to DynamicCache's", "slower"),
    ]
    other_lengths = {**record, "settings": record["settings"] | {"lengths": [20, 50]}}
    assert compare([other_lengths], record).changes == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts-of-different-length", "3"], "--prompts-of-different-length 3: the first 3 are not counted"),
        (["--cold-start", "--batches", "8"], "--batches goes without --cold-start"),
        (["--cold-start", "--selection", "--tiny"], "--selection goes without --cold-start"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed_and_memory.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_will_not_do_is_named_before_a_process_is_started(tmp_path):
    with pytest.raises(SystemExit, match=rf"\Aerror: .*{tmp_path}.*\Z") as stopped:
        speed_and_memory.main(["--model", str(tmp_path), "--device", "cpu", "--cold-start"])
    assert "\n" not in str(stopped.value)
    with pytest.raises(SystemExit, match=r"with 32 new tokens \[8192\] are more than the model's 8192 positions"):
        speed_and_memory.main(["--device", "cpu", "--cold-start", "--lengths", "20", "8192"])
