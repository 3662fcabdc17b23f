"""The kinds of files that hold records: .jsonl, .json, both also .gz, .parquet, .csv, .arrow."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from nanoalign.data.columns import TEXTS
from nanoalign.data.table_files import LARGEST, Numbered, arrow_of, check_size, parquet_of
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.records import lines_of

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".arrow")
LARGEST_LIST = 2**29  # characters of a .json file that is read as a whole
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file


def records_of(path: Path) -> Iterator[Numbered]:
    """Yields the records of a file. A list in a .json file is read as a whole, others in pieces.

    A record is JSON text if its file has a record a line, else decoded. Raises RunError, with file
    and line where these are known, for a file that can't be read.
    """
    kinds = {".csv": csv_of, ".parquet": parquet_of, ".arrow": arrow_of}
    with errors_of_reading(str(path)):
        yield from kinds.get(path.suffix, json_of)(path)


@contextmanager
def errors_of_reading(place: str) -> Iterator[None]:
    """Turns any error of a library inside this context into a RunError that names the place.

    Such are: damage that it finds, text that is not UTF-8, a date that Python's have no room for.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # of pyarrow, datasets and gzip, of any kind
        raise RunError(f"{place}: can't be read: {in_a_line(error)}") from error


def json_of(path: Path) -> Iterator[Numbered]:
    """Yields the lines of a file, as text; or the decoded elements of a list, numbered from 1.

    The list may be the value of {"data": [...]}.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            starts = (start.strip() for start in iter(partial(file.readline, 1000), ""))
            first = next(filter(None, starts), "")
            file.seek(0)
            if first != "{" and not first.startswith(("[", '{"data":')):  # all may be on one line
                yield from lines_of(short_lines(file, path), path)
                return
            text = file.read(LARGEST_LIST + 1)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        twice = "; it is compressed twice" if GZIP in getattr(error, "object", b"")[:2] else ""
        raise RunError(f"{path}: not a readable UTF-8 text file ({error}){twice}") from error
    if len(text) > LARGEST_LIST:
        raise RunError(
            f"{path}: a list of more than {LARGEST_LIST:,} characters; write each record on a line "
            "of its own (.jsonl), which is read line by line"
        )
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 brackets
        raise RunError(f"{path}: not valid JSON: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise RunError(
            f"{path}: one JSON object over several lines; write each record on a line of its own, "
            "or a list of records"
        )
    for n, record in enumerate(values, start=1):
        if len(text) > LARGEST:  # else no record is
            check_size(len(str(record)), f"{path}:record {n}")
        yield n, f"{path}:record {n}", record


def short_lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yields the lines of a file. Raises RunError for one that is longer than LARGEST."""
    for number, line in enumerate(iter(partial(file.readline, LARGEST + 1), ""), start=1):
        if len(line) > LARGEST:
            check_size(len(line), f"{path}:{number}")
        yield line


def csv_of(path: Path) -> Iterator[Numbered]:
    """Yields the rows of a .csv file, whose first line has the keys.

    Cells of the columns TEXTS stay text; others are decoded where they are JSON: a number, true or
    false, a list. (The datasets library would make numbers of prompts that look like one.)
    """
    csv.field_size_limit(LARGEST)  # characters of a cell
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(short_lines(file, path), strict=True)
            for record in reader:
                line = reader.line_num
                if None in record or None in record.values():
                    keys = ", ".join(reader.fieldnames)
                    raise RunError(f"{path}:{line}: expected as many cells as keys: {keys}")
                check_size(sum(map(len, record.values())), f"{path}:{line}")
                values = {
                    key: text if key in TEXTS else value_of(text) for key, text in record.items()
                }
                yield line, f"{path}:{line}", values
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(
            f"{path}: not a readable .csv file in UTF-8, behind line {line}: {in_a_line(error)}"
        ) from error


def value_of(text: str) -> object:
    """Returns the value of a cell: the decoded text if it is JSON, True or False; else the text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):  # the latter of 1,000 brackets
        return text


def files_of(place: str) -> list[Path]:
    """Returns the files of a place, in order of names: a file, a folder's files, or FOLDER:SPLIT.

    Those of a split are the files in FOLDER/SPLIT or, without such a folder, the files in FOLDER
    with SPLIT in their names. Returns [] for a place that does not exist. Raises RunError for a
    folder without files of these kinds, and for a file of another kind.
    """
    path = Path(place)
    above, _, split = place.rpartition(":")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise RunError(
                f"data file '{place}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
            )
        return [path]
    if not path.exists() and above and Path(above).is_dir():
        if (Path(above) / split).is_dir():
            return files_of(str(Path(above) / split))
        name = re.compile(rf"(.*[._-])?{re.escape(split)}[._-].*")
        paths = [each for each in Path(above).iterdir() if name.fullmatch(each.name)]
        lacking = f"files of '{split}'"
    elif path.is_dir():
        paths, lacking = list(path.iterdir()), f"{', '.join(SUFFIXES)} files"
    else:
        return []
    paths = sorted(each for each in paths if each.name.endswith(SUFFIXES))
    if not paths:
        raise RunError(f"data source '{place}': the folder has no {lacking}")
    return paths
