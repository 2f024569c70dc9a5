"""What the benchmarks share of their command lines."""

import argparse
from collections.abc import Iterable

from common import needs_package


def need_packages(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Exits with a message that says what to install, unless all these modules can be imported."""
    try:
        for name in names:
            needs_package(name, "bench")
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


def drop_repeats(arguments: argparse.Namespace, *names: str) -> None:
    """Leaves each value of these arguments once, in the order given."""
    for name in names:
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
