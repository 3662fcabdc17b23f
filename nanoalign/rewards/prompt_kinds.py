"""The kinds of prompts that a reward model was trained on, and how other prompts are rewritten.

The templates chat and pku give all prompts one form. The template raw leaves a prompt as it is: an
HH-RLHF dialogue ("\n\nHuman: ...\n\nAssistant:", and a response that begins with a space), or
text without such headers. A model that was trained on one kind cannot judge the other.
"""

from collections.abc import Sequence
from dataclasses import replace

from nanoalign.batch import Row
from nanoalign.data.dialogues import ASSISTANT, HUMAN
from nanoalign.errors import RunError
from nanoalign.records import Record

DIALOGUE, TEXT = "dialogue", "text"  # kinds
HEADERS = {"user": HUMAN, "assistant": ASSISTANT}
AS_DIALOGUE = "prompts written as HH-RLHF dialogues, which the reward model was trained on"


def kinds_of(rows: Sequence[Row], tokenizer, template: str) -> list[str]:
    """The kinds of the prompts of training rows, sorted; [] for another template than raw.

    A prompt that was cut lost its beginning, and its kind is told by its end.
    """
    if template != "raw":
        return []
    # Within a text the header may have more tokens than alone, or share one with the text before.
    count = 2 * len(tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"])
    ends = {tuple(row.prompt[-count:].tolist()) for row in rows}
    texts = tokenizer.batch_decode(list(ends), clean_up_tokenization_spaces=False)
    return sorted({kind_of(text) for text in texts})


def kind_of(prompt: str) -> str:
    return DIALOGUE if prompt.endswith(ASSISTANT) else TEXT


def as_trained(record: Record, template: str, kinds: Sequence[str]) -> Record:
    """Returns the record with its prompt in a form that the model was trained on.

    The record itself is returned if its prompt is of one of `kinds`, if the template is not raw, or
    if `kinds` is empty (not known). Else it is written as a dialogue, whose responses begin with
    white space.
    kinds: those of the training. Raises RunError if the prompt can't be written as a dialogue, or
    the model was not trained on dialogues.
    """
    prompt = record.prompt
    if template != "raw" or not kinds or (isinstance(prompt, str) and kind_of(prompt) in kinds):
        return record
    if DIALOGUE not in kinds:
        form = "an HH-RLHF dialogue" if isinstance(prompt, str) else "messages"
        raise RunError(
            f"{record.name}: the prompt is {form}, but the reward model was trained by template "
            "raw on text that is neither; give prompts of that form, or train a reward model with "
            "--template chat or pku, which read every kind"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_turns(record.name, messages)
    turns = [f"{HEADERS[m['role']]} {m['content'].strip()}" for m in messages]
    responses = tuple(
        f" {response}" if response and not response[0].isspace() else response
        for response in record.responses
    )
    return replace(record, prompt="".join(turns) + ASSISTANT, responses=responses)


def check_turns(name: str, messages: Sequence[dict]) -> None:
    """Raises RunError for messages that can't be written as an HH-RLHF dialogue.

    name: of the record, for the error.
    """
    plain = all(m["role"] in HEADERS and m.keys() == {"role", "content"} for m in messages)
    if not plain or messages[0]["role"] != "user" or messages[0]["content"].startswith(HUMAN):
        raise RunError(
            f"{name}: the reward model was trained on HH-RLHF dialogues (template raw), but the "
            f"prompt {str(messages)[:300]} is neither a text, nor a dialogue that ends with "
            f"{ASSISTANT!r}, nor text messages of user and assistant of which the first is the "
            "user's; correct it, or train a reward model with --template chat, which reads every "
            "kind"
        )
