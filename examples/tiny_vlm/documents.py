"""Draws the sample documents of the examples and writes down what is to be read on them.

`python -m tiny_vlm.documents FOLDER`, run in the folder `examples`, writes the images and `documents.json`:
file name -> list of {"question", "answer"}. The pages are among neither the training pages nor the held-out ones.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from tiny_vlm.pages import Page, ask_all, ask_line, field_question, page_image, random_page

# Seed, height and width of pages on which many fields stand clearly apart.
SAMPLES = {
    "document_1.png": ("document-26", 560, 448),
    "document_2.png": ("document-6", 448, 560),
    "document_3.png": ("document-11", 448, 560),
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the sample documents.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    documents = {}
    for name in SAMPLES:
        page = sample_page(name)
        page_image(page, seed=0).save(folder / name, optimize=True)
        documents[name] = sample_questions(page)
    (folder / "documents.json").write_text(json.dumps(documents, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
