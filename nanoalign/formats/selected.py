"""Some of the records of sources: what a rank encodes of data on disk."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

from nanoalign import pairs
from nanoalign.encode import Record
from nanoalign.formats.sources import open_source


def read_records(
    known: dict[tuple[str, ...], pairs.Format],
    sources: Sequence[str],
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[Record]:
    """The records of some sources that are wanted, by their number among all, from 0.

    The others are not decoded, but for the first one of each file, which decides its format.
    """
    numbers, last = count(), True

    def opened(source: str) -> Iterator[tuple]:
        nonlocal last
        file = None
        for located in open_source(source):
            last, before, file = wanted(next(numbers)), file, located[0].rpartition(":")[0]
            if last or file != before:
                yield located

    for record in pairs.read(sources, known, opened):
        if last:
            yield record
