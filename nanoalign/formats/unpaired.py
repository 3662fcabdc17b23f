"""Single responses: with a label for --loss kto, as demonstrations for --loss sft."""

from dataclasses import replace
from functools import partial

from nanoalign.encode import Record
from nanoalign.formats.records import from_messages
from nanoalign.pairs import Format


def with_labels(known: dict[tuple[str, ...], Format]) -> dict[tuple[str, ...], Format]:
    """The formats, whose Records all get the same key in `extra`.

    Pairs and single responses may be in one batch, which joins what `extra` has.
    """
    return {keys: partial(with_label, read) for keys, read in known.items()}


def completion(loss: str, record: dict) -> Record:
    """One response, and whether it is desirable. It is paired with itself.

    loss: kto, sft, or "" where pairs are needed. Without a label a response is a demonstration.
    """
    prompt, response, label = record["prompt"], record["completion"], record.get("label")
    if not loss:
        raise ValueError(
            "a single completion, where pairs are needed; train_dpo.py --loss kto learns from "
            "completions with a label, and --loss sft from demonstrations"
        )
    if label is None and loss == "kto":
        raise ValueError("--loss kto needs a label, true or false, beside each completion")
    if label not in (None, True, False):  # also 1 and 0
        raise ValueError(f"the label must be true or false, found {label!r}")
    if label is not None and not label and loss == "sft":
        raise ValueError("--loss sft learns from good responses; remove those of the label false")
    found = Record(prompt, (response,), ((0, 0),), {"desirable": [label is None or bool(label)]})
    return from_messages(found, "completion")


def with_label(read: Format, record: dict) -> Record:
    """The Record with `desirable` alone in `extra`, which has no meaning for pairs."""
    found = read(record)
    return replace(
        found, extra={"desirable": found.extra.get("desirable", [True] * len(found.pairs))}
    )
