"""The folder of what is kept for further runs: encoded data, log-probabilities of a reference.

They hold the text of the data, so folders that are made here are readable by their owner alone.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.files import checksums
from nanoalign.files.text import in_a_line
from nanoalign.files.writing import sync, sync_tree
from nanoalign.flags import Parser

AGAIN = "remove this folder, and the next run makes it again"
STALE = 24 * 3600  # seconds without a new file, after which an unfinished folder is removed


def add_arguments(parser: Parser) -> None:
    parser.add_argument_group("what is kept on disk").add_argument(
        "--cache",
        metavar="FOLDER",
        help="folder in which encoded data and precomputed reference values are kept for later "
        "runs; default: $NANOALIGN_CACHE, else nanoalign/ in $XDG_CACHE_HOME or ~/.cache. Without "
        "this flag, data below 64 MiB are encoded anew in each run",
    )


def cache_folder(given: str | None) -> Path:
    """Returns the folder of --cache, which is `given`, or its default (the help of --cache)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanoalign"
    return Path(given or os.environ.get("NANOALIGN_CACHE") or default).expanduser()


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing; their owner alone can read them.

    A folder that exists keeps its permissions.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)  # another rank may be first


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Turns an OSError inside this context into a RunError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cache folder '{cache}' can't be written: {in_a_line(error)}; give another --cache"
        ) from error


def begin(folder: Path) -> Path:
    """Makes and returns the hidden folder, beside `folder`, in which its files are to be written.

    Removes those of other runs that were killed a day ago, or longer. Raises RunError if the folder
    can't be made.
    """
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with writing(folder.parent):
        make_private(unfinished)
        for old in folder.parent.glob(".*.partial"):
            with suppress(FileNotFoundError):  # another run has ended just now
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old, ignore_errors=True)
    return unfinished


def complete(unfinished: Path, folder: Path) -> None:
    """Writes the checksums of a folder whose files are all written, and renames it to `folder`.

    Leaves both as they are if another run has written `folder` meanwhile. Raises RunError if the
    checksums or the name can't be written.
    """
    with writing(folder.parent):
        checksums.write(unfinished, checksums.checksums(unfinished.iterdir()))
        try:
            sync_tree(unfinished)
            unfinished.rename(folder)
            sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise


def check(folder: Path, what: str) -> None:
    """Raises RunError if a file of the folder is missing or damaged. what: is kept in it."""
    try:
        checksums.verify(folder)
    except RunError as error:
        raise RunError(f"{what} in {folder} are damaged: {error}; {AGAIN}") from error
