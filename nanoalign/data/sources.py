"""Names of data sources -> records. The grammar, which `parse_source` reads:

    [NAME=]SOURCE       NAME begins the names of the records; default: the file's name
    SOURCE is one of
        PATH            .jsonl, .json, both also .gz, .parquet, .csv, .arrow; a folder of such
                        files, or one that Dataset.save_to_disk has written; FOLDER:SPLIT a split
                        of either
        tiny[:test][:SEED][:ASSISTANT]
                        the embedded training data, or the test data; with a number those of another
                        world, with tiny-a, tiny-b or tiny-c a pair of this simulated assistant for
                        every prompt: tiny, tiny:test, tiny:7, tiny:test:7, tiny:test:7:tiny-a
        held_out:RUN    what the run in the folder RUN has held out
        hf://datasets/OWNER/NAME/PATH[@REVISION]
                        a file on the Hugging Face Hub
        hf://datasets/OWNER/NAME[/PART][@REVISION][:SPLIT]
                        a split of a data set there, by default train; PART is a subset or a folder
        SOURCE*SHARE    a share of its records, below 1, drawn by chance

A record's name is that of its source and its line, or its number where a source has no lines. So
names of sources must differ.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from nanoalign import records, tiny
from nanoalign.data.formats import decode_renamed, formats, names_of, single
from nanoalign.data.held_out import held_out_by
from nanoalign.data.hub import fetch_file, load_saved, load_split
from nanoalign.data.readers import SUFFIXES, errors_of_reading, files_of, records_of
from nanoalign.data.split import hashes
from nanoalign.data.table_files import check_arrow, without_null
from nanoalign.errors import RunError
from nanoalign.files.run_folder import ARGS, RECORDS
from nanoalign.files.text import in_a_line, read_json, readable
from nanoalign.records import Located, Record
from nanoalign.tiny import world

SOURCES = ("tiny-a", "tiny-b", "tiny-c")  # simulated assistants of the embedded data
EMBEDDED = re.compile(r"tiny(?P<test>:test)?(?P<seed>:\d{1,9})?(?P<source>:tiny-[abc])?")
HELD_OUT, HUB = "held_out:", "hf://"  # what the places of such sources begin with
ON_HUB = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)(?:/(?P<path>[^@:]+))?"
    r"(?:@(?P<revision>[^:]+))?(?::(?P<split>[\w-]+))?"
)
A_SHARE = re.compile(r"(.+)\*(0?\.0*[1-9]\d*)")  # SOURCE*SHARE


def test_of(place: str) -> str | None:
    """The data that are held out where these embedded ones are trained on; None for others."""
    parts = EMBEDDED.fullmatch(place)
    if not parts or parts["test"]:
        return None
    return f"tiny:test{parts['seed'] or ''}{parts['source'] or ''}"


def parse_source(spec: str) -> "Source":
    """Returns the Source of a spec of the grammar above; opens no files.

    A spec with "=" is read as NAME=SOURCE, unless a file or folder has the whole spec as its name,
    or the spec begins with held_out:. Raises RunError for a spec that the grammar does not have.
    """
    name, equals, place = spec.partition("=")
    if not equals or Path(spec).exists() or spec.startswith(HELD_OUT):
        name, place = "", spec
    elif not name or not place:
        raise RunError(f"data source '{spec}': expected NAME=SOURCE")
    return source_at(place, name)


def source_at(place: str, name: str) -> "Source":
    """Returns the Source of a place, which is SOURCE in the grammar.

    name: of the source; "": the name of the file or folder without suffixes. Raises RunError for a
    place that the grammar does not have.
    """
    if "*" in place and not Path(place).exists():
        if not (parts := A_SHARE.fullmatch(place)):
            raise RunError(
                f"data source '{place}': expected SOURCE*SHARE, a number such as 0.3, above 0 and "
                "below 1; for more of one source give less of the others, and more --epochs"
            )
        source = source_at(parts[1], name)
        return Share(source.name, place, source, parts[2])
    if place.startswith(HELD_OUT):
        run = Path(place.removeprefix(HELD_OUT)).resolve()
        return HeldOut(name or f"{HELD_OUT}{run.name}", place)
    if place.startswith(HUB):
        if not (parts := ON_HUB.fullmatch(place)):
            raise RunError(
                f"data source '{place}': expected "
                "hf://datasets/OWNER/NAME[/PATH][@REVISION][:SPLIT]"
            )
        name = name or Path(parts["path"] or parts["repo"]).name.split(".")[0]
        of_one_file = (parts["path"] or "").endswith(SUFFIXES) and not parts["split"]
        return (FileOnHub if of_one_file else SplitOnHub)(name, place)
    if EMBEDDED.fullmatch(place):
        return Embedded(name or place, place)
    name = name or readable(Path(place).name.split(".")[0]) or place
    folder, _, split = place.rpartition(":")
    if (Path(place) / "dataset_dict.json").exists() or (Path(place) / "state.json").exists():
        return Saved(name, place)
    if split and (Path(folder) / split / "state.json").exists():
        return Saved(name, str(Path(folder) / split))
    return Source(name, place)


def open_source(spec: str, keys: Sequence[str] = ()) -> Iterator[Located]:
    """Yields the records of a source, in their order: the `open_source` of records.read.

    keys: of --keys, OURS=THEIRS; with them records are decoded, and have our names of keys.
    """
    names = names_of(keys)
    for where, name, of_source, raw in parse_source(spec).records():
        yield where, name, of_source, decode_renamed(raw, where, names) if names else raw


def check_sources(specs: Sequence[str]) -> list[Path]:
    """Returns the files of some sources, which are fetched if they are on the Hub.

    Raises RunError for a spec that the grammar does not have, for a source without files, and for
    two sources of one name.
    """
    sources = list(map(parse_source, specs))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two data sources are named '{name}'; write A=SOURCE B=SOURCE")
    return [path for source in sources for path in source.files()]


def read_records(
    known: records.Formats, sources: Sequence[str], keys: Sequence[str] = ()
) -> Iterator[Record]:
    """Yields the records of some sources, in their order. known: the formats. keys: of --keys.

    Raises RunError, with file and line, for a record that no format reads.
    """
    return records.read(sources, known, partial(open_source, keys=keys))


# --- the sources of the grammar -------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file or a folder of files; subclasses are the other sources of the grammar."""

    name: str
    place: str  # as given: a path, tiny:..., hf://..., held_out:...

    @property
    def absolute(self) -> str:
        """The place with an absolute path, which names the same data in any working directory."""
        anywhere = EMBEDDED.fullmatch(self.place) or self.place.startswith(HUB)
        return self.place if anywhere else os.path.abspath(self.place)

    @property
    def origins(self) -> list[tuple[str, str]]:
        """(name, absolute place) of each source that gives the same records by the same names."""
        return [(self.name, self.absolute)]

    def files(self) -> list[Path]:
        """Returns the local files on which the records depend; fetches those on the Hub.

        Raises RunError if there are none.
        """
        if not (files := files_of(self.place)):
            raise RunError(
                f"data file '{self.place}' does not exist; give a path, hf://datasets/... or "
                "embedded data: tiny, tiny:test, tiny:SEED, tiny:tiny-a to tiny:test:tiny-c"
            )
        return files

    def records(self) -> Iterator[Located]:
        """Yields (place for errors, name, name of the source, text or dict) of each record."""
        files = self.files()
        base = os.path.commonpath([path.parent for path in files])
        for path in files:
            label = self.name if len(files) == 1 else f"{self.name}/{readable(path, base)}"
            for n, where, raw in records_of(path):
                yield where, f"{label}:{n}", self.name, raw


