"""Files of tables: parquet, arrow as `datasets` saves it, csv. A row is a record."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nanoalign.errors import RunError, in_a_line
from nanoalign.formats.records import TEXTS
from nanoalign.formats.sources import Numbered


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
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        else:  # of Dataset.save_to_disk, and of the cache of datasets
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
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
