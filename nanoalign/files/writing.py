"""Files that are whole or not there, also after a kill, a full disk or a power cut.

A file is written under a hidden name, synced to the disk, and renamed. So nothing is written
through a link: a link that has the name is replaced.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoalign.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden path beside `path`, to write a file to; at the end it is renamed to `path`.

    If the block fails, `path` stays as it was, and the hidden file is removed. The suffix of both
    is the same. Raises OSError, which names a file.
    """
    hidden = hidden_name(path)
    hidden.unlink(missing_ok=True)  # of a process that was killed, or a link
    try:
        yield hidden
        sync(hidden)
        os.replace(hidden, path)
    except OSError as error:
        raise with_path(error, path) from error
    finally:
        hidden.unlink(missing_ok=True)
    sync(path.parent)


def hidden_name(path: Path) -> Path:
    """The path beside `path` to which `replacing` lets a file be written."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8, whatever the locale. Raises OSError; then `path` is as before."""
    with replacing(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def append(path: Path, line: str) -> None:
    """Adds a line to a file, which is made if it is missing.

    Raises RunError for a link, and OSError, which names the file.
    """
    check_no_link(path)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise with_path(error, path) from error


def with_path(error: OSError, path: Path) -> OSError:
    """Returns the error with the path, unless it names a file: that of a full disk names none."""
    return (
        error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))
    )


def check_no_link(path: Path) -> None:
    """Raises RunError if the path is a link, through which another file would be changed."""
    if path.is_symlink():
        raise RunError(f"{path} is a link to {os.readlink(path)}; remove the link")


def sync(path: Path) -> None:
    """Returns when the disk has a file's content, or a folder's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when the disk has a folder with all that is in it. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
