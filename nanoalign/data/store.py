"""Where encoded data and log-probabilities are kept, in folders of their owner alone."""

import hashlib
import json
import os
import shutil
import time
import uuid
from argparse import Namespace
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

import nanoalign
from nanoalign.batch import Row
from nanoalign.data.held_out import training_mask
from nanoalign.data.sources import named, parse_source, read_records
from nanoalign.data.split import (
    EQUAL_RESPONSES,
    EQUAL_SCORES,
    Data,
    describe,
    digest,
    drop_equal,
    hold_out,
    record_digests,
)
from nanoalign.data.templates import encode_records, resolve_template
from nanoalign.distributed import World, print0, progress_bar
from nanoalign.errors import RunError, in_a_line
from nanoalign.files import checksums
from nanoalign.flags import Parser
from nanoalign.ranks.collectives import gather, on_every
from nanoalign.records import Format, Record


def add_arguments(parser: Parser) -> None:
    parser.add_argument_group("what is kept on disk").add_argument(
        "--cache", metavar="FOLDER",
        help="keep encoded data here for further runs; default: data of less than 64 MiB are "
        "not kept, others in $NANOALIGN_CACHE, or nanoalign in $XDG_CACHE_HOME or "
        "~/.cache")  # fmt: skip


def cache_folder(given: str | None) -> Path:
    """--cache; else $NANOALIGN_CACHE; else nanoalign in $XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanoalign"
    return Path(given or os.environ.get("NANOALIGN_CACHE") or default).expanduser()


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, which their owner alone can read.

    A folder that is there keeps its permissions.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)  # another rank may be first


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Names the folder, and what to do, in the error of a write to it."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cache folder '{folder}' can't be written: {in_a_line(error)}; give another --cache"
        ) from error


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


CHUNK = 2048  # records that a rank has in memory at a time
STALE = 24 * 3600  # seconds without a new file, after which an unfinished store is of a killed run
# The code on which the content of a store depends.
CODE = ("batch.py", "encode.py", "records.py", "data/*.py")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.jinja")
STOPPED = "stopped"  # a file that lets the other ranks of a host know of an error


@dataclass(frozen=True)
class Encoding:
    """How records are read and encoded."""

    tokenizer: object
    folder: Path  # of the tokenizer
    max_length: int
    template: str
    # (sources, which records by number) -> these records
    read: Callable[[Sequence[str], Callable[[int], bool]], Iterator[Record]]
    change: Callable[[Record], list[Record]]  # makes the records that are encoded (--condition)
    settings: tuple  # what decides over `read` and `change`; its repr is part of the key

    def key(self, sources: Sequence[str]) -> tuple[str, int | None]:
        """(hash of all that decides over the store, lines of the files if all are .jsonl)."""
        how = (self.settings, self.template, self.max_length, type(self.tokenizer))
        versions = (FORMAT, transformers.__version__, tokenizers.__version__)
        digest = hashlib.sha256(repr((how, versions)).encode())
        for folder, patterns in (
            (Path(nanoalign.__file__).parent, CODE),
            (self.folder, TOKENIZER_FILES),
        ):
            for path in sorted({path for each in patterns for path in folder.glob(each)}):
                if path.is_file():
                    digest.update(path.name.encode())
                    add_file(digest, path)
        lines: int | None = 0
        for source in map(parse_source, sources):
            digest.update(repr(source.key).encode())
            for path in (files := source.files()):
                digest.update(path.name.encode() * (len(files) > 1))  # part of a record's name
                found = add_file(digest, path)
                lines = lines + found if lines is not None and path.suffix == ".jsonl" else None
        return digest.hexdigest()[:32], lines

    def chunks(
        self, sources: Sequence[str], rank: int, ranks: int
    ) -> Iterator[tuple[int, list[Record]]]:
        """(number, records) of the chunks of a rank: every `ranks`-th chunk."""
        records = self.read(sources, lambda number: number // CHUNK % ranks == rank)
        number = rank
        while chunk := list(islice(records, CHUNK)):
            yield number, chunk
            number += ranks

    def write(self, path: Path, records: Sequence[Record]) -> None:
        """Encodes the records of a chunk, and writes its file."""
        changed = [self.change(record) for record in records]
        flat = [record for own in changed for record in own]
        rows = encode_records(flat, self.tokenizer, self.max_length, self.template)
        names = {resolve_template(self.template, r.prompt, self.tokenizer) for r in records}
        with writing(path.parent.parent):
            pairs = [len(record.pairs) for record in flat]
            write_chunk(path, rows, record_digests(records), pairs, names)


def encoded(encoding: Encoding, sources: Sequence[str], cache: Path, world: World) -> Store:
    """The store of some sources, from the cache or made now; prints which. A collective.

    Raises RunError on all ranks for an error of any rank.
    """
    start = time.perf_counter()
    # Hosts need not share a disk: each has a cache of its own, which its first rank opens.
    local = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    find = partial(find_or_open, encoding, sources, cache) if local == 0 else lambda: None
    final, unfinished, total = gather(on_every(world, find), world)[world.rank - local]
    if unfinished:
        bar = progress_bar(total, "record", world.is_main, delay=10, desc="encoding")
        try:
            on_every(
                world, partial(write_share, encoding, sources, unfinished, (local, ranks), bar)
            )
            on_every(world, partial(finish, unfinished, final) if local == 0 else lambda: None)
        finally:
            bar.close()
            if local == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    how = f"encoded in {seconds:.1f} s on {ranks} rank{'s' * (ranks > 1)}, kept in"
    print0(f"{'rows':<11} {how if unfinished else 'read from'} {final}")
    return Store(final)


def find_or_open(
    encoding: Encoding, sources: Sequence[str], cache: Path
) -> tuple[Path, Path | None, int | None]:
    """(folder of the store, folder to write its files to, number of its records).

    The second is None if the store is there; the third is None if no file shows it cheaply.
    """
    key, total = encoding.key(sources)
    final, unfinished = cache / key, cache / f".{key}.{uuid.uuid4().hex}.partial"
    if final.exists():
        try:
            checksums.verify(final)
        except RunError as error:
            raise RunError(f"{final}: of the encoded data {error}; remove that folder") from error
        return final, None, total
    with writing(cache):
        make_private(cache)
        for old in cache.glob(".*.partial"):
            with suppress(FileNotFoundError):  # another run has ended just now
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old, ignore_errors=True)
        make_private(unfinished)
    return final, unfinished, total


def write_share(
    encoding: Encoding, sources: Sequence[str], folder: Path, place: tuple[int, int], bar: tqdm
) -> None:
    """Writes the chunks of a rank, until all are written or another rank fails.

    place: (rank on this host, ranks of it).
    """
    try:
        for number, records in encoding.chunks(sources, *place):
            if (folder / STOPPED).exists():
                return
            encoding.write(folder / name_of(number), records)
            done = number * CHUNK + len(records) * place[1]  # the other ranks are as far
            bar.update(min(done, bar.total or done) - bar.n)
    except (RunError, OSError):
        (folder / STOPPED).touch()
        raise


def finish(unfinished: Path, final: Path) -> None:
    """Gives a folder whose files are all written its name."""
    with writing(final.parent):
        about = {"format": FORMAT, "chunks": len(list(unfinished.glob("*.safetensors")))}
        (unfinished / ABOUT).write_text(json.dumps(about) + "\n")
        checksums.write(unfinished, checksums.checksums(unfinished.iterdir()))
        try:
            unfinished.rename(final)
        except OSError:
            if not final.exists():  # else another run has made the same meanwhile
                raise


def add_file(digest, path: Path) -> int:
    """Adds the content of a file to a hash; returns how many lines it has."""
    lines = 0
    digest.update(path.stat().st_size.to_bytes(8, "little"))
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            lines += block.count(b"\n")
    return lines


def load_rows(
    args: Namespace, tokenizer, folder: Path, known: dict[tuple[str, ...], Format],
    change: Callable[[Record], list[Record]], settings: tuple, world: World,
) -> Data:  # fmt: skip
    """As formats.rows.load_rows. known, change: formats, and what changes a record, by settings."""
    read = partial(read_records, known)
    how = (args.max_length, args.template, read, change, settings)
    return load(args, Encoding(tokenizer, folder, *how), world)


def load(args: Namespace, encoding: Encoding, world: World) -> Data:
    """What formats.rows.in_memory returns and prints, with rows on disk. A collective."""
    cache = cache_folder(args.cache)
    training = encoded(encoding, args.data, cache, world)
    if args.eval_data:
        other, source = encoded(encoding, args.eval_data, cache, world), named(args.eval_data)
        held = np.ones(len(other.records), dtype=bool)
        chosen = training_mask(training.records, other.records, args.eval_data)
    else:
        other, source = training, f"{args.eval_share:g} of the prompts"
        held = hold_out(training.records[:, 0], args.eval_share, args.seed)
        chosen = ~held
    digests = training.records[chosen & training.with_rows()], other.records[held]
    chosen, held = training.encoded(chosen), other.encoded(held)
    records, pairs, counts = training.counts(chosen)
    describe("data", named(args.data), records, pairs, counts)
    describe("held out", source, *other.counts(held))
    templates = training.templates | other.templates
    template = templates.pop() if len(templates) == 1 else args.template
    return Data(training.rows(chosen), other.rows(held), counts, template, digests)
