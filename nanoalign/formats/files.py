"""Kinds of files: lines of JSON, JSON arrays, both also compressed, and parquet."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanoalign.errors import RunError

Numbered = tuple[int, str, str | dict]  # line (or row), path and line, record


def records_of(path: Path) -> Iterator[Numbered]:
    """The records of a file. .jsonl, also compressed, and .parquet are read piece by piece."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            before = ""  # blank lines at the head of the file
            for n, line in enumerate(file, start=1):  # a line ends with \n, not with U+2028
                if before is not None and line.lstrip().startswith("["):
                    # An array may be on one line, so it is read as a whole.
                    yield from _array(before + line + file.read(), path)
                    return
                if line.strip():
                    before = None
                    yield n, f"{path}:{n}", line.removesuffix("\n")
                elif before is not None:
                    before += line
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(f"{path}: not a readable UTF-8 text file ({error})") from error


def _array(text: str, path: Path) -> Iterator[Numbered]:
    """The elements of a JSON array, decoded one by one, so that each has its line number."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    place = blank.match(text, blank.match(text).end() + 1).end()  # behind the bracket
    line, counted = 1, 0
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
        yield line, f"{path}:{line}", record
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


def _parquet(path: Path) -> Iterator[Numbered]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RunError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow, or convert to .jsonl"
        ) from error
    row = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            row += 1
            yield row, f"{path}:{row}", record
