"""Large data: encoded records in a folder, whose arrays are mapped into memory.

    tokens.npy      (T,) int32      all tokens: of each row the prompt, then its responses
    parts.npy       (P,) int32      tokens of each prompt and each response
    pairs.npy       (B, 2) int32    (chosen, rejected): indices of responses of the row
    names.npy       (C,) uint8      the names of the rows in UTF-8
    extra.NAME.npy  (B,)            a value of each pair, where records have such values
    offsets.npy     (N + 1, K)      where each row begins in each of these K arrays, in their order
    digests.npy     (N, 16) uint8   split.digest of each row
    records.npy     (R, 3) uint64   split.record_digests of the records
    kept.npy        (E,) bool       whether what was encoded has a row; E / R rows a record
    compared.npy    (E,) int32      its pairs, before those of equal responses were dropped
    notes.npy       (E,) int64      what was cut or dropped: an index of the notes in about.json
    about.json                      version of these files, names of the K arrays, notes, ...
    checksums.json

The ranks of a host encode chunks of records in parallel, a file each; the first rank of the host
then joins the files. Its name is a hash of all that decides over the rows, so it is never out of
date.
"""

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import accumulate, chain, islice, pairwise
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
from nanoalign.data.split import Encoded, count_notes, digest, drop_equal, record_digests
from nanoalign.distributed import World, print0, progress_bar
from nanoalign.errors import RunError, in_a_line
from nanoalign.files import checksums
from nanoalign.ranks.collectives import gather, on_every
from nanoalign.records import Record

FORMAT = 4  # version of these files; a part of their key
AGAIN = "remove this folder, and the next run encodes them again"
ABOUT = "about.json"
CHUNK = 2048  # records that a rank has in memory at a time
STOPPED = "stopped"  # a file that lets the other ranks of a host know of an error
EXTRA = "extra."  # what the names of arrays with values of pairs begin with
# The files on which the rows depend beside the data: our code, and those of the tokenizer.
CODE = ("batch.py", "encode.py", "records.py", "data/*.py")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.jinja")


class Store(Encoded):
    """The encoded records of a folder."""

    def __init__(self, folder: Path):
        """Raises RunError for a folder of another format, and for files that can't be read."""
        try:
            about = json.loads((folder / ABOUT).read_text())
            self.arrays = {
                path.stem: np.load(path, mmap_mode="r").view(np.ndarray)
                for path in folder.glob("*.npy")
            }
        except (OSError, ValueError) as error:
            raise RunError(
                f"the encoded data in {folder} can't be read: {in_a_line(error)}; {AGAIN}"
            ) from error
        if about.get("format") != FORMAT:
            raise RunError(
                f"the encoded data in {folder} have the format {about.get('format', 0)} of another "
                f"version of nanoalign, not {FORMAT}; {AGAIN}"
            )
        self.columns, self.notes = about["columns"], about["notes"]
        self.templates = set(about["templates"])
        # (token id, tokens of a prompt and one response) that no row exceeds
        self.limits: tuple[int, int] = tuple(about["limits"])
        self.digests, self.kept = self.arrays["records"], self.arrays["kept"]

    def rows(self, chosen: np.ndarray) -> "StoredRows":
        return StoredRows(self, np.flatnonzero(self.of_encoded(chosen)[self.kept]))

    def counts(self, chosen: np.ndarray) -> tuple[int, int, Counter]:
        chosen = self.of_encoded(chosen)
        notes = (self.notes[n] for n in self.arrays["notes"][chosen].tolist())
        pairs = int(self.arrays["compared"][chosen].sum())
        return int(chosen.sum()), pairs, count_notes(chain.from_iterable(notes))

    def sizes(self, name: str) -> np.ndarray:
        """How many values of an array each row has, (N,)."""
        return np.diff(self.arrays["offsets"][:, self.columns.index(name)])

    def row(self, n: int) -> Row:
        starts, ends = self.arrays["offsets"][n : n + 2].tolist()
        values = {
            name: self.arrays[name][start:end]
            for name, start, end in zip(self.columns, starts, ends, strict=True)
        }
        ends = accumulate(values["parts"].tolist(), initial=0)
        prompt, *responses = (values["tokens"][start:end] for start, end in pairwise(ends))
        extra = {name: part for name, part in values.items() if name.startswith(EXTRA)}
        return Row(
            values["names"].tobytes().decode(),
            prompt,
            tuple(responses),
            tuple(map(tuple, values["pairs"].tolist())),
            {name.removeprefix(EXTRA): part for name, part in extra.items() if len(part)},
        )


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
        """What split.fingerprint computes of the same rows in memory."""
        digests = self.store.arrays["digests"][self.indices]
        return hashlib.sha256(digests.tobytes()).hexdigest()


