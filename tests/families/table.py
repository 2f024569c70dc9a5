"""Writes the tables of families in docs/models.md from the record.

python tests/families/table.py
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RECORD = FOLDER / "record.json"
DOCUMENT = FOLDER.parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by tests/families/table.py -->", "<!-- end of families -->"

Families = dict[str, dict[str, Any]]


def block(record: dict[str, Any]) -> str:
    """What stands between the two markers.

    Args:
        record: as run.py writes it.
    """
    families: Families = record["families"]
    works, refused, faulty, not_built, not_counted = (
        {name: each for name, each in families.items() if each["outcome"] == outcome}
        for outcome in ("works", "refused", "faulty", "not built", "not counted")
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    counted = len(works) + len(refused) + len(faulty)
    parts = [
        f"Tried with tiny models of random weights on a CPU, in float32 ({versions}): {len(works)} of {counted} "
        "families work. Checked of each: a budget that covers the prompt gives the logits of `DynamicCache`, bit by "
        "bit; a small one those of a full cache whose dropped entries are masked; rows of a left-padded batch are as "
        "alone; fixed storage answers as growing storage; sliding windows may be shorter than the prompt; nothing is "
        "left on the model.",
        "**Families that work**, by how they decode with `max_new_tokens` on a GPU (a CPU compiles nothing; only "
        "the cache was asked); `*`: prompts with images too, made by the family's own processor.",
        _rows(("decoding", "families"), _grouped(works, _decoding, _starred)),
    ]
    for title, some in (("Refused", refused), ("Built, but with faults", faulty)):
        if some:
            rows = [(f"`{name}`", _cell(each["reason"])) for name, each in some.items()]
            parts += [f"**{title}:**", _rows(("family", "why"), rows)]
    apart = _grouped({**not_counted, **not_built}, _reason, _plain)
    parts += ["**Not counted:**", _rows(("why", "families"), apart)]
    return "\n\n".join(parts)


def with_block(text: str, inside: str) -> str:
    """A document with another text between the two markers.

    Raises:
        ValueError: it does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the document must have {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{inside}\n\n{END}{rest.split(END)[1]}"


def _decoding(family: dict[str, Any]) -> str:
    found = family["text"]["fixed_storage"]
    if found.startswith("grows: "):
        # How many layers these are is a matter of the tiny models.
        return "eager: " + re.sub(r"^\d+ of \d+ layers", "some layers", found.removeprefix("grows: "))
    return "compiled" if found == "compiled" else _cell(found)


def _reason(family: dict[str, Any]) -> str:
    return _cell(family["reason"])


def _starred(name: str, family: dict[str, Any]) -> str:
    return f"`{name}`" + ("*" if "made by" in family.get("images", {}) else "")


def _plain(name: str, family: dict[str, Any]) -> str:
    return f"`{name}`"


def _grouped(families: Families, key: Any, show: Any) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for name, each in families.items():
        groups.setdefault(key(each), []).append(show(name, each))
    return [(what, ", ".join(names)) for what, names in sorted(groups.items())]


def _cell(text: str) -> str:
    return text.removeprefix("ValueError: ").replace("|", "\\|")


def _rows(header: tuple[str, ...], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: list[str] | None = None) -> int:
    """Writes the block."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(words)
    inside = block(json.loads(RECORD.read_text(encoding="utf-8")))
    DOCUMENT.write_text(with_block(DOCUMENT.read_text(encoding="utf-8"), inside), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
