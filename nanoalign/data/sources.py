"""Names of data sources -> records. The grammar, which `parse_source` reads:

    [NAME=]SOURCE       NAME begins the names of the records; default: the file's name
    SOURCE is one of
        PATH            .jsonl, .json, both also .gz, .parquet, .csv; or a folder of such files
        tiny            the embedded training data; tiny:test the test data; tiny:tiny-a,
                        tiny:test:tiny-a, ... a pair of one simulated assistant for every prompt
        held_out:RUN    what the run in the folder RUN has held out
        hf://datasets/OWNER/NAME[/PATH][@REVISION][:SPLIT]
                        a file on the Hugging Face Hub; with a split, the files in the folder PATH
                        that have it in their names: data/train-00000-of-00001.parquet
        SOURCE*SHARE    a share of its records, below 1, drawn by chance

A record's name is that of its source and its line, so names of sources must differ.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from nanoalign import records, tiny
from nanoalign.data.held_out import HeldOut
from nanoalign.data.hub import OnHub
from nanoalign.data.readers import EMBEDDED, FILES, HELD_OUT, HUB, Located, Source, readable
from nanoalign.errors import RunError
from nanoalign.records import Record
from nanoalign.tiny import world


def parse_source(spec: str) -> Source:
    """The Source of a text of the grammar. Files are not opened; PATH may have "=" in its name."""
    name, equals, place = spec.partition("=")
    if not equals or Path(spec).exists() or spec.startswith(HELD_OUT):
        name, place = "", spec
    elif not name or not place:
        raise RunError(f"data source '{spec}': expected NAME=SOURCE")
    return source_at(place, name)


def source_at(place: str, name: str) -> Source:
    """The Source of a place. An empty name becomes that of the file."""
    if "*" in place and not Path(place).exists():
        inner, _, share = place.rpartition("*")
        return share_of(source_at(inner, name) if inner else None, share, place)
    if place.startswith(HELD_OUT):
        return HeldOut(name, place, source_at)
    if place.startswith(HUB):
        return OnHub(name, place)
    if place in EMBEDDED and place not in FILES:
        return Generated(name, place)
    return Source(name or readable(Path(place).name.split(".")[0]) or place, place)


def open_source(spec: str) -> Iterator[Located]:
    """The records of a source, in its order: the `open_source` of pairs.read."""
    return parse_source(spec).records()


def check_sources(specs: Sequence[str]) -> list[Path]:
    """The files of some sources. Raises RunError if one is missing, or two names are the same."""
    sources = list(map(parse_source, specs))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two data sources are named '{name}'; write A=SOURCE B=SOURCE")
    return [path for source in sources for path in source.files()]


class Generated(Source):
    def __init__(self, name: str, place: str):
        super().__init__(name or place, place)

    @property
    def absolute(self) -> str:
        return self.place

    @property
    def key(self) -> str:
        return f"{self.name}={self.place}"

    def files(self) -> list[Path]:
        """The code that generates them."""
        return sorted(Path(tiny.__file__).parent.glob("*.py"))

    def records(self) -> Iterator[Located]:
        *_, name = self.place.split(":")
        split = "test" if self.place.startswith("tiny:test") else "train"
        for n, record in enumerate(world.records(split, name), start=1):
            yield f"{self.place}:{n}", f"{self.name}:{n}", self.name, record


@dataclass(frozen=True, slots=True)
class Share(Source):
    """A share of the records of another source: SOURCE*SHARE."""

    inner: Source
    share: float

    @property
    def absolute(self) -> str:
        return f"{self.inner.absolute}*{self.share}"

    @property
    def key(self) -> str:
        return f"{self.inner.key}*{self.share}"

    def files(self) -> list[Path]:
        return self.inner.files()

    def records(self) -> Iterator[Located]:
        """Each is drawn by itself, so their number is about the share; always the same ones."""
        draw = random.Random("share of a source")
        return (located for located in self.inner.records() if draw.random() < self.share)


def share_of(inner: Source | None, share: str, place: str) -> Share:
    """The Share of a source. Raises RunError for a share that is not a number between 0 and 1."""
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if inner is None or not 0 < number < 1:
        raise RunError(
            f"data source '{place}': expected SOURCE*SHARE, a number above 0 and below 1; for "
            "more of one source give less of the others, and more --epochs"
        )
    return Share(inner.name, place, inner, number)


def read_records(
    known: dict[tuple[str, ...], records.Format],
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

    for record in records.read(sources, known, opened):
        if last:
            yield record


def named(sources: Sequence[str]) -> str:
    """Sources as a line names them: a file's name may have escape sequences of terminals."""
    return " ".join(each if each.isprintable() else repr(each) for each in sources)
