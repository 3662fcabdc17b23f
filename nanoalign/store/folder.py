"""Where encoded data and log-probabilities are kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoalign.errors import RunError, in_a_line


def cache_folder(given: str | None) -> Path:
    """--cache; else $NANOALIGN_CACHE; else nanoalign in $XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanoalign"
    return Path(given or os.environ.get("NANOALIGN_CACHE") or default).expanduser()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Names the folder, and what to do, in the error of a write to it."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cache folder '{folder}' can't be written: {in_a_line(error)}; give another --cache"
        ) from error
