"""Draws the sample documents of the examples and writes down what is to be read on them.

`python -m tiny_vlm.documents FOLDER`, run in the folder `examples`, writes the images, `documents.json` and, of the
second model's documents, `documents_llava.json`: file name -> list of {"question", "answer"}. The pages are among
neither the training pages nor the held-out ones.
"""

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tiny_vlm.layouts import Document, document_image, random_document
from tiny_vlm.pages import Page, ask_all, ask_line, field_question, page_image, random_page

# Seed, height and width of pages on which many fields stand clearly apart.
SAMPLES = {
    "document_1.png": ("document-26", 560, 448),
    "document_2.png": ("document-6", 448, 560),
    "document_3.png": ("document-11", 448, 560),
}
# The second model's: seed, height, width and layout.
LLAVA_SAMPLES = {
    "form.png": ("form-1", 672, 448, "form"),
    "receipt.png": ("receipt-2", 672, 448, "receipt"),
}


def sample_page(name: str) -> Page:
    """The page of one of `SAMPLES`; without noise, which would only make the file large."""
    seed, height, width = SAMPLES[name]
    return replace(random_page(random.Random(seed), height, width, max_lines=9, min_size=18), noise=0.0)


def sample_questions(page: Page) -> list[dict[str, str]]:
    """A question for each field, one for the first three together, one for a line and one for the whole text."""
    keys = list(page.fields)
    rng = random.Random(keys[0])
    asked = [field_question(page, [key]) for key in keys]
    asked += [field_question(page, keys[:3]), ask_line(rng, page), ask_all(rng, page)]
    return [{"question": question, "answer": answer} for _, question, answer in asked]


def sample_document(name: str) -> Document:
    """The document of one of `LLAVA_SAMPLES`, without noise too."""
    seed, height, width, layout = LLAVA_SAMPLES[name]
    return replace(random_document(random.Random(seed), height, width, (layout,), smallest=18), noise=0.0)


def document_questions(document: Document) -> list[dict[str, str]]:
    """A question for each field, one for the first three together and, where it can be read, the whole text."""
    keys = list(document.fields)
    asked = [field_question(document, [key]) for key in keys] + [field_question(document, keys[:3])]
    if document.read:
        asked.append(("all", "Read all the text.", "\n".join(document.read)))
    return [{"question": question, "answer": answer} for _, question, answer in asked]


def write(file: Path, documents: Mapping[str, tuple[Image.Image, list[dict[str, str]]]]) -> None:
    """The images beside the file, and their questions into it."""
    for name, (image, _) in documents.items():
        image.save(file.parent / name, optimize=True)
    questions = {name: asked for name, (_, asked) in documents.items()}
    file.write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the sample documents.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    pages = {name: sample_page(name) for name in SAMPLES}
    write(
        folder / "documents.json",
        {name: (page_image(page, seed=0), sample_questions(page)) for name, page in pages.items()},
    )
    documents = {name: sample_document(name) for name in LLAVA_SAMPLES}
    write(
        folder / "documents_llava.json",
        {name: (document_image(one, seed=0), document_questions(one)) for name, one in documents.items()},
    )


if __name__ == "__main__":
    main()
