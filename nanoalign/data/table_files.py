"""Tables that hold records: .parquet and .arrow files, whose sizes are checked before use.

A file of 50 kB may expand to many gigabytes: by compression, or because all rows name one long text
of a dictionary. So rows are decoded in batches whose size the file's own tables tell beforehand.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line

LARGEST = 2**24  # of a record: characters of its line, or bytes of its row
BATCH_ROWS, BATCH_BYTES = 1024, 2**28  # of a table that are decoded at a time; the second at most
DICTIONARY_PAGE = b"\x15\x04\x15"  # how the header of such a page begins; its size follows
Numbered = tuple[int | str, str, str | dict]  # number of the line or row; where it is; the record


def check_size(size: float, where: str) -> None:
    """Raises RunError for a record of more than LARGEST characters, or bytes, at `where`."""
    if size > LARGEST:
        raise RunError(
            f"{where}: a record of more than {LARGEST:,} characters; shorten or remove it"
        )


def parquet_of(path: Path) -> Iterator[Numbered]:
    """Yields the rows of a .parquet file, which is read in batches. Raises RunError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RunError(
            f"{path}: reading it needs pyarrow; pip install pyarrow, or convert to .jsonl"
        ) from error
    row = 0
    try:
        with path.open("rb") as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            for n in range(file.num_row_groups):
                rows = rows_at_a_time(raw, file.metadata.row_group(n), f"{path}:{row + 1}")
                for batch in file.iter_batches(rows, row_groups=[n]):
                    for part in parts_of(batch):
                        for record in part.to_pylist():
                            row += 1
                            if part.nbytes > LARGEST:  # of one row
                                check_size(len(str(record)), f"{path}:{row}")
                            yield row, f"{path}:{row}", row_of(record)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable .parquet file: {in_a_line(error)}") from error


def rows_at_a_time(raw: BinaryIO, group: object, where: str) -> int:
    """Returns how many rows of a row group (pyarrow's RowGroupMetaData) are decoded at a time.

    Together these have at most about BATCH_BYTES, because a value has at most the bytes of its
    column's dictionary, or its share of the uncompressed pages.
    raw: the file. where: of the first row. Raises RunError if the mean row is above LARGEST.
    """
    chunks = [group.column(n) for n in range(group.num_columns)]
    count = max(group.num_rows, 1)
    check_size(sum(max(c.total_uncompressed_size, c.num_values) for c in chunks) / count, where)
    size = sum(
        max(chunk.total_uncompressed_size, chunk.num_values * dictionary_bytes(raw, chunk))
        for chunk in chunks
    )
    return int(max(1, min(BATCH_ROWS, BATCH_BYTES * count / max(size, 1))))


def dictionary_bytes(raw: BinaryIO, chunk: object) -> int:
    """Returns the uncompressed bytes of the dictionary of a column chunk; 0 if it has none.

    A page begins with a header in Thrift's compact protocol: its type, then this size, as a zigzag
    number of 7 bits a byte. https://parquet.apache.org/docs/file-format/data-pages/
    """
    raw.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
    header = raw.read(len(DICTIONARY_PAGE) + 5)
    if not header.startswith(DICTIONARY_PAGE):
        return 0
    size = 0
    for n, byte in enumerate(header[len(DICTIONARY_PAGE) :]):
        size |= (byte & 127) << 7 * n
        if byte < 128:
            break
    return size >> 1


def parts_of(batch: "pyarrow.RecordBatch") -> Iterator["pyarrow.RecordBatch"]:  # noqa: F821
    """Yields a batch of rows in parts of at most LARGEST bytes, or of one row."""
    if batch.nbytes <= LARGEST or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from parts_of(batch.slice(0, half))
    yield from parts_of(batch.slice(half))


def arrow_of(path: Path) -> Iterator[Numbered]:
    """Yields the rows of a file of the datasets library, which is mapped into memory."""
    datasets = import_datasets(str(path))
    check_arrow(path)
    try:
        table = datasets.Dataset.from_file(str(path))
    except (OSError, ValueError) as error:  # what pyarrow raises is one of these
        raise RunError(f"{path}: not a readable .arrow file: {in_a_line(error)}") from error
    for row, record in enumerate(table, start=1):
        yield row, f"{path}:{row}", row_of(record)


def check_arrow(path: Path) -> None:
    """Raises RunError for an .arrow file whose offsets lead outside, or with a row above LARGEST.

    Without this check a damaged file ends the process by SIGBUS or SIGSEGV where a row is read.
    """
    import pyarrow

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                batch.validate(full=True)
                for part in parts_of(batch):
                    if part.nbytes > LARGEST:
                        check_size(len(str(part.to_pylist())), f"{path}:{row + 1}")
                    row += part.num_rows
    except RunError:
        raise
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable .arrow file: {in_a_line(error)}") from error


def import_datasets(place: str) -> ModuleType:
    """Returns the module `datasets`; RunError if it is not installed. place: for the error."""
    try:
        import datasets
    except ImportError as error:
        raise RunError(
            f"data source '{place}': reading it needs the datasets library; pip install datasets"
        ) from error
    return datasets


def row_of(record: dict) -> dict:
    """Returns the row of a table with all its columns, by which its format is found.

    Their values are without nulls, as without_null returns them.
    """
    return {name: without_null(value) for name, value in record.items()}


def without_null(value: object) -> object:
    """Returns a value without the keys, at any depth, whose value is null.

    In a table the objects of a column have the same keys in all rows, and null for a missing key.
    """
    if isinstance(value, list):
        return [without_null(each) for each in value]
    if isinstance(value, dict):
        return {key: without_null(each) for key, each in value.items() if each is not None}
    return value
