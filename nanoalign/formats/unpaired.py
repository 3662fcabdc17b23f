"""Single responses with a label, for --loss kto."""

from dataclasses import replace
from functools import partial

from nanoalign.encode import Record
from nanoalign.formats.records import UNPAIRED, from_messages
from nanoalign.pairs import Format


def with_unpaired(known: dict[tuple[str, ...], Format]) -> dict[tuple[str, ...], Format]:
    """The formats with that of single responses. All Records get the same key in `extra`.

    Pairs and single responses may be in one batch, which joins what `extra` has.
    """
    known = known | {UNPAIRED: completion}
    return {keys: partial(with_label, read) for keys, read in known.items()}


def completion(record: dict) -> Record:
    """One response, and whether it is desirable. It is paired with itself."""
    prompt, response, label = (record[key] for key in UNPAIRED)
    if not isinstance(label, bool):
        raise ValueError(f"the label must be true or false, found {label!r}")
    found = Record(prompt, (response,), ((0, 0),), {"desirable": [label]})
    return from_messages(found, "completion")


def with_label(read: Format, record: dict) -> Record:
    """The Record with `desirable` alone in `extra`, which has no meaning for pairs."""
    found = read(record)
    return replace(
        found, extra={"desirable": found.extra.get("desirable", [True] * len(found.pairs))}
    )
