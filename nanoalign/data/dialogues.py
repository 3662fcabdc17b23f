"""Prompts as text: dialogues of HH-RLHF, and prompts that two texts begin with."""

import os
import re

from nanoalign.records import Record, check_text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the headers of HH-RLHF
DIFFER_EARLIER = "dialogues dropped: they differ before their last turn"
SHARED = "prompts taken from the words that both texts begin with"


def is_dialogue(prompt: str | list[dict]) -> bool:
    """Whether a prompt is text that begins with "\\n\\nHuman:" and ends with "\\n\\nAssistant:"."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)


def messages_of(prompt: str | list[dict]) -> list[dict]:
    """Returns the prompt as messages: the turns of a dialogue; other text as one of the user."""
    if isinstance(prompt, list):
        return prompt
    if not is_dialogue(prompt):
        return [{"role": "user", "content": prompt}]
    # "", who, text, who, text, ..., "Assistant", ""
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in pairs]


def split_dialogues(chosen: str, rejected: str) -> Record:
    """Splits two texts into the prompt that both begin with, and the responses behind it.

    The prompt of HH-RLHF dialogues ends with a header of the assistant; for other texts see
    split_texts. Raises ValueError if they share no prompt, or one of them is no text.
    """
    if any(isinstance(each, dict | list) for each in (chosen, rejected)):
        found = " and ".join(type(each).__name__ for each in (chosen, rejected))
        raise ValueError(
            "'prompt' is missing: without it chosen and rejected must both be lists of messages, "
            f"or both HH-RLHF dialogues, found {found}"
        )
    check_text("chosen dialogue", chosen)
    check_text("rejected dialogue", rejected)
    # The prompt ends with the last header of the assistant that both share.
    shared = os.path.commonprefix([chosen, rejected])
    if not chosen.startswith(HUMAN) and not rejected.startswith(HUMAN):
        return split_texts(chosen, rejected, shared)
    if not shared.startswith(HUMAN) or ASSISTANT not in shared:
        raise ValueError(
            "'prompt' is missing, and chosen and rejected have no common first turn "
            f"'\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}. Give 'prompt', "
            "or remove the record"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    responses = chosen[end:], rejected[end:]
    if any(HUMAN in response for response in responses):  # turns of the human would be learned
        return Record(chosen[:end], responses, (), notes=(DIFFER_EARLIER,))
    return Record(chosen[:end], responses)


def split_texts(chosen: str, rejected: str, shared: str) -> Record:
    """Splits texts that are no dialogues: the prompt is `shared` up to its last white space.

    shared: the characters that both begin with. The record has the note SHARED, because words that
    both responses begin with become part of its prompt. Raises ValueError if no word is shared.
    """
    end = max((shared.rfind(blank) for blank in " \n\t"), default=-1)
    if end < 1 or not shared[:end].strip():
        raise ValueError(
            "'prompt' is missing, and chosen and rejected share no words at their beginning: "
            f"{chosen[:40]!r} and {rejected[:40]!r}"
        )
    return Record(shared[:end], (chosen[end:], rejected[end:]), notes=(SHARED,))
