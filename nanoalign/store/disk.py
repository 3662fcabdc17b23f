"""Encoded records in a folder of safetensors files, one for each chunk of records.

A file holds these arrays, of R records, E that are encoded (each record once, or with --condition
once for each preference), N rows (one that was dropped has none), B pairs and T tokens. Those with
several values a row have a second array, NAME_starts, (N + 1,): the values of row n are
NAME[starts[n] : starts[n + 1]].

    tokens      (T,) int32       of the prompt and of the responses, one behind the other
    parts       (N + S,) int32   the tokens of the prompt and of each response
    pairs       (B, 2) int32     indices of the chosen and the rejected response
    names       bytes            the names of the rows, in UTF-8
    extra/NAME  any type         Row.extra[NAME]
    digests     (N, 16) uint8    checkpoints.resume.digest of each row
    records     (R, 3) uint64    formats.rows.record_digests
    kept        (E,) bool        whether a record has a row
    compared    (E,) int32       pairs of a record, before any was dropped
    notes       (C,) uint16      what encoding changed or dropped: indices of ABOUT's "reasons"
    noted       (C,) int32       the record of each note

Files of chunks, and not one file: the ranks write them without waiting for each other, and
safetensors needs all arrays of a file in memory to write it. safe_open maps a file into memory, so
the ranks of a host share one copy of it in the cache of the operating system. A row is a slice of a
numpy view of the mapped tensor, which takes 1 microsecond; get_slice takes 7 (numpy) or 27 (torch).
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nanoalign.batch import Row
from nanoalign.checkpoints.resume import digest
from nanoalign.errors import RunError, in_a_line
from nanoalign.formats.rows import EQUAL_RESPONSES, EQUAL_SCORES, drop_equal

FORMAT = 3  # version of these files; a store of another one is refused
ABOUT = "about.json"  # of a folder: format, number of chunks; checksums.json has those of all files
EXTRA = "extra/"


def name_of(chunk: int) -> str:
    return f"{chunk:09d}.safetensors"


class Chunk:
    """The arrays of one file by name, mapped into memory."""

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as file:  # numpy's get_tensor would copy
            self.arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            self.about = json.loads(file.metadata()["about"])
        self.extra = [n for n in self.arrays if n.startswith(EXTRA) and not n.endswith("_starts")]

    def __len__(self) -> int:
        return len(self.arrays["digests"])

    def values(self, name: str, n: int) -> np.ndarray:
        start, end = self.arrays[f"{name}_starts"][n : n + 2]
        return self.arrays[name][start:end]

    def row(self, n: int) -> Row:
        tokens, ids, start = self.values("tokens", n), [], 0
        for length in self.values("parts", n).tolist():
            ids.append(tokens[start : start + length])
            start += length
        extra = {name.removeprefix(EXTRA): self.values(name, n) for name in self.extra}
        return Row(
            self.values("names", n).tobytes().decode(),
            ids[0],
            tuple(ids[1:]),
            tuple(map(tuple, self.values("pairs", n).tolist())),
            {name: values for name, values in extra.items() if len(values)},
        )


class Store:
    """The encoded records of a folder. A mask (E,) of what was encoded selects rows."""

    def __init__(self, folder: Path):
        """Raises RunError for a folder of another format, and for damaged files."""
        try:
            about = json.loads((folder / ABOUT).read_text())
            if about.get("format") != FORMAT:
                raise RunError(
                    f"{folder}: the encoded data have the format {about.get('format', 0)} of "
                    f"another version of nanoalign, not {FORMAT}; remove that folder"
                )
            self.chunks = [Chunk(folder / name_of(n)) for n in range(about["chunks"])]
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise RunError(
                f"{folder}: the encoded data can't be read: {in_a_line(error)}; remove that folder"
            ) from error
        self.first = np.cumsum([0, *map(len, self.chunks)]).tolist()  # row of each chunk
        self.records = self.of_chunks("records")  # (R, 3)
        self.kept = self.of_chunks("kept")  # (E,)

    def __len__(self) -> int:
        """E."""
        return len(self.kept)

    def encoded(self, records: np.ndarray) -> np.ndarray:
        """A mask (R,) of records as one of what was encoded, (E,)."""
        return np.repeat(records, len(self) // len(self.records))

    def with_rows(self) -> np.ndarray:
        """A mask (R,) of the records that have a row."""
        return self.kept.reshape(len(self.records), -1).any(1)

    def of_chunks(self, name: str) -> np.ndarray:
        return np.concatenate([chunk.arrays[name] for chunk in self.chunks])

    def sizes(self, name: str) -> np.ndarray:
        """How many values each row has: (N,)."""
        return np.concatenate([np.diff(chunk.arrays[f"{name}_starts"]) for chunk in self.chunks])

    def rows(self, records: np.ndarray) -> "StoredRows":
        return StoredRows(self, np.flatnonzero(records[self.kept]))

    def row(self, n: int) -> Row:
        chunk = bisect_right(self.first, n) - 1
        return self.chunks[chunk].row(n - self.first[chunk])

    def counts(self, records: np.ndarray) -> tuple[int, int, Counter]:
        """(records, their pairs, counts by reason), as formats.rows counts them in memory."""
        counts, start = Counter(), 0
        for chunk in self.chunks:
            own = records[start : start + len(chunk.arrays["kept"])]
            notes = chunk.arrays["notes"][own[chunk.arrays["noted"]]]
            counts.update(chunk.about["reasons"][note] for note in notes.tolist())
            start += len(own)
        for reason in (EQUAL_SCORES, EQUAL_RESPONSES):  # the last ones, also where they are 0
            counts[reason] = counts.pop(reason, 0)
        return int(records.sum()), int(self.of_chunks("compared")[records].sum()), counts

    @property
    def templates(self) -> set[str]:
        return {name for chunk in self.chunks for name in chunk.about["templates"]}

    @property
    def limits(self) -> tuple[int, int]:
        """(token id, tokens of a prompt and one response) that no row exceeds."""
        limits = np.array([chunk.about["limits"] for chunk in self.chunks])
        largest, longest = limits.max(0).tolist()
        return largest, longest


class StoredRows(Sequence[Row]):
    """Rows of a store by their indices. Each is read when it is accessed; a slice reads none."""

    def __init__(self, store: Store, indices: np.ndarray):
        self.store, self.indices, self.limits = store, indices, store.limits

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return StoredRows(self.store, self.indices[place])
        return self.store.row(int(self.indices[place]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (N,)."""
        return self.store.sizes("tokens")[self.indices]

    @property
    def responses(self) -> np.ndarray:
        """How many responses each row has, (N,)."""
        return self.store.sizes("parts")[self.indices] - 1  # one part is the prompt

    def fingerprint(self) -> str:
        """What checkpoints.resume.fingerprint computes of rows in memory."""
        digests = self.store.of_chunks("digests")[self.indices]
        return hashlib.sha256(digests.tobytes()).hexdigest()


