"""Checksums of the files of a folder: a changed bit in one of them is an error, not a result.

checksums.json    {"NAME": CRC-32 of the file, as 8 hexadecimal digits}

CRC-32 finds what a disk or a network has changed, at some 3 GB/s; it is no protection from people.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.files.text import read_json
from nanoalign.files.writing import write_text

NAME = "checksums.json"
BLOCK = 2**22  # bytes that are read at a time


def checksums(paths: Iterable[Path]) -> dict[str, str]:
    """Maps the name of each file to its checksum. Several files are read at a time."""
    paths = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return {path.name: crc for path, crc in zip(paths, pool.map(_crc, paths), strict=True)}


def write(folder: Path, of_files: dict[str, str]) -> None:
    """Writes checksums.json. of_files: name of each file -> its checksum."""
    write_text(folder / NAME, json.dumps(of_files, indent=2, sort_keys=True) + "\n")


def verify(
    folder: Path, names: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)
) -> None:
    """Raises RunError if a file of a folder is missing or is not as it was written.

    names: of the files; by default all. share: (rank, ranks): only each ranks-th file is read.
    """
    try:
        written = read_json(folder / NAME)
        names = sorted(written if names is None else names)[share[0] :: share[1]]
        actual = checksums(folder / name for name in names)
        bad = [name for name in names if written[name] != actual[name]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        missing = isinstance(error, FileNotFoundError) and Path(error.filename).name
        raise RunError(f"{missing} is missing" if missing else f"{NAME} is damaged") from error
    if bad:
        raise RunError(f"{bad[0]} is not as it was written (its checksum differs)")


def _crc(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def digest_of_weights(folder: Path) -> str:
    """Returns a SHA-256 of a model folder's config.json and weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(digest_of_file(path))
    return digest.hexdigest()


def digest_of_file(path: Path) -> bytes:
    """Returns the SHA-256 of a file, at about 800 MB/s.

    A blob of the Hub's cache is read once after its download, because the cache names a large file
    by its SHA-256: what was found right is noted in a file beside the blobs, with the size and the
    times of the blob. A blob that was written to since, or was copied, is read again.
    """
    about, blob = path.stat(), blob_of(path)
    # A program may set the time of a change back, but not the second of these times.
    state = f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    if blob is None:
        return _digest(path, state)
    note = blob.parents[1] / "verified" / blob.name
    with suppress(OSError, ValueError):
        if note.read_text() == state:
            return bytes.fromhex(blob.name)
    digest = _digest(path, state)
    if digest.hex() == blob.name:
        with suppress(OSError):  # of a cache that can only be read, or of two hosts that write
            note.parent.mkdir(exist_ok=True)
            write_text(note, state)
    return digest


def blob_of(path: Path) -> Path | None:
    """Returns the blob of a file of a snapshot in the Hub's cache, if its name is a SHA-256.

    The blob may be a link, too: to blobs/XX/ of the whole cache, by a hash of another kind.
    """
    if not path.is_symlink():
        return None
    blob = Path(os.path.normpath(path.parent / os.readlink(path)))
    is_named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob if is_named else None


@lru_cache  # files of many gigabytes may be asked for twice: by a checkpoint, by a kept reference
def _digest(path: Path, state: str) -> bytes:
    """state: size and times, so that the result for a file before a change is not returned."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
