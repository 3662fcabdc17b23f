"""Large data: encoded records in a folder on disk.

    rows.bin          the rows, one behind the other, each as the bytes that `pack` makes of it
    offsets.npy       (N + 1,)        where each row begins in rows.bin, in bytes
    lengths.npy       (N,)            tokens of each row
    longest.npy       (N,)            tokens of its prompt and its longest response
    largest.npy       (N,)            its largest token id
    responses.npy     (N,)            how many responses it has
    fingerprints.npy  (N, 16) uint8   split.digest of it
    digests.npy       (R, 3) uint64   split.record_digests of the records
    kept.npy          (E,) bool       whether what was encoded has a row; E / R rows a record
    compared.npy      (E,)            its pairs, before those of equal responses were dropped
    notes.jsonl       (E lines)       what was cut or dropped of it, a list of texts
    templates.npy     text            names of the templates that rendered the records
    checksums.json

The ranks of a host encode chunks of records in parallel, a file each; the first rank of the host
then joins the files. The folder's name is a hash of all that decides over the rows, so it is never
out of date. Its arrays are mapped into memory; a row is read when it is accessed.
"""

import hashlib
import io
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm

import nanoalign
from nanoalign.batch import Row
from nanoalign.data import cache
from nanoalign.data.encoding import Encoding
from nanoalign.data.sources import parse_source
from nanoalign.data.split import Encoded, digest, drop_equal, record_digests
from nanoalign.distributed import World, print0, progress_bar
from nanoalign.files import checksums
from nanoalign.ranks.collectives import gather, on_every
from nanoalign.records import Record

FORMAT = 5  # version of these files; a part of their key
CHUNK = 2048  # records that a rank has in memory at a time
ROWS, NOTES = "rows.bin", "notes.jsonl"
# The files on which the rows depend beside the data: our code, and those of the tokenizer.
CODE = ("batch.py", "encode.py", "records.py", "data/*.py")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "**/*.jinja")


class Store(Encoded):
    """The encoded records of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        self.digests, self.kept = self.arrays["digests"], self.arrays["kept"]
        self.compared = self.arrays["compared"]
        self.templates = set(self.arrays["templates"].tolist())

    @property
    def notes(self) -> Iterator[list[str]]:
        with (self.folder / NOTES).open() as file:
            yield from map(lru_cache(json.loads), file)

    def rows(self, chosen: np.ndarray) -> "StoredRows":
        return StoredRows(self, np.flatnonzero(self.of_encoded(chosen)[self.kept]))

    def row(self, n: int) -> Row:
        """Reads row n of all rows from the disk."""
        start, end = self.arrays["offsets"][n : n + 2].tolist()
        with (self.folder / ROWS).open("rb") as file:
            file.seek(start)
            return unpack(file.read(end - start))


class StoredRows(Sequence[Row]):
    """Rows of a store by their indices. Each is read when it is accessed; a slice reads none."""

    def __init__(self, store: Store, indices: np.ndarray):
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return StoredRows(self.store, self.indices[place])
        return self.store.row(int(self.indices[place]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (N,)."""
        return self.store.arrays["lengths"][self.indices]

    @property
    def responses(self) -> np.ndarray:
        """How many responses each row has, (N,)."""
        return self.store.arrays["responses"][self.indices]

    @property
    def limits(self) -> tuple[int, ...]:
        """(the largest token id; the most tokens of a prompt and one response) of all rows."""
        arrays = (self.store.arrays[name][self.indices] for name in ("largest", "longest"))
        return tuple(int(array.max(initial=0)) for array in arrays)

    def fingerprint(self) -> str:
        """Returns what split.fingerprint computes of the same rows in memory."""
        digests = self.store.arrays["fingerprints"][self.indices]
        return hashlib.sha256(digests.tobytes()).hexdigest()


def pack(row: Row) -> bytes:
    """Returns the row, without its notes, as bytes: a line of JSON, then its tokens as int32."""
    parts = (row.prompt, *row.responses)
    extra = {name: (values.dtype.str, values.tolist()) for name, values in row.extra.items()}
    about = json.dumps((row.name, list(map(len, parts)), row.pairs, extra))
    return about.encode() + b"\n" + np.concatenate(parts).tobytes()


def unpack(data: bytes) -> Row:
    """Returns the row of which `pack` made these bytes."""
    about, _, tokens = data.partition(b"\n")
    name, lengths, pairs, extra = json.loads(about)
    prompt, *responses = np.split(np.frombuffer(tokens, np.int32), np.cumsum(lengths)[:-1])
    values = {key: np.array(each, dtype) for key, (dtype, each) in extra.items()}
    return Row(name, prompt, tuple(responses), tuple(map(tuple, pairs)), values)


# --- found or written -----------------------------------------------------------------------------