def write_chunk(
    path: Path, rows: Sequence[Row], records: np.ndarray, compared: Sequence[int],
    templates: set[str],
) -> None:  # fmt: skip
    """Writes the file of one chunk.

    rows: of its records, with the pairs that are to be dropped. records: digests, (R, 3).
    compared: pairs of each row. templates: names of those that rendered them.
    """
    left = [drop_equal([row]) for row in rows]
    kept = [row for own, _ in left for row in own]
    noted = [(n, reason) for n, (_, counts) in enumerate(left) for reason in counts.elements()]
    reasons = list(dict.fromkeys(reason for _, reason in noted))
    arrays = {
        "digests": np.frombuffer(b"".join(map(digest, kept)), np.uint8).reshape(-1, 16),
        "kept": np.array([bool(own) for own, _ in left]),
        "records": records,
        "compared": np.array(compared, np.int32),
        "notes": np.array([reasons.index(reason) for _, reason in noted], np.uint16),
        "noted": np.array([n for n, _ in noted], np.int32),
    }
    parts = [(row.prompt, *row.responses) for row in kept]
    of_rows = {
        "tokens": [np.concatenate(part) for part in parts],
        "parts": [np.array(list(map(len, part)), np.int32) for part in parts],
        "pairs": [np.array(row.pairs, np.int32) for row in kept],
        "names": [np.frombuffer(row.name.encode(), np.uint8) for row in kept],
    }
    for name in sorted({name for row in kept for name in row.extra}):
        dtype = next(row.extra[name].dtype for row in kept if name in row.extra)
        of_rows[EXTRA + name] = [row.extra.get(name, np.empty(0, dtype)) for row in kept]
    for name, values in of_rows.items():
        # No rows are left: none of the arrays has a type, and nothing reads them.
        arrays[name] = np.concatenate(values, casting="no") if values else np.empty(0, np.int32)
        arrays[f"{name}_starts"] = np.cumsum([0, *map(len, values)])
    largest, longest = arrays["tokens"].max(initial=0), max((r.longest for r in kept), default=0)
    about = {"reasons": reasons, "templates": sorted(templates), "limits": [int(largest), longest]}
    # Not save_file, which reports a full disk as an error of its own.
    path.write_bytes(save(arrays, metadata={"about": json.dumps(about)}))
