"""HH-RLHF dialogues: two texts that begin with the same prompt."""

import os

from nanoalign.encode import Record
from nanoalign.formats.templates import ASSISTANT, HUMAN
from nanoalign.pairs import check_text


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
    if not shared.startswith(HUMAN) or ASSISTANT not in shared:
        raise ValueError(
            "without a prompt, chosen and rejected must be HH-RLHF dialogues that begin with the "
            f"same '\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return Record(chosen[:end], (chosen[end:], rejected[end:]))
