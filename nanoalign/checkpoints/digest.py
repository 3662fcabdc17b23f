"""The digest of a model folder: what a resume, and kept log-probabilities, compare."""

import hashlib
from functools import lru_cache
from pathlib import Path


def digest_of_weights(folder: Path) -> str:
    """A hash of the files on which the function of a model depends: config.json and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        about = path.stat()
        digest.update(digest_of_file(path, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


@lru_cache  # files of many gigabytes may be asked for twice: by a checkpoint, by a kept reference
def digest_of_file(path: Path, size: int, mtime_ns: int) -> bytes:
    """SHA-256, at about 800 MB/s. size, mtime_ns: of the file, so that a changed one is read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
