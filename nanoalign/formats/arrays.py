"""JSON arrays of records."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.formats.sources import Numbered


def array_of(text: str, path: Path) -> Iterator[Numbered]:
    """The elements of a JSON array, decoded one by one, so that each has its line number.

    The elements of one line are 7, 7.2, 7.3: the names of records differ.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    place = blank.match(text, blank.match(text).end() + 1).end()  # behind the bracket
    line, counted, number, before = 1, 0, 0, 0
    if text[place : place + 1] == "]":
        return _check_end(text, place + 1, path)
    while True:
        line, counted = line + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise RunError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
            ) from error
        except (ValueError, RecursionError) as error:  # 5,000 digits; nested 1,000 deep
            raise RunError(f"{path}:{line}: not valid JSON: {error}") from error
        number, before = number + 1 if line == before else 1, line
        yield line if number == 1 else f"{line}.{number}", f"{path}:{line}", record
        place = blank.match(text, place).end()
        separator = text[place : place + 1]
        if separator == "]":
            return _check_end(text, place + 1, path)
        if separator != ",":
            at = line + text.count("\n", counted, place)
            raise RunError(
                f"{path}:{at}: not valid JSON: expected ',' or ']' after a record, found "
                f"{separator!r}"
            )
        place = blank.match(text, place + 1).end()


def _check_end(text: str, place: int, path: Path) -> None:
    if rest := text[place:].strip():
        line = text.count("\n", 0, text.index(rest, place)) + 1
        raise RunError(f"{path}:{line}: not valid JSON: {rest[:40]!r} follows the list of records")
