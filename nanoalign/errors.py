"""The error that is meant for the user."""

import unicodedata
from functools import cache


class RunError(ValueError):
    """A mistake that the user can mend: its message names what is wrong, the value, what to do.

    Scripts print the message alone and exit with code 1. Other exceptions keep their traceback.
    """


def in_a_line(error: BaseException) -> str:
    """The error of another library in one line: its type, 300 characters of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


LENGTH = 3000  # characters of an error: more of a message would hide what precedes it
TAIL = 2000  # of these, at its end, where it says what to do


def visible(text: str) -> str:
    """The text with controls as escapes: \\x1b, \\u202e, \\ud800. Line ends and tabs stay.

    They move the cursor or change colours of a terminal (controls), reorder the text (bidirectional
    marks), or can't be encoded (lone surrogates).
    """
    return "".join(map(_visible, text))


def in_short(text: str) -> str:
    """The visible text of an error in one line of at most LENGTH characters."""
    text = visible(text).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= LENGTH:
        return text
    return f"{text[: LENGTH - TAIL]} [...] {text[-TAIL:]}"


@cache
def _visible(character: str) -> str:
    # Categories: Cc controls, Cs surrogates, Cf formats, of which joiners are parts of words.
    kind = unicodedata.category(character)
    bidirectional = unicodedata.bidirectional(character) in BIDIRECTIONAL
    if character in "\n\t\u200c\u200d" or not (kind in ("Cc", "Cs") or bidirectional):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