def open_store(
    encoding: Encoding, tokenizer_folder: Path, sources: Sequence[str], folder: Path, world: World
) -> Store:
    """Returns the store of some sources, in a folder of `folder`; writes it if it does not exist.

    Prints whether it was written or read, and where it is. tokenizer_folder: with the files of the
    tokenizer. A collective: raises RunError on all ranks for an error of any rank.
    """
    start = time.perf_counter()
    # Hosts need not share a disk: each has a cache of its own, which its first rank opens.
    local = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def find() -> tuple[Path, Path | None] | None:
        if local != 0:
            return None
        path = folder / key(encoding, tokenizer_folder, sources)
        if path.exists():
            cache.check(path, "the encoded data")
            return path, None
        return path, cache.begin(path)

    def finish() -> None:
        if local == 0:
            with cache.writing(folder):
                join(unfinished)
            cache.complete(unfinished, path)

    path, unfinished = gather(on_every(world, find), world)[world.rank - local]
    if unfinished:
        bar = progress_bar(None, "record", world.is_main, delay=10, desc="encoding")
        try:
            with bar:
                write = partial(write_chunks, encoding, sources, unfinished, local, ranks, bar)
                on_every(world, write)
            on_every(world, finish)
        finally:
            if local == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    how = f"encoded in {seconds:.1f} s on {ranks} rank{'s' * (ranks > 1)}, kept in"
    print0(f"{'rows':<11} {how if unfinished else 'read from'} {path}")
    return Store(path)


def key(encoding: Encoding, folder: Path, sources: Sequence[str]) -> str:
    """Returns the name of a store: a hash of all that its rows depend on, as 32 digits.

    That is settings, versions, sources and the contents of their files, our code, and the files of
    the tokenizer, which are in `folder`.
    """
    package, parsed = Path(nanoalign.__file__).parent, list(map(parse_source, sources))
    versions = (FORMAT, transformers.__version__, tokenizers.__version__)
    hashed = hashlib.sha256(repr((encoding.key, versions, parsed)).encode())
    files = [
        path
        for root, patterns in ((package, CODE), (folder, TOKENIZER_FILES))
        for path in sorted({path for pattern in patterns for path in root.glob(pattern)})
    ]
    for path in [*files, *(path for source in parsed for path in source.files())]:
        if path.is_file():
            hashed.update(path.name.encode())
            hashed.update(checksums.digest_of_file(path))
    return hashed.hexdigest()[:32]


def write_chunks(
    encoding: Encoding, sources: Sequence[str], folder: Path, rank: int, ranks: int, bar: tqdm
) -> None:
    """Encodes the chunks rank, rank + ranks, ... of the records; writes each as a file of `folder`.

    All ranks read all records, because encoding takes most of the time. bar: is moved on by each
    record that is read.
    """
    records = encoding.read(sources)
    for number in count():
        if not (chunk := list(islice(records, CHUNK))):
            return
        if number % ranks == rank:
            file = io.BytesIO()  # np.savez reports a full disk where it closes a file
            np.savez(file, **arrays_of(chunk, encoding))
            with cache.writing(folder.parent):
                (folder / f"{number:09d}.npz").write_bytes(file.getbuffer())
        bar.update(len(chunk))


def arrays_of(records: Sequence[Record], encoding: Encoding) -> dict[str, np.ndarray]:
    """Returns the files of a store of these records alone, as arrays by name without suffix.

    rows.bin and notes.jsonl are arrays of bytes; "offsets" has the bytes of each row, (N,).
    """
    encoded, compared, templates = encoding.encode(records)
    dropped = [drop_equal(row) for row in encoded]
    rows = [row for row, _ in dropped if row is not None]
    packed = list(map(pack, rows))
    notes = "".join(json.dumps(each) + "\n" for _, each in dropped)
    largest = [max(int(part.max()) for part in (row.prompt, *row.responses)) for row in rows]
    return {
        "rows": np.frombuffer(b"".join(packed), np.uint8),
        "offsets": np.array(list(map(len, packed)), np.int64),
        "lengths": np.array(list(map(len, rows)), np.int64),
        "longest": np.array([row.longest for row in rows], np.int32),
        "largest": np.array(largest, np.int32),
        "responses": np.array([len(row.responses) for row in rows], np.int32),
        "fingerprints": np.frombuffer(b"".join(map(digest, rows)), np.uint8).reshape(-1, 16),
        "digests": record_digests(records),
        "kept": np.array([row is not None for row, _ in dropped]),
        "compared": np.array(compared, np.int32),
        "notes": np.frombuffer(notes.encode(), np.uint8),
        "templates": np.array(sorted(templates)),
    }


def join(folder: Path) -> None:
    """Joins the chunks in a folder, NUMBER.npz, into the files of a store, and removes them.

    Of rows and notes one chunk is in memory at a time.
    """
    joined = defaultdict(list)
    with (folder / ROWS).open("wb") as rows, (folder / NOTES).open("wb") as notes:
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                arrays = dict(file)
            path.unlink()
            rows.write(arrays.pop("rows"))
            notes.write(arrays.pop("notes"))
            for name, values in arrays.items():
                joined[name].append(values)
    of_all = {name: np.concatenate(parts) for name, parts in joined.items()}
    of_all["offsets"] = np.append(0, np.cumsum(of_all["offsets"]))
    of_all["templates"] = np.unique(of_all["templates"])
    for name, values in of_all.items():
        np.save(folder / f"{name}.npy", values)
