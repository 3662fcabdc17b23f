"""Columns of records: the keys that formats read, and a note of those that nothing reads."""

import re
from collections import Counter
from collections.abc import Collection

from nanoalign.files.text import visible

# Keys by which a format is found.
PAIR = ("prompt", "chosen", "rejected")
DIALOGUES = ("chosen", "rejected")
PKU = ("prompt", "response_0", "response_1")  # PKU-SafeRLHF
RANKED = ("prompt", "responses", "scores")
UNPAIRED, DEMONSTRATION = ("prompt", "completion", "label"), ("prompt", "completion")

LABELS = ("better_response_id", "safer_response_id")  # of PKU-SafeRLHF
TEXTS = ("prompt", "chosen", "rejected", "completion", "response_0", "response_1", "responses")
CONTEXT = {"system", "tools"}  # columns that a record of any format may have
SUBSET = "subset"  # a column of benchmarks: evaluate.py rm has a line of its table for each value
PKU_COLUMNS = r"prompt_source|(better|safer)_response_id|(is_)?response_[01]_\w+"

# Columns of answers that evaluate.py has sampled: their tokens, and the name of their tokenizer.
SAMPLED = ("chosen_tokens", "rejected_tokens", "completion_tokens", "tokenizer")
IMAGES = ("images", "image", "videos")  # columns of pictures
IMAGE_AS_TEXT = "records whose <image> is read as text"
IGNORED = "records with ignored columns: "  # a note begins with it; the names follow
SHOWN = 6  # names in a line
LARGEST = 1e30  # of a margin or a score. Losses are sums in float32, which ends at 3.4e38.


def ignored(names: Collection[str], keys: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a tuple of one note, which names the columns that nothing reads, or of none.

    names: a record's columns beside the `keys` of its format. The margin of a pair and the further
    columns of PKU-SafeRLHF are not named.
    """
    has_margin = keys not in (UNPAIRED, DEMONSTRATION, RANKED)
    unread = set(names) - CONTEXT - ({"margin"} if has_margin else set())
    if keys == PKU:
        unread = {name for name in unread if not re.fullmatch(PKU_COLUMNS, name)}
    return (note_of(name[:40] for name in map(visible, unread)),) if unread else ()


def note_of(names: Collection[str]) -> str:
    """Returns the note of ignored columns of these names."""
    return IGNORED + ", ".join(sorted(names))


def names_in(notes: Collection[str]) -> set[str]:
    """Returns the names in all notes of ignored columns; other notes have none."""
    lists = [note.removeprefix(IGNORED) for note in notes if note.startswith(IGNORED)]
    return {name for names in lists for name in names.split(", ")}


def with_names(notes: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Returns the notes of a record, with these names added to its one note of ignored columns.

    One note, because a record is counted for each of its notes.
    """
    others = [note for note in notes if not note.startswith(IGNORED)]
    return (*others, note_of(names_in(notes).union(names)))


def joined(counts: Counter) -> Counter:
    """Returns the counts of notes with one entry, the last, in place of those of ignored columns.

    It names SHOWN columns at most, and counts all records that have such a note.
    """
    names = sorted(names_in(counts))
    if not names:
        return counts
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    others = {note: count for note, count in counts.items() if not note.startswith(IGNORED)}
    total = counts.total() - sum(others.values())
    return Counter(others | {IGNORED + ", ".join(names[:SHOWN]) + more: total})


def number(value: object, name: str) -> float:
    """Returns the value as a float. name: of the value, for errors.

    Raises ValueError for text, a truth value, NaN, and a number beyond LARGEST.
    """
    try:
        if not isinstance(value, bool) and abs(value) <= LARGEST:  # False for NaN
            return float(value)
    except TypeError:  # text, or another kind of value
        pass
    shown = repr(str(value)[:40])
    raise ValueError(f"the {name} must be a finite number of at most {LARGEST:g}, found {shown}")
