"""Shared by the tests of data: files of records, what is read of them, stores of encoded data."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from nanoalign.batch import Row
from nanoalign.data.encoding import DataSettings, Encoding
from nanoalign.data.formats import decode_renamed, formats, names_of
from nanoalign.data.sources import read_records
from nanoalign.data.store import Store, StoredRows, open_store
from nanoalign.distributed import setup
from nanoalign.records import Record, parse

PAIR = {"prompt": "Why is the sky blue?", "chosen": "Light scatters.", "rejected": "It is painted."}


def write(path: Path, *records: object, text: str | None = None) -> str:
    """The path, as text, of a new .jsonl file of the records; or of one with this text."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(lines if text is None else text)
    return str(path)


def parsed(record: dict, keys: Sequence[str] = (), **options) -> Record:
    """The Record of a line, as the first one of a.jsonl. options: of `formats`."""
    record = decode_renamed(record, "a.jsonl:1", names_of(keys))
    return parse(record, "a.jsonl:1", formats(**options))[1]


def read(*sources: str, keys: Sequence[str] = (), **options) -> list[Record]:
    """The records of some sources. options: of `formats`."""
    return list(read_records(formats(**options), sources, keys))


def settings(*sources: str, **changes) -> DataSettings:
    """Those of a run on some sources, of which nothing is held out."""
    return DataSettings(list(sources), **{"eval_share": 0.0, "max_length": 64} | changes)


def encoding(model: Path, **changes) -> Encoding:
    """By the tokenizer in a folder. changes: of `settings`."""
    return Encoding(AutoTokenizer.from_pretrained(model), settings(**changes))


def opened(model: Path, sources: list[str], cache: Path, **changes) -> Store:
    """The store of some sources, which is written if it is not in the cache."""
    return open_store(encoding(model, **changes), model, sources, cache, setup())


def all_rows(store: Store) -> StoredRows:
    return store.rows(np.ones(len(store.digests), dtype=bool))


def assert_same_rows(a: list[Row], b: list[Row]) -> None:
    """All that a batch is made of, to the type; the notes were counted before."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.name, x.pairs, len(x), x.longest) == (y.name, y.pairs, len(y), y.longest)
        assert list(x.extra) == list(y.extra)
        parts = [(row.prompt, *row.responses, *row.extra.values()) for row in (x, y)]
        for left, right in zip(*parts, strict=True):
            assert left.dtype == right.dtype and np.array_equal(left, right)
            assert type(left) is type(right) is np.ndarray
