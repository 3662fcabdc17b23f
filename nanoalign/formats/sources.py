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

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoalign import tiny
from nanoalign.errors import RunError
from nanoalign.formats import TEST_OF, readable

EMBEDDED = (*TEST_OF, *TEST_OF.values())
FILES = {"tiny": tiny.TRAIN, "tiny:test": tiny.TEST}  # of the embedded data; others are generated
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".arrow")
HELD_OUT, HUB = "held_out:", "hf://"  # what such places begin with
Numbered = tuple[int | str, str, str | dict]  # line or row, path and line, record
Located = tuple[str, str, str, str | dict]  # where, name and line, name, record (JSON, or decoded)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of the grammar. Subclasses have the places that are neither file nor folder."""

    name: str
    place: str  # as given: a path, tiny:..., hf://..., held_out:...

    @property
    def absolute(self) -> str:
        """The place, as it is given in any folder."""
        return self.place if self.place in FILES else os.path.abspath(self.place)

    @property
    def origins(self) -> list[tuple[str, str]]:
        """(name, absolute place) of what the records are read from, under the same names."""
        return [(self.name, self.absolute)]

    @property
    def key(self) -> str:
        """What the records depend on, but for the contents of the files."""
        return self.name

    def files(self) -> list[Path]:
        """The local files on which the records depend; those on the Hub are fetched."""
        path = FILES.get(self.place, Path(self.place))
        if path.is_file() and path.name.endswith(SUFFIXES):
            return [path]
        from nanoalign.formats.folder import files_of

        return files_of(self.place)

    def records(self) -> Iterator[Located]:
        files = self.files()
        base = os.path.commonpath([path.parent for path in files])  # names must differ
        for path in files:
            label = self.name if len(files) == 1 else f"{self.name}/{readable(path, base)}"
            for n, where, raw in records_of(path):
                yield where, f"{label}:{n}", self.name, raw


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
        from nanoalign.formats.share import Share as kind
    elif place.startswith(HELD_OUT):
        from nanoalign.formats.held_out import HeldOut as kind
    elif place.startswith(HUB):
        from nanoalign.formats.hub import OnHub as kind
    elif place in EMBEDDED and place not in FILES:
        from nanoalign.formats.generated import Generated as kind
    else:
        kind = Source
        name = name or readable(Path(place).name.split(".")[0]) or place
    return kind(name, place)


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


def records_of(path: Path) -> Iterator[Numbered]:
    """The records of a file. All but a list of JSON are read piece by piece."""
    if path.suffix in (".parquet", ".arrow", ".csv"):
        from nanoalign.formats.tables import table_of

        yield from table_of(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            before = ""  # blank lines at the head of the file
            for n, line in enumerate(file, start=1):  # a line ends with \n, not with U+2028
                if before is not None and line.lstrip().startswith("["):
                    from nanoalign.formats.arrays import array_of

                    # An array may be on one line, so it is read as a whole.
                    yield from array_of(before + line + file.read(), path)
                    return
                if line.strip():
                    before = None
                    yield n, f"{path}:{n}", line.removesuffix("\n")
                elif before is not None:
                    before += line
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(f"{path}: not a readable UTF-8 text file ({error})") from error
