"""Kinds of files: lines of JSON, also compressed; arrays.py and tables.py have others."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanoalign.errors import RunError

Numbered = tuple[int | str, str, str | dict]  # line or row, path and line, record


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
