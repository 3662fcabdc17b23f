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

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanoalign.data.columns import TEXTS
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Located, lines_of
from nanoalign.tiny import world

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".arrow")

SOURCES = ("tiny-a", "tiny-b", "tiny-c")  # simulated assistants of the embedded data
# The embedded training data, and the data that are held out where these are trained on.
TEST_OF = {"tiny": "tiny:test"} | {f"tiny:{name}": f"tiny:test:{name}" for name in SOURCES}
EMBEDDED = (*TEST_OF, *TEST_OF.values())
FILES = {"tiny": world.TRAIN, "tiny:test": world.TEST}  # of the embedded data; others are generated
HELD_OUT, HUB = "held_out:", "hf://"  # what such places begin with
Numbered = tuple[int | str, str, str | dict]  # line or row, path and line, record


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

        return files_of(self.place)

    def records(self) -> Iterator[Located]:
        files = self.files()
        base = os.path.commonpath([path.parent for path in files])  # names must differ
        for path in files:
            label = self.name if len(files) == 1 else f"{self.name}/{readable(path, base)}"
            for n, where, raw in records_of(path):
                yield where, f"{label}:{n}", self.name, raw


def records_of(path: Path) -> Iterator[Numbered]:
    """The records of a file. All but a list of JSON are read piece by piece."""
    if path.suffix in (".parquet", ".arrow", ".csv"):
        yield from table_of(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):  # an array of JSON may be on one line
                yield from array_of(file.read(), path)
            else:
                yield from lines_of(file, path)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(f"{path}: not a readable UTF-8 text file ({error})") from error


def readable(path: str | os.PathLike[str], base: str = "") -> str:
    """A path below `base` as text that files can hold: its name on the disk may be no UTF-8."""
    name = os.path.relpath(path, base) if base else os.fspath(path)
    return name.encode(errors="replace").decode()


def files_of(place: str) -> list[Path]:
    """The files of a folder, in the order of their names. Raises RunError where there are none.

    Of a folder that Dataset.save_to_disk made, they are those that its state.json names.
    """
    path = Path(place)
    above, _, split = place.rpartition(":")
    if not path.exists() and above and Path(above).is_dir():
        return files_of_split(Path(above), split)
    if not path.exists():
        raise RunError(
            f"data file '{place}' does not exist; give a path, hf://datasets/... or one of the "
            f"embedded {', '.join(EMBEDDED)}"
        )
    if not path.is_dir():
        raise RunError(
            f"data file '{place}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
        )
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise RunError(
            f"data source '{place}' has the splits {', '.join(splits)}; give one: "
            f"{place.rstrip('/')}:{splits[0]}"
        )
    if (path / "state.json").is_file():
        saved = json.loads((path / "state.json").read_text())["_data_files"]
        return [path / each["filename"] for each in saved]
    paths = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
    if not paths:
        raise RunError(f"data source '{place}': the folder has no {', '.join(SUFFIXES)} files")
    return paths


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files in the folder of a split, or those that have it in their names."""
    if (folder / split).is_dir():
        return files_of(str(folder / split))
    named = re.compile(rf"(.*[._-])?{re.escape(split)}[._-].*")
    paths = [path for path in sorted(folder.iterdir()) if named.fullmatch(path.name)]
    paths = [path for path in paths if path.name.endswith(SUFFIXES)]
    if not paths:
        raise RunError(f"data source '{folder}:{split}': the folder has no files of '{split}'")
    return paths


def array_of(text: str, path: Path) -> Iterator[Numbered]:
    """The elements of a JSON array, decoded one by one, so that each has its line number.

    The elements of one line are 7, 7.2, 7.3: the names of records differ.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    place = blank.match(text, blank.match(text).end() + 1).end()  # behind the bracket
    line, counted, number, before = 1, 0, 0, 0
    if text[place : place + 1] == "]":
        return _check_end(text, place + 1, path)
    while True:
        line, counted = line + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise RunError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
            ) from error
        except (ValueError, RecursionError) as error:  # 5,000 digits; nested 1,000 deep
            raise RunError(f"{path}:{line}: not valid JSON: {error}") from error
        number, before = number + 1 if line == before else 1, line
        yield line if number == 1 else f"{line}.{number}", f"{path}:{line}", record
        place = blank.match(text, place).end()
        separator = text[place : place + 1]
        if separator == "]":
            return _check_end(text, place + 1, path)
        if separator != ",":
            at = line + text.count("\n", counted, place)
            raise RunError(
                f"{path}:{at}: not valid JSON: expected ',' or ']' after a record, found "
                f"{separator!r}"
            )
        place = blank.match(text, place + 1).end()


def _check_end(text: str, place: int, path: Path) -> None:
    if rest := text[place:].strip():
        line = text.count("\n", 0, text.index(rest, place)) + 1
        raise RunError(f"{path}:{line}: not valid JSON: {rest[:40]!r} follows the list of records")


def table_of(path: Path) -> Iterator[Numbered]:
    """The rows of a file, read piece by piece."""
    return csv_of(path) if path.suffix == ".csv" else batches_of(path)


def batches_of(path: Path) -> Iterator[Numbered]:
    """The rows of a parquet or arrow file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RunError(
            f"{path}: reading it needs pyarrow; pip install pyarrow, or convert to .jsonl"
        ) from error
    row = 0
    try:
        if path.suffix == ".parquet":
            batcher = pyarrow.parquet.ParquetFile(path).iter_batches()
        else:  # of Dataset.save_to_disk, and of the cache of datasets
            batcher = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batcher:
            for record in batch.to_pylist():
                row += 1
                # Structs of a column have the same keys in all rows; null: a record lacks the key.
                values = {key: without_null(each) for key, each in record.items()}
                yield row, f"{path}:{row}", values
    except pyarrow.ArrowException as error:
        raise RunError(f"{path}: not a readable {path.suffix} file: {in_a_line(error)}") from error


def without_null(value: object) -> object:
    """The value whose objects, at any depth, have no keys of null."""
    if isinstance(value, list):
        return [without_null(each) for each in value]
    if isinstance(value, dict):
        return {key: without_null(each) for key, each in value.items() if each is not None}
    return value


def csv_of(path: Path) -> Iterator[Numbered]:
    """The rows of a .csv file whose first line has the keys.

    Columns that are no texts have JSON where their value is JSON: numbers, true and false, lists.
    """
    csv.field_size_limit(sys.maxsize)  # of an answer
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                line = reader.line_num
                if None in record or None in record.values():
                    keys = ", ".join(reader.fieldnames)
                    raise RunError(f"{path}:{line}: expected as many cells as keys: {keys}")
                values = {
                    key: text if key in TEXTS else value_of(text) for key, text in record.items()
                }
                yield line, f"{path}:{line}", values
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: not a readable .csv file in UTF-8: {in_a_line(error)}") from error


def value_of(text: str) -> object:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
