import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

import evaluate_lmms
import models
from lmms_eval_task import NAME, save_task
from mmshiftkv.integrations.lmms_eval import MODELS

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None or importlib.util.find_spec("decord") is None,
    reason='needs lmms-eval: pip install "mmshiftkv[eval]"',
)


def commands(capsys, *arguments: str) -> list[list[str]]:
    evaluate_lmms.main([*arguments, "--dry-run"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("family", "checkpoint"),
    [("qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct"), ("llava", "llava-hf/llava-v1.6-vicuna-7b-hf")],
)
def test_by_default_the_full_cache_and_the_budgets_of_the_paper_on_its_tasks(family, checkpoint, capsys):
    found = commands(capsys, family)
    assert [option(words, "--model_args") for words in found] == [
        f"pretrained={checkpoint},method=full",
        *(f"pretrained={checkpoint},method=shiftkv,budget={budget}" for budget in (64, 128, 256, 512)),
    ]
    for words in found:
        assert words[:3] == [sys.executable, "-m", "lmms_eval"]
        assert option(words, "--model") in MODELS
        assert option(words, "--tasks") == "docvqa_val,ocrbench,textvqa_val,chartqa,textcaps_val,mmmu_val"
        assert "--limit" not in words
    assert len({option(words, "--output_path") for words in found}) == 5


def test_several_processes_are_started_by_accelerate(capsys):
    (words,) = commands(capsys, "llava", "--methods", "snapkv", "--budgets", "0.1", "0.1", "--processes", "8")
    assert words[1:6] == ["-m", "accelerate.commands.launch", "--num_processes=8", "-m", "lmms_eval"]
    assert option(words, "--model_args").endswith(",method=snapkv,budget=0.1")
    assert option(words, "--verbosity") == "DEBUG"  # so that one that fails ends all


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="--processes 99: each needs a GPU, and there are "):
        evaluate_lmms.check_gpus(99)


@needs_lmms_eval
def test_lmms_eval_knows_the_tasks_and_their_metrics():
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR")
    for task, metric in evaluate_lmms.TASKS.items():
        assert metric in {entry["metric"] for entry in manager._get_config(task)["metric_list"]}, task


@needs_lmms_eval
def test_an_evaluation_from_the_command_line_to_the_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    save_task(tmp_path / "task")
    monkeypatch.chdir(Path(evaluate_lmms.__file__).parent)  # none of the scripts must hide a package of lmms-eval's
    task, output = tmp_path / "task", tmp_path / "out"
    arguments = f"qwen2_5_vl --model {models.EMBEDDED_MODEL} --model-args min_pixels=3136 --tasks {NAME}"
    arguments += f" --methods full streaming_llm --budgets 16 --limit 2 --include-path {task} --output {output}"
    evaluate_lmms.main(arguments.split())
    assert capfd.readouterr().out.splitlines()[-4:] == [
        f"| method | budget | {NAME} | mean |",
        "| --- | --- | --- | --- |",
        "| full | - | 100.0 | 100.0 |",
        "| streaming_llm | 16 | 0.0 | 0.0 |",
    ]
    (written,) = (output / "streaming_llm-16").rglob("*_results.json")
    assert json.loads(written.read_text(encoding="utf-8"))["config"]["model_args"].endswith("budget=16,min_pixels=3136")


@needs_lmms_eval
def test_a_run_that_fails_stops_the_script(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = f"qwen2_5_vl --model {models.EMBEDDED_MODEL} --methods shiftkv --tasks no_such_task"
    with pytest.raises(SystemExit, match="error: shiftkv-64: lmms-eval wrote no results"):
        evaluate_lmms.main([*arguments.split(), "--output", str(tmp_path / "out")])


def test_the_metric_of_a_task_is_found_among_the_others():
    metrics = {
        "alias": "ocrbench",
        "other,none": 1.0,
        "ocrbench_accuracy,none": 0.5,
        "ocrbench_accuracy_stderr,none": 2,
    }
    assert evaluate_lmms.score("ocrbench", metrics) == 0.5
    assert evaluate_lmms.score("a_task", metrics) == 1.0
    with pytest.raises(RuntimeError, match="docvqa_val: no number for anls among its results: alias, "):
        evaluate_lmms.score("docvqa_val", metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt"], "argument family: invalid choice: 'gpt'"),
        (["llava", "--methods", "magic"], "argument --methods: invalid choice: 'magic'"),
        (["llava", "--budgets", "0"], "argument --budgets: a budget is a whole number of tokens"),
        (["llava", "--include-path", "nowhere"], "argument --include-path: no such folder: 'nowhere'"),
        (["llava", "--batch-size", "2"], "--batch-size 2: lmms-eval's LLaVA takes 1 only"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate_lmms.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_lmms_eval_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit) as stopped:
        evaluate_lmms.main(["llava"])
    assert stopped.value.code == 'error: needs lmms_eval: pip install "mmshiftkv[eval]"'
