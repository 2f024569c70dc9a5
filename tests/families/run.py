"""Tries every model family of transformers with a tiny model of random weights, and writes down what came of it.

    python tests/families/run.py                                   # all, and record.json anew
    python tests/families/run.py --families qwen3_vl gemma4        # these, into record.json
    python tests/families/run.py --json /tmp/families.json         # another record

On a CPU, offline, in float32.  Families whose parts need packages that `.[dev]` does not bring (timm, scipy, num2words)
are listed as not built without them.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from families.configs import all_families
from families.worker import Worker

RECORD = Path(__file__).with_name("record.json")
SECONDS_PER_FAMILY = 60.0
_PACKAGES = ("torch", "transformers")


def counted(families: dict[str, Any]) -> dict[str, int]:
    """How many families came out how."""
    outcomes = [each["outcome"] for each in families.values()]
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def main(words: list[str] | None = None) -> int:
    """Returns 0 if no family is faulty."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", metavar="NAME", help="model types; all by default")
    parser.add_argument("--json", type=Path, default=RECORD, help="the record (%(default)s)")
    parser.add_argument("--limit", type=float, default=SECONDS_PER_FAMILY, help="seconds for a family (%(default)s)")
    options = parser.parse_args(words)
    families = all_families()
    unknown = set(options.families or []) - {family.name for family in families}
    if unknown:
        parser.error(f"--families: {', '.join(sorted(unknown))}: no model types of the installed transformers")
    if options.families:
        families = [family for family in families if family.name in options.families]
    found, worker, begin = {}, Worker(options.limit), time.monotonic()
    with tqdm(families, unit="family") as progress:
        for family in progress:
            progress.set_postfix_str(family.name)
            found[family.name] = worker.examine(family)
    worker.close()
    earlier = json.loads(options.json.read_text())["families"] if options.families and options.json.exists() else {}
    record = {
        "versions": {name: version(name) for name in _PACKAGES},
        "families": dict(sorted({**earlier, **found}.items())),
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, each in found.items():
        print(f"{name}: {each['outcome']}" + (f" ({each['reason']})" if "reason" in each else ""))
    print(f"{counted(found)} in {time.monotonic() - begin:.0f} s")
    return int(any(each["outcome"] == "faulty" for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
