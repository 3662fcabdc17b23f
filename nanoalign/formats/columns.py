"""Columns of records that nothing reads: they are named once, in the line of the data."""

import re
from collections.abc import Collection

from nanoalign.formats.records import PKU, RANKED, UNPAIRED
from nanoalign.formats.rows import IGNORED
from nanoalign.hosts.terminal import visible

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
