"""Pairs: a prompt and two responses; HH-RLHF dialogues, and other texts that begin alike."""

import os
import re

from nanoalign.encode import Record
from nanoalign.formats.records import from_messages, with_margin
from nanoalign.formats.templates import ASSISTANT, HUMAN
from nanoalign.pairs import check_text

SHARED = "prompts taken from the words that both texts begin with"


def pair_with_prompt(record: dict) -> Record:
    """A prompt and two responses; each is text, or a list of messages."""
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        from nanoalign.formats.messages import pair_of_messages

        return with_margin(record, pair_of_messages(record))
    return with_margin(record, from_messages(Record(prompt, (chosen, rejected)), "response"))


def pair(record: dict) -> Record:
    """Two texts that begin with the same prompt, or two lists of messages that do."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return pair_with_prompt(record)
    return with_margin(record, split(chosen, rejected))


def split(chosen: str, rejected: str) -> Record:
    """The prompt that both dialogues begin with, and the responses behind it.

    Raises ValueError if they share no prompt.
    """
    if any(isinstance(each, dict | list) for each in (chosen, rejected)):
        found = " and ".join(type(each).__name__ for each in (chosen, rejected))
        raise ValueError(
            "'prompt' is missing: without it chosen and rejected must both be lists of messages, "
            f"or both HH-RLHF dialogues, found {found}"
        )
    check_text("chosen dialogue", chosen)
    check_text("rejected dialogue", rejected)
    # The prompt ends with the last header of the assistant that both share. A few records differ
    # before their last turn; then a response has further turns, as the annotators saw it.
    shared = os.path.commonprefix([chosen, rejected])
    if not chosen.startswith(HUMAN) and not rejected.startswith(HUMAN):
        return split_texts(chosen, rejected, shared)
    if not shared.startswith(HUMAN) or ASSISTANT not in shared:
        raise ValueError(
            "without a prompt, chosen and rejected must be HH-RLHF dialogues that begin with the "
            f"same '\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return Record(chosen[:end], (chosen[end:], rejected[end:]))


def split_texts(chosen: str, rejected: str, shared: str) -> Record:
    """Other texts: the prompt is what both begin with, up to the last white space.

    Words that both responses begin with become part of the prompt, so such records are counted.
    """
    end = max((shared.rfind(blank) for blank in " \n\t"), default=-1)
    if end < 1 or not shared[:end].strip():
        raise ValueError(
            "'prompt' is missing, and chosen and rejected share no words at their beginning: "
            f"{chosen[:40]!r} and {rejected[:40]!r}"
        )
    return Record(shared[:end], (chosen[end:], rejected[end:]), notes=(SHARED,))


def turns_of(dialogue: str) -> list[dict]:
    """The turns of an HH-RLHF dialogue as messages, without the last one, which is empty."""
    # "", who, text, who, text, ..., "Assistant", ""
    turns = re.split(r"\n\n(Human|Assistant):", dialogue)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in pairs]
