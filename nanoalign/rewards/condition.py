"""One output for several preferences: the prompt names the one by which a response is judged."""

from collections.abc import Sequence
from dataclasses import replace

from nanoalign.encode import Record
from nanoalign.formats.templates import ASSISTANT, is_dialogue


def conditioned(record: Record, preference: str) -> Record:
    """The record with the name of a preference behind the last question of its prompt.

    There it stays where a prompt that is too long loses its beginning.
    """
    mark, prompt = f" [{preference}]", record.prompt
    if isinstance(prompt, list):
        prompt = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + mark}]
    elif is_dialogue(prompt):
        prompt = prompt.removesuffix(ASSISTANT) + mark + ASSISTANT
    else:
        prompt = prompt + mark
    return replace(record, prompt=prompt)


def by_preference(record: Record, preferences: Sequence[str]) -> list[Record]:
    """A record for each preference, whose prompt names it, with the pairs of its own labels."""
    records = []
    for d, name in enumerate(preferences):
        own = [n for n, dimension in enumerate(record.extra["dimensions"]) if dimension == d]
        extra = {key: [values[n] for n in own] for key, values in record.extra.items()}
        del extra["dimensions"]
        pairs = tuple(record.pairs[n] for n in own)
        marked = conditioned(record, name)
        records.append(replace(marked, pairs=pairs, extra=extra, name=f"{record.name}/{name}"))
    return records
