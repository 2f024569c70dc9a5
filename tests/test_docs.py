"""What the documents say is what the repository does: snippets run, commands exist, things are where they should be."""

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from transformers import DynamicCache

from documents import (
    BLOCKS,
    CONTRIBUTING,
    DOCUMENTS,
    OPTIONAL,
    PROJECT,
    README,
    ROOT,
    TEXTS,
)
from mmshiftkv import CACHE_ARGUMENT, registry
from mmshiftkv.integrations.lmms_eval import MODELS


def runnable_sections():
    return [
        (name, section)
        for name in DOCUMENTS
        for section in dict.fromkeys(block.section for block in BLOCKS[name] if block.language == "python")
    ]


def document_prompt(processor):
    image = Image.open(ROOT / "examples" / "assets" / "document_1.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is the Invoice?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def skip_without_packages(code):
    for node in ast.walk(ast.parse(code)):
        module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
        package = (module or "").partition(".")[0]
        if package in OPTIONAL and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


def skip_without_chunked_prefill(model, inputs):
    options = {"max_new_tokens": 2, "prefill_chunk_size": 100, CACHE_ARGUMENT: DynamicCache(config=model.config)}
    try:
        model.generate(**inputs, **options)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"this transformers cannot prefill the model in chunks: {error}")


@pytest.mark.parametrize(("name", "section"), runnable_sections())
def test_the_snippets_run(name, section, vision_case, capsys, monkeypatch):
    """Those of a section in order, behind those before the first section; their output is what the document shows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "CACHES", dict(registry.CACHES))  # a snippet adds a method
    case = vision_case("qwen2_5_vl")
    inputs = document_prompt(case.processor)
    if section == "Chunked prefill":
        skip_without_chunked_prefill(case.model, inputs)
    names = {"model": case.model, "inputs": inputs, "processor": case.processor, "torch": torch}
    blocks = [block for block in BLOCKS[name] if block.section in ("", section)]
    for place, block in enumerate(blocks):
        if block.language != "python":
            continue
        code = re.sub(r"\bcache=(?=\w)", f"{CACHE_ARGUMENT}=", block.text)
        skip_without_packages(code)
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(compile(code, name, "exec"), names)
        assert [str(warning.message) for warning in caught if is_ours(warning)] == []
        printed, shown = capsys.readouterr(), blocks[place + 1 : place + 2]
        assert "FutureWarning" not in printed.err
        if shown and shown[0].language == "text":
            assert printed.out.splitlines() == shown[0].text.splitlines()


def is_ours(warning):
    """Whether it says that what the snippet does will change, and not what another package does."""
    mild = not issubclass(warning.category, FutureWarning | DeprecationWarning)
    return not mild and not any(word in str(warning.message) for word in OPTIONAL.values())


def test_the_readme_is_short():
    assert TEXTS[README].count("\n") <= 200
    assert len(TEXTS[README].split()) <= 1800


def test_ci_runs_the_command_that_the_readme_gives():
    (command,) = [block.text.strip() for block in BLOCKS[README] if block.language == "bash" and "pytest" in block.text]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_first_command_prints_what_the_readme_shows(capsys):
    quickstart = importlib.import_module("quickstart")
    (shown,) = [block.text for block in BLOCKS[README] if block.language == "text"]
    quickstart.main(["--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    for mine, theirs in zip(printed, shown.splitlines(), strict=True):
        budget = re.match(r"ShiftKVCache, budget (\d+)", theirs)
        if budget and int(budget[1]) < 128:  # what is read wrongly depends on the version of torch
            mine, theirs = (line.rpartition("  ")[0] for line in (mine, theirs))
        assert mine == theirs


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.M | re.S)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def launched(words):
    """What a command starts: accelerate knows its own options."""
    if words[:2] != ["accelerate", "launch"]:
        return words
    given = launch_command_parser().parse_args(words[2:])
    return ["python", *(["-m"] if given.module else []), given.training_script, *given.training_script_args]


def commands():
    for name in DOCUMENTS:
        for block in BLOCKS[name]:
            if block.language == "bash":
                for line in block.text.splitlines():
                    yield from ((name, part) for part in line.split(" && "))
        for inline in re.findall(r"`((?:pip|python) [^`]+)`", TEXTS[name]):
            yield name, inline


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_commands_are_there(name, command, capsys, monkeypatch):
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(command, comments=True)]
    words = launched(words)
    extras = [extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)]
    for extra in ",".join(extras).split(",") if extras else []:
        assert extra in PROJECT["optional-dependencies"]
    if words[:3] == ["python", "-m", "lmms_eval"]:
        assert words[words.index("--model") + 1] in MODELS
        return
    if words[0] == "torchrun":
        words = ["python", *words[[word.endswith(".py") for word in words].index(True) :]]
    if words[0] != "python":
        assert words[0] in ("python3", "pip", "pytest", "ruff", "mypy")
        return
    script = Path(words[1])
    assert (ROOT / script).is_file(), script
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(".".join(script.with_suffix("").parts[1:]))
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_what_a_dependent_project_writes_is_toml():
    (block,) = [block for block in BLOCKS[README] if block.language == "toml"]
    (dependency,) = tomllib.loads(block.text)["project"]["dependencies"]
    assert dependency.startswith("mmshiftkv[vision] @ file:///")


def test_the_versions_are_those_of_the_project():
    python = PROJECT["requires-python"].removeprefix(">=")
    wanted = dict(dependency.split(">=") for dependency in PROJECT["dependencies"])
    assert (
        f"Python {python} or later, torch {wanted['torch']} or later, transformers {wanted['transformers']} or later"
        in TEXTS[README]
    )
    assert f"version = {{{PROJECT['version']}}}" in TEXTS[README]
    assert f"license = {{{PROJECT['license']}}}" in TEXTS[README]
    extras = re.findall(r"`(\w+)` \(", TEXTS[README].partition("Other extras:")[2].partition("##")[0])
    assert {"vision", *extras} == set(PROJECT["optional-dependencies"])


def test_one_numbering_of_the_steps():
    names = [
        re.findall(r"^\d\. \*\*(.*?)\.\*\*", TEXTS[name].partition(heading)[2].partition("\n## ")[0], re.M)
        for name, heading in ((README, "## What it does"), ("docs/method.md", "## The six steps"))
    ]
    assert len(names[0]) == len(names[1]) == 6
    counting = TEXTS["docs/method.md"].partition("## Counting values")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. \*\*", counting, re.M) == ["7", "8", "9"]
    assert all(short.split()[-1].lower() in long.lower() for short, long in zip(*names, strict=True))
    for root in ("src", "kernels"):
        for path in (ROOT / root).rglob("*.py"):
            cited = re.findall(r"method, steps? (\d+)(?: (?:to|and) (\d+))?", path.read_text(encoding="utf-8"))
            assert all(1 <= int(step) <= 9 for steps in cited for step in steps if step), path


def tree():
    """The paths that the tree of CONTRIBUTING.md names."""
    (block,) = [block for block in BLOCKS[CONTRIBUTING] if block.section == "Where things are"]
    folders = {}
    for line in block.text.splitlines():
        names, _, _ = line.strip().partition("  ")
        depth = len(line) - len(line.lstrip())
        for name in names.split(", "):
            path = folders.get(depth - 2, ROOT) / name
            if name.endswith("/"):
                folders[depth] = path
            yield path


def test_things_are_where_they_are_said_to_be():
    named = set(tree())
    assert [path for path in named if not path.exists()] == []
    package = ROOT / "src" / "mmshiftkv"
    for folder in (package, package / "model", package / "storage"):
        missing = {path for path in folder.glob("*.py") if path.name != "__init__.py"} - named
        assert missing == set()


def test_functions_are_as_short_as_they_are_said_to_be():
    long = {}
    for path in (path for root in ("src", "kernels", "examples") for path in (ROOT / root).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
                long[node.name] = node.end_lineno - node.lineno + 1
    assert f"Triton kernels are longer, up to {max(long.values())} lines" in " ".join(TEXTS[CONTRIBUTING].split())


def with_additions(source, diff):
    """The source with the lines that a diff adds, each behind the line of context before it."""
    for context, added in re.findall(r"^ (.*\n)\+(.*\n)", diff, re.M):
        assert source.count(context) == 1, context
        source = source.replace(context, context + added)
    return source


def test_the_new_method_becomes_part_of_the_library(tmp_path):
    """The notes for contributors, followed in a copy of the package."""
    package = tmp_path / "mmshiftkv"
    shutil.copytree(ROOT / "src" / "mmshiftkv", package)
    (python,) = [block.text for block in BLOCKS[CONTRIBUTING] if block.language == "python"]
    (diff,) = [block.text for block in BLOCKS[CONTRIBUTING] if block.language == "diff"]
    method = python.partition("\n\ncache = ")[0]
    importing = "from mmshiftkv import Method, PrefillSelectionCache"
    assert importing in method
    (package / "methods" / "longest_values.py").write_text(method.replace(importing, "from .base import Method") + "\n")
    register = package / "registry.py"
    register.write_text(with_additions(register.read_text(encoding="utf-8"), diff), encoding="utf-8")
    program = """
import sys

sys.path[:0] = sys.argv[1:]
import models
from mmshiftkv import CACHE_ARGUMENT, METHODS, make_cache

model = models.text_model()
cache = make_cache("longest_values", model, 8)
model.generate(models.prompt_ids(), max_new_tokens=2, **{CACHE_ARGUMENT: cache})
print(METHODS[-1], type(cache).__name__, tuple(cache.kept_indices(0).shape))
"""
    paths = [tmp_path, *(ROOT / folder for folder in ("kernels", "tests", "tests/examples", "examples"))]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["longest_values", "LongestValuesCache", "(1,", "2,", "8)"]
