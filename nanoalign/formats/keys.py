"""--keys OURS=THEIRS: records whose keys have other names."""

from collections.abc import Sequence
from functools import partial

from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats.records import PKU
from nanoalign.pairs import Format, decode

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
    """The formats by the names that records have for their keys.

    A record that lacks one of these names is an error, also where it has ours: it would be read as
    something else than was asked for. The embedded data alone keep our names.
    """
    names = names_of(keys)
    found: dict[tuple[str, ...], Format] = {}
    for own, read in known.items():
        theirs = tuple(names.get(key, key) for key in own)
        found.setdefault(theirs, partial(read_renamed, names, read))
    found[PKU] = partial(read_renamed, names, known[PKU])
    found[()] = found.pop(())  # the last one, which takes all
    return found


def read_renamed(names: dict[str, str], read: Format, record: dict) -> Record:
    return read(with_our_names(record, names))


def decoded(raw: str | dict, where: str, names: dict[str, str]) -> object:
    """A record that was read at `where`, as an object with our names. Raises RunError."""
    record = decode(raw, where)
    if not names or not isinstance(record, dict):
        return record
    try:
        return with_our_names(record, names)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error


def with_our_names(record: dict, names: dict[str, str]) -> dict:
    """The record with our names for its keys. Raises ValueError if it lacks one of theirs."""
    theirs = {*names.values()}
    if not theirs & record.keys() and record.keys() >= {*PKU}:
        return record  # of the embedded data
    if missing := sorted(theirs - record.keys()):
        raise ValueError(
            f"--keys names {', '.join(missing)}, and the record has no such key; it has "
            f"{', '.join(sorted(record))}"
        )
    back = {theirs: ours for ours, theirs in names.items()}
    others = {key: value for key, value in record.items() if key not in names or key in back}
    return {back.get(key, key): value for key, value in others.items()}
