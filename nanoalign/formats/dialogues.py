"""Two texts that begin with the same prompt: HH-RLHF dialogues, and others."""

import os

from nanoalign.encode import Record
from nanoalign.formats.templates import ASSISTANT, HUMAN
from nanoalign.pairs import check_text

SHARED = "prompts taken from the words that both texts begin with"


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
