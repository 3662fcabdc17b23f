"""Checksums of the files of a folder: a changed bit in one of them is an error, not a result.

checksums.json    {"NAME": CRC-32 of the file, as 8 hexadecimal digits}

CRC-32 finds what a disk or a network has changed, at some 3 GB/s; it is no protection from people.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
        about = path.stat()
        digest.update(digest_of_file(path, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


@lru_cache  # files of many gigabytes may be asked for twice: by a checkpoint, by a kept reference
def digest_of_file(path: Path, size: int, mtime_ns: int) -> bytes:
    """Returns the SHA-256 of a file, at about 800 MB/s.

    size, mtime_ns: those of the file, so that the kept result of a changed file is not returned.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
