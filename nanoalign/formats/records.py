"""Formats of records, found by their keys: docs/data.md has an example of each.

A format is a function from a record to a Record, and an entry of `formats`. It raises ValueError
for a record that it can't read; nanoalign/pairs.py adds file and line. Messages, tools and system
prompts are those of nanoalign/formats/messages.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module

from nanoalign.encode import Record
from nanoalign.formats import FOREIGN
from nanoalign.pairs import FORMATS, Format

PKU = ("prompt", "response_0", "response_1")
LABELS = ("better_response_id", "safer_response_id")  # of PKU-SafeRLHF
RANKED = ("prompt", "responses", "scores")
UNPAIRED, DEMONSTRATION = ("prompt", "completion", "label"), ("prompt", "completion")
DIALOGUES = ("chosen", "rejected")
TEXTS = ("prompt", "chosen", "rejected", "completion", "response_0", "response_1", "responses")


def formats(
    preference: str = "better", unpaired: str = "", keys: Sequence[str] = ()
) -> dict[tuple[str, ...], Format]:
    """The formats by their keys; the first whose keys a record has is taken.

    preference: the label of PKU-SafeRLHF that orders the responses.
    unpaired: the loss that learns from single responses (kto, sft); "": they are refused.
    keys: of --keys, OURS=THEIRS: what the records call a key of these formats.
    """
    known = {
        RANKED: later("ranked", "ranked"),
        PKU: lambda record: with_margin(record, pku(record, preference)),
        UNPAIRED: later("unpaired", "completion", unpaired),
        ("prompt", "chosen", "rejected"): later("dialogues", "pair_with_prompt"),
        DEMONSTRATION: later("unpaired", "completion", unpaired),
        DIALOGUES: later("dialogues", "pair"),
    }
    known |= {names: read for names, read in FORMATS.items() if names not in known}
    if unpaired:
        from nanoalign.formats.unpaired import with_labels

        known = with_labels(known)
    own = {names: partial(complete, names, read) for names, read in known.items()}
    last = {DIALOGUES: own[DIALOGUES], (): later("foreign", "read_as", "unknown", own)}
    own = own | {names: later("foreign", "read_as", name, own) for names, name in FOREIGN.items()}
    known = {names: read for names, read in own.items() if names not in last} | last
    if keys:
        from nanoalign.formats.keys import renamed

        known = renamed(known, keys)
    return known


def later(file: str, name: str, *first: object) -> Format:
    """A format of another file, which is imported when a record needs it.

    first: arguments before the record.
    """
    module = f"nanoalign.formats.{file}"
    return lambda record: getattr(import_module(module), name)(*first, record)


def complete(keys: tuple[str, ...], read: Format, record: dict) -> Record:
    """The Record with what any format may have: messages, tools, a system prompt, more columns."""
    texts = [record[key] for key in TEXTS if key in record]
    plain = all(isinstance(text, str) and text.lstrip()[:1] != "[" for text in texts)
    if plain and not {"system", "tools"} & record.keys():
        found = read(record)
    else:
        from nanoalign.formats.messages import read_messages

        found = read_messages(read, record)
    if names := record.keys() - {*keys, *LABELS}:
        from nanoalign.formats.columns import ignored

        found = replace(found, notes=(*found.notes, *ignored(names, keys)))
    return found


def pku(record: dict, preference: str = "better") -> Record:
    """PKU-SafeRLHF: two responses; the label of `preference`, better or safer, orders them."""
    key = f"{preference}_response_id"
    best = record.get(key)
    if isinstance(best, bool) or best not in (0, 1):
        raise ValueError(f"{key} is {best!r}; --preference {preference} needs 0 or 1")
    responses = (record["response_0"], record["response_1"])[:: -1 if best else 1]
    return from_messages(Record(record["prompt"], responses), "response")


def from_messages(record: Record, name: str) -> Record:
    """The Record whose responses may be messages, each one of the assistant."""
    if not any(isinstance(response, dict | list) for response in record.responses):
        return record
    from nanoalign.formats.messages import answer, with_answers

    return with_answers(record, [answer(response, name) for response in record.responses])


def with_margin(record: dict, pair: Record) -> Record:
    """The Record with the margin of the data: by how much its chosen response is better, else 1."""
    margin = 1.0
    if record.get("margin") is not None:
        from nanoalign.formats.ranked import number

        margin = number(record["margin"], "margin")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}; it must not be negative")
    return replace(pair, extra=pair.extra | {"margins": [margin]})
