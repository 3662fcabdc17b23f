"""Sources of data -> a store: encoded once, by all ranks of a host, and found again by later runs.

The name of a store is a hash of all that it depends on: the data, the tokenizer, the settings, the
versions of libraries and the code that encodes. So no store is out of date; it can be removed at
any time.

Memory is bounded by one chunk of records a rank, whatever the size of the data.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import tokenizers
import transformers
from tqdm import tqdm

import nanoalign
from nanoalign.checkpoints import checksums
from nanoalign.distributed import World, print0
from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats.rows import record_digests
from nanoalign.formats.sources import parse_source
from nanoalign.formats.templates import encode_records, resolve_template
from nanoalign.hosts.collectives import gather, on_every
from nanoalign.hosts.progress import progress_bar
from nanoalign.store.disk import ABOUT, FORMAT, Store, name_of, write_chunk
from nanoalign.store.folder import make_private, writing

CHUNK = 2048  # records that a rank has in memory at a time
STALE = 24 * 3600  # seconds without a new file, after which an unfinished store is of a killed run
# The code on which the content of a store depends.
CODE = ("batch.py", "encode.py", "pairs.py", "checkpoints/resume.py", "formats/*.py",
        "rewards/condition.py", "rewards/several.py", "store/disk.py",
        "store/encode.py")  # fmt: skip
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