# --- found or written -----------------------------------------------------------------------------


def open_store(
    encoding: Encoding, tokenizer_folder: Path, sources: Sequence[str], folder: Path, world: World
) -> Store:
    """The store of some sources in the cache `folder`, written if it is not there; prints which.

    A collective. Raises RunError on all ranks for an error of any rank.
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
            try:
                checksums.verify(path)
            except RunError as error:
                raise RunError(
                    f"the encoded data in {path} are damaged: {error}; {AGAIN}"
                ) from error
            return path, None
        with cache.writing(folder):
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
    """A hash of all that decides over a store. folder: of the tokenizer."""
    versions = (FORMAT, transformers.__version__, tokenizers.__version__)
    hashed = hashlib.sha256(repr((encoding.key, versions)).encode())

    def add(path: Path) -> None:
        about = path.stat()
        hashed.update(checksums.digest_of_file(path, about.st_size, about.st_mtime_ns))

    package = Path(nanoalign.__file__).parent
    for root, patterns in ((package, CODE), (folder, TOKENIZER_FILES)):
        for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
            if path.is_file():
                hashed.update(path.name.encode())
                add(path)
    for source in map(parse_source, sources):
        hashed.update(repr(source.key).encode())
        for path in (files := source.files()):
            hashed.update(path.name.encode() * (len(files) > 1))  # part of a record's name
            add(path)
    return hashed.hexdigest()[:32]


def write_chunks(
    encoding: Encoding, sources: Sequence[str], folder: Path, rank: int, ranks: int, bar: tqdm
) -> None:
    """Encodes every `ranks`-th chunk of records, and writes a file of each into the folder.

    Ends early where another rank of the host has failed.
    """
    try:
        for number, records in chunks(encoding, sources, rank, ranks):
            if (folder / STOPPED).exists():
                return
            chunk = io.BytesIO()  # np.savez reports a full disk where it closes a file
            np.savez(chunk, **arrays_of(records, encoding))
            with cache.writing(folder.parent):
                (folder / f"{number:09d}.npz").write_bytes(chunk.getbuffer())
            bar.update(len(records) * ranks)  # the other ranks are as far
    except (RunError, OSError):
        (folder / STOPPED).touch()
        raise


def chunks(
    encoding: Encoding, sources: Sequence[str], rank: int, ranks: int
) -> Iterator[tuple[int, list[Record]]]:
    """(number, records) of the chunks of a rank: every `ranks`-th chunk."""
    records = encoding.read(sources, lambda number: number // CHUNK % ranks == rank)
    number = rank
    while chunk := list(islice(records, CHUNK)):
        yield number, chunk
        number += ranks


def arrays_of(records: Sequence[Record], encoding: Encoding) -> dict[str, np.ndarray]:
    """The arrays of a store of these records alone.

    In place of the offsets it has the sizes of the rows, (N, K); `about` is JSON, as bytes.
    """
    encoded, compared, templates = encoding.encode(records)
    dropped = [drop_equal(row) for row in encoded]
    rows = [row for row, _ in dropped if row is not None]
    notes: dict[tuple[str, ...], int] = {}  # the notes of a row -> their index
    parts = [(row.prompt, *row.responses) for row in rows]
    empty = {"pairs": np.empty((0, 2), np.int32), "names": np.empty(0, np.uint8)}
    empty |= {"tokens": np.empty(0, np.int32), "parts": np.empty(0, np.int32)}
    values = {
        "tokens": list(map(np.concatenate, parts)),
        "parts": [np.array(list(map(len, part)), np.int32) for part in parts],
        "pairs": [np.array(row.pairs, np.int32) for row in rows],
        "names": [np.frombuffer(row.name.encode(), np.uint8) for row in rows],
    }
    for name in sorted({name for row in rows for name in row.extra}):
        column = EXTRA + name
        empty[column] = next(row.extra[name][:0] for row in rows if name in row.extra)
        values[column] = [row.extra.get(name, empty[column]) for row in rows]
    arrays = {name: np.concatenate([empty[name], *values[name]], casting="no") for name in values}
    about = {
        "columns": list(values),
        "templates": sorted(templates),
        "limits": [
            int(arrays["tokens"].max(initial=0)),
            max((row.longest for row in rows), default=0),
        ],
    }
    arrays |= {
        "sizes": np.array([list(map(len, values[name])) for name in values], np.int64).T,
        "digests": np.frombuffer(b"".join(map(digest, rows)), np.uint8).reshape(-1, 16),
        "records": record_digests(records),
        "kept": np.array([row is not None for row, _ in dropped]),
        "compared": np.array(compared, np.int32),
        "notes": np.array([notes.setdefault(tuple(each), len(notes)) for _, each in dropped]),
    }
    return arrays | {"about": np.frombuffer(json.dumps(about | {"notes": [*notes]}).encode(), "u1")}


def about_of(path: Path) -> dict:
    """What arrays_of says about a chunk. No other array of the file is read."""
    with np.load(path) as file:
        return json.loads(file["about"].tobytes())


def join(folder: Path) -> None:
    """Joins the files of all chunks, in their order, into the arrays of a store. One is in memory.

    The result does not depend on the size of the chunks.
    """
    paths = sorted(folder.glob("*.npz"))
    columns = sorted({name for path in paths for name in about_of(path)["columns"]})
    notes: dict[tuple[str, ...], int] = {}
    templates, limits, start = set(), (0, 0), np.zeros(len(columns), np.int64)
    with ExitStack() as stack:
        files: dict[str, Callable[[np.ndarray], None]] = {}

        def append(name: str, values: np.ndarray) -> None:
            if name not in files:
                files[name] = stack.enter_context(growing(folder / f"{name}.npy", values))
            files[name](values)

        append("offsets", start[None])
        for path in paths:
            about = about_of(path)
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files if name != "about"}
            path.unlink()
            sizes = np.zeros((len(arrays["sizes"]), len(columns)), np.int64)
            sizes[:, [columns.index(name) for name in about["columns"]]] = arrays.pop("sizes")
            arrays["offsets"] = start + np.cumsum(sizes, axis=0)
            start = start + sizes.sum(axis=0)
            indices = [notes.setdefault(tuple(each), len(notes)) for each in about["notes"]]
            arrays["notes"] = np.array(indices)[arrays["notes"]]
            templates.update(about["templates"])
            limits = np.maximum(limits, about["limits"]).tolist()
            for name, values in arrays.items():
                append(name, values)
    about = {"format": FORMAT, "columns": columns, "notes": list(notes)}
    about |= {"templates": sorted(templates), "limits": limits}
    (folder / ABOUT).write_text(json.dumps(about) + "\n")


@contextmanager
def growing(path: Path, like: np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
    """A new .npy file; yields what appends an array to it, of the type and the axes of `like`."""
    count, descr = 0, np.lib.format.dtype_to_descr(like.dtype)

    def write_header() -> None:
        # numpy leaves room for the digits of the first axis, so the length is always the same.
        header = {"descr": descr, "fortran_order": False, "shape": (count, *like.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)

    def append(values: np.ndarray) -> None:
        nonlocal count
        assert (values.dtype, values.shape[1:]) == (like.dtype, like.shape[1:])
        count += len(values)
        file.write(np.ascontiguousarray(values))

    with path.open("wb") as file:
        write_header()
        yield append
        file.seek(0)
        write_header()
