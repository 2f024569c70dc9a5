"""lmms-eval itself evaluates the embedded model, and the small LLaVA-NeXT, on documents on this disk."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import models
from common import TINY_LLAVA
from lmms_eval_task import MAX_NEW_TOKENS, NAME, documents, save_task
from mmshiftkv import METHODS, make_cache
from tiny_vlm.answering import answer, build_inputs

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None or importlib.util.find_spec("decord") is None,
    reason='needs lmms-eval: pip install "mmshiftkv[eval]"',
)
BUDGET = 48  # on these documents the methods answer differently with so little
# Without min_pixels lmms-eval enlarges the pages; the GPU, if any, is left out so that the answers are the same.
QWEN = f"pretrained={models.EMBEDDED_MODEL},min_pixels=3136,device=cpu"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms_eval") / "task"
    save_task(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(task_folder):
    """A function (lmms-eval's model name, model_args, batch size) -> exact match and the answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def evaluate(name: str, model_args: str, batch_size: int = 1) -> tuple[float, list[str]]:
        manager = TaskManager("ERROR", include_path=str(task_folder), model_name=name)
        found = simple_evaluate(
            model=name,
            model_args=model_args,
            tasks=[NAME],
            batch_size=batch_size,
            task_manager=manager,
            log_samples=True,
        )
        samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
        return found["results"][NAME]["exact_match,none"], [sample["filtered_resps"][0] for sample in samples]

    return evaluate


def lmms_model(name: str, model_args: str):
    from lmms_eval.models import get_model

    return get_model(name).create_from_arg_string(model_args)


@needs_lmms_eval
@pytest.mark.parametrize("method", METHODS)
def test_lmms_eval_gets_the_answers_that_the_cache_gives(method, evaluated):
    case = models.qwen2_5_vl(dtype="bfloat16")  # as lmms-eval loads it
    expected = []
    for example in documents():
        inputs = build_inputs(case.processor, [example.image], [example.question])
        cache = make_cache(method, case.model, BUDGET)
        expected += answer(case.model, case.processor, inputs, cache, MAX_NEW_TOKENS)
    budget = "" if method == "full" else f",budget={BUDGET}"
    exact_match, answers = evaluated("qwen2_5_vl_shiftkv", f"{QWEN},method={method}{budget}")
    assert answers == expected
    correct = [found == example.answer for found, example in zip(answers, documents(), strict=True)]
    assert exact_match == sum(correct) / len(correct)
    assert all(correct) or method != "full"


@needs_lmms_eval
def test_the_full_cache_answers_as_the_model_of_lmms_eval_does(evaluated):
    assert evaluated("qwen2_5_vl_shiftkv", f"{QWEN},method=full") == evaluated("qwen2_5_vl", f"{QWEN},device_map=cpu")
    llava = f"pretrained={TINY_LLAVA},device=cpu"
    full = evaluated("llava_hf_shiftkv", f"{llava},method=full")
    assert full == evaluated("llava_hf", f"{llava},device_map=cpu")
    assert full == evaluated("llava_hf_shiftkv", f"{llava},budget=10000")
    assert full != evaluated("llava_hf_shiftkv", f"{llava},budget=40")


@needs_lmms_eval
def test_batches_shares_and_settings_of_a_method(evaluated):
    assert evaluated("qwen2_5_vl_shiftkv", f"{QWEN},budget=200", batch_size=4)[0] == 1
    assert evaluated("qwen2_5_vl_shiftkv", f"{QWEN},budget=0.5,num_proxies=256,seed=1")[0] == 1
    few = evaluated("qwen2_5_vl_shiftkv", f"{QWEN},method=snapkv,budget={BUDGET},window=2")
    assert few != evaluated("qwen2_5_vl_shiftkv", f"{QWEN},method=snapkv,budget={BUDGET},window={BUDGET}")


@needs_lmms_eval
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("method=magic,budget=64", ValueError, "method='magic' must be one of 'full', 'shiftkv', "),
        ("method=snapkv", TypeError, "budget=None must be an int >= 1"),
        ("budget=0", ValueError, "budget=0 must be an int >= 1"),
        ("method=snapkv,budget=64,windw=3", TypeError, "unknown setting windw; SnapKV has window, kernel_size"),
        ("budget=64,gama=3", TypeError, "unknown setting gama; allowed are budget, gamma, "),
        ("method=full,window=3", TypeError, "unknown setting window; the full cache has none"),
        ("budget=64,use_cache=False", ValueError, "use_cache=False: there is no cache to compress"),
    ],
)
def test_bad_model_args_are_refused_before_anything_is_evaluated(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        lmms_model("qwen2_5_vl_shiftkv", f"{QWEN},{arguments}")


@needs_lmms_eval
def test_a_crash_is_no_empty_answer(evaluated):
    # Every prompt is longer than it is said to be.
    arguments = f"pretrained={TINY_LLAVA},device=cpu,budget=40,prefill=chunked,prompt_length=9"
    with pytest.raises(RuntimeError, match="generate failed: prompt_length=9, but the prompt has at least"):
        evaluated("llava_hf_shiftkv", arguments)


@needs_lmms_eval
def test_two_processes_answer_as_one(evaluated, task_folder, tmp_path):
    """On a CPU, of which accelerate must be told, and on which lmms-eval's Qwen2.5-VL has one process only."""
    arguments = f"pretrained={TINY_LLAVA},device=cpu,budget=300"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    program = f"-m lmms_eval --model llava_hf_shiftkv --model_args {arguments} --tasks {NAME} --verbosity DEBUG"
    program += f" --include_path {task_folder} --log_samples --output_path {tmp_path}"
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *f"{launch} {program}".split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (results,), (samples,) = (list(tmp_path.rglob(name)) for name in ("*_results.json", "*_samples_*.jsonl"))
    exact_match = json.loads(results.read_text(encoding="utf-8"))["results"][NAME]["exact_match,none"]
    answers = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    answers.sort(key=lambda one: one["doc_id"])  # lmms-eval writes those of one process behind those of the other
    assert (exact_match, [one["filtered_resps"] for one in answers]) == evaluated("llava_hf_shiftkv", arguments)


@needs_lmms_eval
def test_likelihoods_are_refused():
    with pytest.raises(NotImplementedError, match="loglikelihood decodes nothing"):
        lmms_model("llava_hf_shiftkv", f"pretrained={TINY_LLAVA},device=cpu,budget=40").loglikelihood([])


@needs_lmms_eval
def test_the_model_is_left_as_it_was():
    wrapped = lmms_model("qwen2_5_vl_shiftkv", f"{QWEN},budget=64")
    model = wrapped.model
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == wrapped.config.model_type == "qwen2_5_vl"
    assert "generate" not in vars(model._model)
    assert models.hooks_on(model._model) == 0


def test_the_library_does_not_import_lmms_eval():
    code = "import sys, mmshiftkv, mmshiftkv.integrations.lmms_eval; assert 'lmms_eval' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize("package", ["lmms_eval", "decord"])
def test_what_is_missing_is_named_with_the_line_that_installs_it(package, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lmms_eval", "decord") or name.endswith(".lmms_eval_models"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'is not installed.*: pip install "mmshiftkv\[eval\]"$'):
        importlib.import_module("mmshiftkv.integrations.lmms_eval_models")
