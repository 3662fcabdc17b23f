"""Text of data, models and errors as a terminal, a log or a page may show it."""

import logging
import os
import re
from collections.abc import Sequence

LENGTH = 3000  # characters of an error: more of a message would hide what precedes it
TAIL = 2000  # of these, at its end, where it says what to do
# Controls but \t and \n, marks that reorder the text around them, and lone surrogates.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


def named(sources: Sequence[str]) -> str:
    """Returns the sources in one line; one that has unprintable characters as its repr."""
    return " ".join(each if each.isprintable() else repr(each) for each in sources)


def readable(path: str | os.PathLike[str], base: str = "") -> str:
    """Returns a path, relative to `base` if given; bytes that are not UTF-8 become "?"."""
    name = os.path.relpath(path, base) if base else os.fspath(path)
    return name.encode(errors="replace").decode()