class Embedded(Source):
    """Data of the tiny world: those of TRAIN and TEST are files, all others are generated."""

    def files(self) -> list[Path]:
        """Returns the file, or all files of the code that generates the records."""
        embedded = {"tiny": world.TRAIN, "tiny:test": world.TEST}
        if self.place in embedded:
            return [embedded[self.place]]
        return sorted(Path(tiny.__file__).parent.glob("*.py"))

    def records(self) -> Iterator[Located]:
        parts = EMBEDDED.fullmatch(self.place)
        if not (parts["seed"] or parts["source"]):
            yield from super().records()
            return
        split, source = "test" if parts["test"] else "train", parts["source"]
        seed = int(parts["seed"][1:]) if parts["seed"] else None
        for n, record in enumerate(world.records(split, source and source[1:], seed), start=1):
            yield f"{self.place}:{n}", f"{self.name}:{n}", self.name, record


@dataclass(frozen=True)
class Share(Source):
    """A share of the records of another source: SOURCE*SHARE."""

    inner: Source
    share: str  # a decimal number

    @property
    def absolute(self) -> str:
        return f"{self.inner.absolute}*{self.share}"

    def files(self) -> list[Path]:
        return self.inner.files()

    def records(self) -> Iterator[Located]:
        """Yields each record with the probability `share`; the same ones every time."""
        draw = random.Random("share of a source")
        share = float(self.share)
        return (located for located in self.inner.records() if draw.random() < share)


