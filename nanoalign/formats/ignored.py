"""The columns that nothing reads, as the line of the data names them."""

from collections import Counter

from nanoalign.formats.rows import IGNORED

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
