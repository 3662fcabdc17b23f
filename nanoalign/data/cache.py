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

from nanoalign.errors import RunError, in_a_line
from nanoalign.files import checksums
from nanoalign.flags import Parser

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
def writing(cache: Path) -> Iterator[None]:
    """Turns an OSError inside this context into a RunError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cache folder '{cache}' can't be written: {in_a_line(error)}; give another --cache"
        ) from error


def begin(folder: Path) -> Path:
    """Makes the hidden folder in which the files of `folder` are to be written, beside it.

    Removes those that runs have left which were killed a day ago, or longer.
    """
    make_private(folder.parent)
    for old in folder.parent.glob(".*.partial"):
        with suppress(FileNotFoundError):  # another run has ended just now
            if time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    make_private(unfinished)
    return unfinished


def complete(unfinished: Path, folder: Path) -> None:
    """Gives a folder whose files are all written their checksums and its name."""
    checksums.write(unfinished, checksums.checksums(unfinished.iterdir()))
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another run has written the same meanwhile
            raise
