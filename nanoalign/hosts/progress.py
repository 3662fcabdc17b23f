"""Progress bars on standard error."""

import sys

from tqdm import tqdm

SECONDS = 10.0  # between two lines, where standard error is a file


class Lines:
    """Standard error without a terminal: each state of a bar is a line, without \\r before it."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)


def progress_bar(total: int | None, unit: str, shown: bool = True, **options: object) -> tqdm:
    """A bar on a terminal; elsewhere a line each 10 s at most, and one at the end of a longer run.

    options: further ones of tqdm.
    """
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return tqdm(total=total, unit=unit, disable=not shown, dynamic_ncols=True, **options)
