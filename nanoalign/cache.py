"""Encodes data once: in parallel over the ranks of a host, into a store that later runs find again.

The store's name is a hash of all that its content follows from: the data, the tokenizer, the settings, the
versions of the libraries and the source of the code that encodes. So a change of any of them is met by
another store, and an old one is never wrong; it may be removed at any time.

Memory is bounded by one chunk of records on each rank, whatever the size of the data. On disk a store
takes twice its size while it is made.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm

from nanoalign import data, records, rows, store, templates
from nanoalign.data import files_of, stream_examples
from nanoalign.distributed import World, on_all, print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Example
from nanoalign.store import Store, encode_part, join

CHUNK = 2048  # records that a rank holds at a time
STALE = 24 * 3600  # seconds without a new part, after which what is unfinished was killed
ENCODERS = (data, records, rows, store, templates)  # modules that decide over what is encoded
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.jinja")
STOPPED = "stopped"  # tells the other ranks of the host that one has met an error


@dataclass(frozen=True)
class Encoding:
    """What is encoded, and how."""

    sources: list[str]
    preferences: tuple[str, ...]
    unpaired: bool  # whether single responses with a label will do
    conditions: tuple[str, ...]  # preferences that prompts are to name
    template: str
    max_length: int
    tokenizer: object
    model: Path  # the folder that the tokenizer came from

    def key(self) -> tuple[str, int | None]:
        """(a hash of all that decides, how many records there are at most if that is easily told)."""
        settings = (
            self.preferences,
            self.unpaired,
            self.conditions,
            self.template,
            self.max_length,
        )
        versions = (transformers.__version__, tokenizers.__version__)
        digest = hashlib.sha256(repr((settings, versions, type(self.tokenizer))).encode())
        for module in ENCODERS:
            _add_file(digest, Path(module.__file__))
        for path in sorted({p for pattern in TOKENIZER_FILES for p in self.model.glob(pattern)}):
            if path.is_file():
                digest.update(path.name.encode())
                _add_file(digest, path)
        lines: int | None = 0
        for source in self.sources:
            name, files = files_of(source)
            digest.update(f"\n{name}\n".encode())
            for path in files:
                found = _add_file(digest, path)
                lines = lines + found if lines is not None and path.suffix == ".jsonl" else None
        return digest.hexdigest()[:32], lines

    def chunks(self, rank: int, ranks: int) -> Iterator[tuple[int, list[Example]]]:
        """(number, examples) of each chunk that falls to `rank`: every `ranks`-th."""
        numbered = stream_examples(
            self.sources,
            self.preferences,
            self.unpaired,
            mine=lambda record: record // CHUNK % ranks == rank,
        )
        for number, chunk in groupby(numbered, key=lambda each: each[0] // CHUNK):
            yield number, [example for _, example in chunk]


def encoded(encoding: Encoding, folder: str | None, world: World) -> Store:
    """The store of an encoding, found in the cache or made; prints which, and how long it took.

    folder: the cache, by default cache_folder's. Every rank must call it. Raises RunError on all ranks for
    what any of them meets: see data.stream_examples and rows.encode_all.
    """
    start, cache = time.perf_counter(), cache_folder(folder)
    # Hosts do not share a disk, or need not: each has its own cache, which its first rank opens.
    local = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    opened = on_all(world, partial(_open, encoding, cache) if local == 0 else lambda: None)
    final, unfinished, total = opened[world.rank - local]
    try:
        share = partial(_encode_share, encoding, unfinished, local, ranks, total, world.is_main)
        on_all(world, share if unfinished else lambda: None)
        finish = partial(_finish, unfinished, final)
        on_all(world, finish if unfinished and local == 0 else lambda: None)
    finally:
        if unfinished and local == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    how = f"encoded in {seconds:.1f} s on {ranks} rank{'s' * (ranks > 1)}, kept in"
    print0(f"{'rows':<11} {how if unfinished else 'read from'} {final}")
    return Store(final)


def cache_folder(given: str | None) -> Path:
    """--cache, or what the environment says."""
    environment = os.environ.get("NANOALIGN_CACHE")
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanoalign"
    return Path(given or environment or default).expanduser()


def _open(encoding: Encoding, cache: Path) -> tuple[Path, Path | None, int | None]:
    """(the store's folder, a new one for its parts unless it is there, at most so many records)."""
    key, total = encoding.key()
    final = cache / key
    if final.exists():
        return final, None, total
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(".*.partial"):
            with suppress(FileNotFoundError):  # another run has ended just now
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old, ignore_errors=True)
        return final, Path(tempfile.mkdtemp(".partial", f".{key}.", cache)), total


def _encode_share(
    encoding: Encoding, folder: Path, local: int, ranks: int, total: int | None, shows: bool
) -> None:
    """Writes the chunks of one of the host's ranks, until all are written or another rank fails."""
    # Of a long wait it says how long it will be.
    bar = tqdm(total=total, unit=" records", delay=10, desc="encoding", disable=not shows)
    try:
        for number, examples in encoding.chunks(local, ranks):
            if (folder / STOPPED).exists():
                return
            arrays = encode_part(
                examples, encoding.tokenizer, encoding.template, encoding.max_length,
                encoding.conditions,
            )  # fmt: skip
            with _writing(folder.parent):
                np.savez(folder / f"{number:09d}.npz", **arrays)
            # The other ranks are as far.
            bar.update(min(number * CHUNK + len(examples) * ranks, total or np.inf) - bar.n)
    except (RunError, OSError):
        (folder / STOPPED).touch()
        raise
    finally:
        bar.close()


def _finish(unfinished: Path, final: Path) -> None:
    """Joins the parts into a store, which gets its name when it is whole."""
    with _writing(final.parent):
        join(sorted(unfinished.glob("*.npz")), unfinished / "whole")
        try:
            (unfinished / "whole").rename(final)
        except OSError:
            if not final.exists():  # else another run has made the same meanwhile
                raise


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cache folder '{cache}' can't be written: {in_a_line(error)}; give another with --cache"
        ) from error


def _add_file(digest, path: Path) -> int:
    """Adds a file's content to a hash; returns how many lines it has."""
    lines = 0
    digest.update(path.stat().st_size.to_bytes(8, "little"))
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            lines += block.count(b"\n")
    return lines
