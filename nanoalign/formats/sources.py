"""Names of data sources -> records. The grammar, which `parse_source` reads:

    [NAME=]SOURCE       NAME begins the names of the records; default: the file's name
    SOURCE is one of
        PATH            .jsonl, .json, both also .gz, .parquet; or a folder of such files
        tiny            the embedded training data; tiny:test the test data; tiny:tiny-a,
                        tiny:test:tiny-a, ... a pair of one simulated assistant for every prompt
        held_out:RUN    what a run has held out; not supported yet
        hf://datasets/OWNER/NAME/PATH[@REVISION][:SPLIT]
                        a file on the Hugging Face Hub; with a split, the files in the folder PATH
                        that have it in their names: data/train-00000-of-00001.parquet

A record's name is that of its source and its line, so names of sources must differ.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoalign import tiny
from nanoalign.errors import RunError
from nanoalign.formats import TEST_OF
from nanoalign.formats.files import records_of

EMBEDDED = (*TEST_OF, *TEST_OF.values())
FILES = {"tiny": tiny.TRAIN, "tiny:test": tiny.TEST}  # of the embedded data; others are generated
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
HUB = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)/(?P<path>[^@:]+)"
    r"(?:@(?P<revision>[^:]+))?(?::(?P<split>[\w-]+))?"
)
Located = tuple[str, str, str, str | dict]  # where, name and line, name, record (JSON, or decoded)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of the grammar."""

    name: str
    place: str  # as given: a path, tiny:..., hf://...
    hub: re.Match | None = None  # of a file on the Hub: repo, path, revision, split

    @property
    def generated(self) -> str | None:
        """The name of embedded records that are in no file."""
        return self.place if self.place in EMBEDDED and self.place not in FILES else None

    def files(self) -> list[Path]:
        """The local files on which the records depend; those on the Hub are fetched."""
        if self.generated:
            return sorted(Path(tiny.__file__).parent.glob("*.py"))
        if self.hub:
            from nanoalign.formats.hub import fetch

            return fetch(self.place, *self.hub.group("repo", "path", "revision", "split"))
        return [FILES[self.place]] if self.place in FILES else files_of(self.place)

    def records(self) -> Iterator[Located]:
        if self.generated:
            from nanoalign.tiny import world  # imported here, as it generates for a second

            *_, name = self.place.split(":")
            split = "test" if self.place.startswith("tiny:test") else "train"
            for n, record in enumerate(world.records(split, name), start=1):
                yield f"{self.place}:{n}", f"{self.name}:{n}", self.name, record
            return
        files = self.files()
        for path in files:
            label = self.name if len(files) == 1 else f"{self.name}/{path.name}"
            for n, where, raw in records_of(path):
                yield where, f"{label}:{n}", self.name, raw


def parse_source(spec: str) -> Source:
    """The Source of a text of the grammar. Files are not opened; PATH may have "=" in its name."""
    name, equals, place = spec.partition("=")
    if not equals or Path(spec).exists():
        name, place = "", spec
    elif not name or not place:
        raise RunError(f"data source '{spec}': expected NAME=SOURCE")
    if place.startswith("held_out:"):
        raise RunError(
            f"data source '{spec}': not supported yet: held_out:RUN; give a file of pairs"
        )
    hub, path = None, place
    if place.startswith("hf://"):
        if (hub := HUB.fullmatch(place)) is None:
            raise RunError(
                f"data source '{spec}': expected hf://datasets/OWNER/NAME/PATH[@REVISION][:SPLIT]"
            )
        path = hub["path"]
    return Source(name or Path(path).name.split(".")[0] or place, place, hub)


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


def files_of(place: str) -> list[Path]:
    """A file, or the files of a folder."""
    path = Path(place)
    if not path.exists():
        raise RunError(
            f"data file '{place}' does not exist; give a path, hf://datasets/... or one of the "
            f"embedded {', '.join(EMBEDDED)}"
        )
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
        if not paths:
            raise RunError(f"data source '{place}': the folder has no {', '.join(SUFFIXES)} files")
        return paths
    if not path.name.endswith(SUFFIXES):
        raise RunError(
            f"data file '{place}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
        )
    return [path]
