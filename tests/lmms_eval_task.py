"""A task for lmms-eval on this disk: generated documents, and the files that describe it."""

from pathlib import Path

from tiny_vlm.pages import BUILTIN_FONTS, Example, held_out_of_task

NAME = "tiny_documents"
DOCUMENTS = 4
MAX_NEW_TOKENS = 24

YAML = """\
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function documents.page
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: {max_new_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def documents() -> list[Example]:
    """The documents, with one question each."""
    return list(held_out_of_task("lookup", DOCUMENTS, fonts=BUILTIN_FONTS))


def save_task(folder: Path) -> None:
    """Write the data set and the task into a new folder; needs datasets, which lmms-eval brings."""
    from datasets import Dataset, DatasetDict

    folder.mkdir()
    rows = [{"image": one.image, "question": one.question, "answer": one.answer} for one in documents()]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(folder / "data")
    (folder / "documents.py").write_text("def page(doc):\n    return [doc['image']]\n", encoding="utf-8")
    text = YAML.format(name=NAME, data=folder / "data", max_new_tokens=MAX_NEW_TOKENS)
    (folder / f"{NAME}.yaml").write_text(text, encoding="utf-8")
