"""Formats of records, found by their keys: docs/data.md has an example of each.

A format is a function from a record to a Record, and an entry of `formats`. It raises ValueError
for a record that it can't read; nanoalign/pairs.py adds file and line. Messages, tools and system
prompts are those of nanoalign/formats/messages.py.
"""

import re
from collections import Counter
from collections.abc import Collection

from nanoalign.files.text import visible

PKU = ("prompt", "response_0", "response_1")
LABELS = ("better_response_id", "safer_response_id")  # of PKU-SafeRLHF
RANKED = ("prompt", "responses", "scores")
UNPAIRED, DEMONSTRATION = ("prompt", "completion", "label"), ("prompt", "completion")
DIALOGUES = ("chosen", "rejected")
TEXTS = ("prompt", "chosen", "rejected", "completion", "response_0", "response_1", "responses")

IGNORED = "records with ignored columns: "  # and their names


READ = {"system", "tools"}  # of records of any format
PKU_COLUMNS = r"prompt_source|(better|safer)_response_id|(is_)?response_[01]_\w+"  # known to all


def ignored(names: Collection[str], keys: tuple[str, ...]) -> tuple[str, ...]:
    """A note with those of the columns `names` that nothing reads; none for none.

    keys: of the format. A pair has a margin, and PKU-SafeRLHF its own columns.
    """
    left = set(names) - READ - ({"margin"} if keys not in (UNPAIRED, RANKED) else set())
    if keys == PKU:
        left = {name for name in left if not re.fullmatch(PKU_COLUMNS, name)}
    return (IGNORED + ", ".join(sorted(name[:40] for name in map(visible, left))),) if left else ()


SHOWN = 6  # names in a line


def joined(counts: Counter) -> Counter:
    """The counts with one reason, the last, for all records that have ignored columns."""
    own = {reason: count for reason, count in counts.items() if reason.startswith(IGNORED)}
    if not own:
        return counts
    names = sorted({name for reason in own for name in reason.removeprefix(IGNORED).split(", ")})
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    others = {reason: count for reason, count in counts.items() if reason not in own}
    return Counter(others | {IGNORED + ", ".join(names[:SHOWN]) + more: sum(own.values())})


def with_names(notes: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The notes of a record, of which one has these names, too: it is counted once."""
    own = [note for note in notes if note.startswith(IGNORED)]
    names = set(names).union(*(note.removeprefix(IGNORED).split(", ") for note in own))
    others = [note for note in notes if note not in own]
    return (*others, IGNORED + ", ".join(sorted(names)))


LARGEST = 1e30  # of a margin or a score. Losses are sums in float32, which ends at 3.4e38.


def number(value: object, name: str) -> float:
    try:
        if not isinstance(value, bool) and abs(value) <= LARGEST:  # False for NaN
            return float(value)
    except TypeError:  # no number
        pass
    found = repr(str(value)[:40])
    raise ValueError(f"the {name} must be a finite number of at most {LARGEST:g}, found {found}")
