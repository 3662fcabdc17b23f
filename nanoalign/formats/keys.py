"""--keys OURS=THEIRS: records whose keys have other names."""

from collections.abc import Sequence
from functools import partial

from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.pairs import Format

OURS = ("prompt", "chosen", "rejected", "responses", "scores", "completion", "label", "margin",
        "system", "tools")  # fmt: skip


def names_of(keys: Sequence[str]) -> dict[str, str]:
    """What the records call each of OURS. Raises RunError for a pair that is not OURS=THEIRS."""
    names = {}
    for pair in keys:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in OURS or ours in names:
            expected = ", ".join(OURS)
            raise RunError(f"--keys {pair}: expected OURS=THEIRS, with each once of {expected}")
        names[ours] = theirs
    return names


def renamed(
    known: dict[tuple[str, ...], Format], keys: Sequence[str]
) -> dict[tuple[str, ...], Format]:
    """The formats by the names that records have for their keys, before those by our own names."""
    names = names_of(keys)
    found: dict[tuple[str, ...], Format] = {}
    for own, read in known.items():
        theirs = tuple(names.get(key, key) for key in own)
        if theirs != own:
            found.setdefault(theirs, partial(read_renamed, names, read))
    return found | {own: read for own, read in known.items() if own not in found}


def read_renamed(names: dict[str, str], read: Format, record: dict) -> Record:
    return read(with_our_names(record, names))


def with_our_names(record: dict, names: dict[str, str]) -> dict:
    """The record with our names for its keys, if it has all of theirs; else unchanged."""
    if not record.keys() >= {*names.values()}:
        return record
    back = {theirs: ours for ours, theirs in names.items()}
    others = {key: value for key, value in record.items() if key not in names or key in back}
    return {back.get(key, key): value for key, value in others.items()}
