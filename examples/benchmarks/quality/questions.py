"""The questions that the caches answer, in batches."""

from collections.abc import Iterator

from tiny_vlm.pages import Example


def batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    """Lists of `size` examples; the last one may be shorter."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
