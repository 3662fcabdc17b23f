"""Text of data, models and errors as a terminal, a log or a page may show it; files of JSON."""

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from nanoalign.errors import RunError

LENGTH = 1900  # characters of an error: more of a message would hide what precedes it
TAIL = 1200  # of these, at its end, where it says what to do
# Controls but \t and \n, marks that reorder the text around them, and lone surrogates.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def in_a_line(error: BaseException) -> str:
    """The error of another library in one line: its type, and 300 letters of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def visible(text: str) -> str:
    """Returns the text with the characters of HIDDEN as escapes: \\x1b, \\u202e, \\ud800.

    Controls move the cursor or change the colours of a terminal, and lone surrogates can't be
    encoded.
    """

    def escape(found: re.Match) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return HIDDEN.sub(escape, text)


def in_short(text: str) -> str:
    """Returns the visible text of an error as one line, whose middle is left out beyond LENGTH."""
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= LENGTH:
        return text
    return f"{text[: LENGTH - TAIL]} [...] {text[-TAIL:]}"


def printable(record: logging.LogRecord) -> bool:
    """A filter of a log: makes the text of a record visible, in place. Returns True: keep it."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def printable_output() -> None:
    """Lets standard output write what its encoding lacks as escapes: \\xe9, where it is ASCII."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook has an output of its own
        sys.stdout.reconfigure(errors="backslashreplace")


def in_markdown(text: str) -> str:
    """Returns the visible text as one line in which Markdown and HTML have no meaning."""
    line = visible(text).replace("\n", " ").replace("\t", " ")
    return re.sub(r"([^\w\s.,:;/=%-])", r"\\\1", line)


def in_picture(text: str) -> str:
    """Returns the visible text as matplotlib draws it unchanged: $ begins no formula."""
    return re.sub(r"\\?\$", r"\\$", visible(text))


def named(sources: Sequence[str]) -> str:
    """Returns the sources in one line; one that has unprintable characters as its repr."""
    return " ".join(each if each.isprintable() else repr(each) for each in sources)


def readable(path: str | os.PathLike[str], base: str = "") -> str:
    """Returns a path, relative to `base` if given; bytes that are not UTF-8 become "?"."""
    name = os.path.relpath(path, base) if base else os.fspath(path)
    return name.encode(errors="replace").decode()


def read_json(path: Path) -> dict:
    """Returns the object of a JSON file in UTF-8, whatever the locale.

    Raises OSError for a file that can't be opened, and RunError for one that has no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also what is not UTF-8, and 1,000 brackets
        raise RunError(f"{path}: not valid JSON: {in_a_line(error)}; restore the file") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
