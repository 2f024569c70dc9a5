"""The documents as the tests read them: texts, fenced blocks, tables, and the records they quote."""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "benchmarks" / "results"
README, CONTRIBUTING = "README.md", "CONTRIBUTING.md"
DOCUMENTS = [
    README,
    CONTRIBUTING,
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
# Packages that a snippet may need and `.[dev]` does not bring, and what they warn of themselves.
OPTIONAL = {"peft": "is_gradient_checkpointing", "outlines": "outlines"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the section (`##`) that it is in, "" for what comes before one."""

    language: str
    text: str
    section: str


def blocks_of(name):
    found, section = [], ""
    for fence, language, text, heading in re.findall(
        r"^(```)(\w*)\n(.*?)^```$|^## ([^\n]+)$", TEXTS[name], re.M | re.S
    ):
        if fence:
            found.append(Block(language, text, section))
        else:
            section = heading
    return found


BLOCKS = {name: blocks_of(name) for name in DOCUMENTS}


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(name, header):
    """The rows, lists of cells, of the table whose header line begins so."""
    (rows,) = re.findall(rf"^{re.escape(header)}.*\n\| ---.*\n((?:\|.*\n)+)", TEXTS[name], re.M)
    return [re.split(r" \| ", line.strip("| ")) for line in rows.splitlines()]
