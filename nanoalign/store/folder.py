"""Where encoded data and log-probabilities are kept, in folders of their owner alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoalign.errors import RunError, in_a_line


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
