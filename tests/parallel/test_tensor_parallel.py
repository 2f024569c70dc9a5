"""Two processes that share a model, on a CPU: they give one process's tokens, and keep those that it keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import models
import tensor_parallel
from documents import BLOCKS
from parallel.cases import CASES
from tiny_llava import save_tiny_llava

WORKER = Path(__file__).with_name("worker.py")
RANKS = 2
SECONDS = 240  # more is a hang: they need about 40
_LATENTS = {
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
}
# What comes of these cases on each rank, and its message, are looked at by tests of their own.
OWN = [("heads", "report"), ("heads", "saved"), ("qwen", "closed stream"), ("too few heads", "refused")]
OWN += [key for key in CASES if key[0] == "latents"]


def write_models(folder):
    made = {
        "heads": models.text_model("llama", num_key_value_heads=4),
        "one head each": models.text_model("llama", num_key_value_heads=2),
        "too few heads": models.text_model("llama", num_key_value_heads=1),
        "sinks": models.sinks_or_capping_model("granite_swa"),
        "heads everywhere": models.sinks_or_capping_model("gpt_oss"),
        "asked": models.text_model("phi3"),
        "latents": models.text_model("deepseek_v2", **_LATENTS),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    save_tiny_llava(folder / "llava")
    (folder / "qwen").symlink_to(models.EMBEDDED_MODEL)


def launch(*arguments):
    """The finished torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(WORKER), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=SECONDS,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The torchrun of all cases."""
    done = launch(folder)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def record(folder, finished):
    """By model and case, what one process gave and what each rank did."""
    found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return {(one["model"], one["case"]): one for one in found}


def ran(record, model, case):
    """What one process gave, and what the ranks did; skips where transformers before 5.24 cannot share the model."""
    found = record[model, case]
    if found["obstacle"] is not None:
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        assert version < (5, 24), found["obstacle"]
        pytest.skip(f"transformers cannot share this model: {found['obstacle']}")
    return found["alone"], found["ranks"]


def together(ranks):
    """What all ranks keep: the heads of one behind those of the other."""
    return [torch.cat([torch.tensor(kept) for kept in layer], dim=1).tolist() for layer in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("model", "case"), [key for key in CASES if key not in OWN])
def test_the_ranks_give_what_one_process_gives(record, model, case):
    alone, ranks = ran(record, model, case)
    kept = alone.pop("kept", None)
    of_ranks = [rank.pop("kept", None) for rank in ranks]
    assert alone
    assert ranks == [alone] * RANKS
    if kept is None:
        return
    assert kept
    # Such projections are gathered before their heads are told apart: each rank has all.
    everywhere = model in ("heads everywhere", "asked")
    assert all(mine == kept for mine in of_ranks) if everywhere else together(of_ranks) == kept


def test_what_a_rank_reports_is_its_own(record):
    alone, ranks = ran(record, "heads", "report")
    assert "tensor parallel" not in alone["report"]
    for index, rank in enumerate(ranks):
        assert rank["report"].endswith(f"tensor parallel: bytes are those of rank {index} of {RANKS} alone")
        assert rank["bytes"] * RANKS == alone["bytes"]


def test_a_rank_goes_on_with_the_file_that_it_saved_and_no_other(record):
    alone, ranks = ran(record, "heads", "saved")
    assert alone == {"goes on": True, "message": None}
    for index, rank in enumerate(ranks):
        assert rank["goes on"]
        assert f"saved by one process, and this is rank {index} of {RANKS}" in rank["message"]


def test_a_stream_is_not_ended_early_by_one_of_several(record):
    alone, ranks = ran(record, "qwen", "closed stream")
    assert alone["message"] is None
    for index, rank in enumerate(ranks):
        assert f"rank {index} of {RANKS} cannot end an answer early" in rank["message"]
        assert rank["rest"]


def test_heads_that_cannot_be_shared_are_refused_with_the_reason(record):
    case = record["too few heads", "refused"]
    assert case["alone"]["message"] is None
    assert "is invalid for input of size" in case["obstacle"]  # what transformers says itself
    for rank in case["ranks"]:
        assert "its 1 KV heads cannot be shared evenly between 2 processes" in rank["message"]


def test_each_rank_keeps_latents_for_its_own_heads(record):
    _, (mine, other) = ran(record, "latents", "value-aware")
    assert mine["tokens"] == other["tokens"]
    assert mine["kept"] != other["kept"]
    whole, ranks = ran(record, "latents", "whole prompt")
    assert [rank["tokens"] for rank in ranks] == [whole["tokens"]] * RANKS


def test_a_rank_that_fails_ends_all(folder):
    done = launch(folder, "--fail")
    assert done.returncode != 0
    assert "ValueError: budget=0 must be" in done.stderr


def test_the_example_prints_what_the_document_shows(record, finished):
    ran(record, "qwen", "published")
    (shown,) = [block.text for block in BLOCKS["docs/recipes.md"] if "processes, gloo" in block.text]
    assert finished.stdout.splitlines() == shown.splitlines()


def test_the_example_says_what_differs():
    mine = [
        tensor_parallel.Run([1], [2], [[[0, 1]], [[0, 2]]], 0, 0),
        tensor_parallel.Run([1], [2], [[[3]], [[4]]], 0, 0),
    ]
    whole = tensor_parallel.Run([1], [3], [[[0, 1], [3]], [[0, 1], [4]]], 0, 0)
    assert tensor_parallel.comparison(mine, whole) == [
        "full cache: the same tokens",
        "compressed cache: other tokens, one process gives [3]",
        "kept: 1 of 6 tokens, of 4 heads of all layers, are others",
    ]


def test_the_example_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        tensor_parallel.main([])
