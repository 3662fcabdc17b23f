"""Text of data, models and errors as a terminal, a log or a page may show it."""

import logging
import os
import unicodedata
from collections.abc import Sequence
from functools import cache

LENGTH = 3000  # characters of an error: more of a message would hide what precedes it
TAIL = 2000  # of these, at its end, where it says what to do
# Marks that reorder the text around them; unicodedata.bidirectional gives these names.
BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def visible(text: str) -> str:
    """The text with controls as escapes: \\x1b, \\u202e, \\ud800. Line ends and tabs stay.

    Controls move the cursor or change the colours of a terminal, bidirectional marks reorder the
    text, and lone surrogates can't be encoded.
    """
    return "".join(map(_visible, text))


def in_short(text: str) -> str:
    """The visible text of an error in one line of at most LENGTH characters."""
    text = visible(text).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= LENGTH:
        return text
    return f"{text[: LENGTH - TAIL]} [...] {text[-TAIL:]}"


def printable(record: logging.LogRecord) -> bool:
    """A filter that keeps each record of a log, with its controls as escapes."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def named(sources: Sequence[str]) -> str:
    """The sources with spaces between them; repr of one that has unprintable characters."""
    return " ".join(each if each.isprintable() else repr(each) for each in sources)


def readable(path: str | os.PathLike[str], base: str = "") -> str:
    """A path, relative to `base` if that is given, as text in UTF-8, which its bytes may not be."""
    name = os.path.relpath(path, base) if base else os.fspath(path)
    return name.encode(errors="replace").decode()


@cache
def _visible(character: str) -> str:
    # Categories: Cc controls, Cs surrogates. Cf (formats) has joiners, which are parts of words.
    kind = unicodedata.category(character)
    bidirectional = unicodedata.bidirectional(character) in BIDIRECTIONAL
    if character in "\n\t\u200c\u200d" or not (kind in ("Cc", "Cs") or bidirectional):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