class FileOnHub(Source):
    """A file of a data set on the Hub, in the cache of huggingface_hub."""

    def files(self) -> list[Path]:
        repo, path, revision = ON_HUB.fullmatch(self.place).group("repo", "path", "revision")
        return [fetch_file(self.place, repo, path, revision)]


class Saved(Source):
    """A folder that Dataset.save_to_disk has written."""

    @cached_property
    def dataset(self):
        """The datasets.Dataset."""
        return load_saved(self.place)

    def files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self.dataset.cache_files]

    def records(self) -> Iterator[Located]:
        for path in self.files():
            check_arrow(path)
        with errors_of_reading(self.place):
            for n, record in enumerate(self.dataset, start=1):
                yield f"{self.place}:{n}", f"{self.name}:{n}", self.name, without_null(record)


class SplitOnHub(Saved):
    """A split of a data set on the Hub, in the cache of the datasets library."""

    @cached_property
    def dataset(self):
        parts = ON_HUB.fullmatch(self.place).group("repo", "path", "revision", "split")
        repo, part, revision, split = parts
        return load_split(self.place, repo, part, revision, split or "train")


class HeldOut(Source):
    """The held-out records of a run, read from the run's sources, which must not have moved."""

    @property
    def run(self) -> Path:
        return Path(self.place.removeprefix(HELD_OUT))

    @property
    def absolute(self) -> str:
        return f"{HELD_OUT}{os.path.abspath(self.run)}"

    @property
    def origins(self) -> list[tuple[str, str]]:
        return [(f"{self.name}:{source.name}", source.place) for source in self.sources()]

    def sources(self) -> list[Source]:
        """Returns the whole sources that have the held-out records, among others, of the run.

        Raises RunError if the folder is of no run, or the run held nothing out.
        """
        places = held_out_by(self.run, self.place)["sources"].tolist()
        return [source_at(place, name) for name, place in places]

    def files(self) -> list[Path]:
        of_sources = (path for source in self.sources() for path in source.files())
        return [self.run / RECORDS, *of_sources]

    def records(self) -> Iterator[Located]:
        """Yields the records with our names of keys, also where the run had --keys.

        Raises RunError after the last record if some are missing or have changed since the run.
        """
        wanted = Counter(held_out_by(self.run, self.place)["held_out"].tolist())
        total, sources = wanted.total(), self.sources()
        # Any labels may be read of the records; those of the run show whether they have changed.
        settings = read_json(path := self.run / ARGS)
        try:
            known = formats(settings["preference"], single(settings.get("loss", "")))
            names = names_of(settings.get("keys", ()))
        except (LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not that of a run: {in_a_line(error)}") from error
        for source in sources:
            for where, name, _, raw in source.records():
                raw = decode_renamed(raw, where, names)
                _, record = records.parse(raw, where, known)
                if wanted[key := int.from_bytes(hashes(record)[16:], "little")]:
                    wanted[key] -= 1
                    yield where, f"{self.name}:{name}", self.name, raw
        if missing := wanted.total():
            raise RunError(
                f"data source '{self.place}': {missing:,} of the {total:,} records that the run "
                f"held out are not in {' '.join(source.place for source in sources)} any more; "
                "restore these data"
            )
