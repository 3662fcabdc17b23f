"""Shared by the tests of stores."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from nanoalign.batch import Row
from nanoalign.data.formats import formats, unchanged
from nanoalign.data.sources import read_records
from nanoalign.data.store import Encoding, Store, StoredRows

PAIR = {"prompt": "Why is the sky blue?", "chosen": "Light scatters.", "rejected": "It is painted."}
PAIRS = partial(read_records, formats())


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def encoding(model: Path, read=PAIRS, change=unchanged, **changes) -> Encoding:
    default = {"max_length": 64, "template": "auto", "settings": ("better",)}
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Encoding(tokenizer, model, read=read, change=change, **default | changes)


def arguments(*sources: str, **changes) -> Namespace:
    default = {"data": list(sources), "eval_data": None, "eval_share": 0.0, "seed": 0,
               "max_length": 64, "template": "auto", "cache": None}  # fmt: skip
    return Namespace(**default | changes)


def everything(store: Store) -> StoredRows:
    return store.rows(np.ones(len(store), dtype=bool))


def assert_same_rows(a: list[Row], b: list[Row]) -> None:
    """All that a batch is made of, to the type; the notes were counted before."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.name, x.pairs, len(x), x.longest) == (y.name, y.pairs, len(y), y.longest)
        assert list(x.extra) == list(y.extra)
        parts = [(row.prompt, *row.responses, *row.extra.values()) for row in (x, y)]
        for left, right in zip(*parts, strict=True):
            assert left.dtype == right.dtype and np.array_equal(left, right)
