"""The templates of --template: a record -> its text.

chat    the tokenizer's own chat template                                   (chat.py)
pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF)
raw     the text of the record, unchanged
auto    chat if the tokenizer has a template, raw for HH-RLHF dialogues, else pku
"""

from collections.abc import Sequence
from functools import partial

from nanoalign.batch import Row
from nanoalign.encode import Record, Text, encode_all, raw, without_end

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the headers of HH-RLHF
PKU_HEADERS = {"user": " USER: ", "assistant": " ASSISTANT:"}


def encode_records(
    records: Sequence[Record], tokenizer, max_length: int, template: str
) -> list[Row]:
    """As encode.encode_all, by the template of a name.

    Raises RunError for a record that the template cannot render, or would not show as a whole.
    """
    if tokenizer.chat_template or any(
        record.tools or record.answers or isinstance(record.prompt, list) for record in records
    ):
        from nanoalign.formats.chat import prepared

        records = prepared(records, tokenizer, template)
    return encode_all(records, tokenizer, max_length, partial(render, template=template))


def render(record: Record, tokenizer, template: str) -> Text:
    """The text of a record by the template of a name: an encode.Template."""
    prompt, is_text, named = record.prompt, not (record.tools or record.answers), template
    template = resolve_template(template, prompt, tokenizer)
    if template == "raw" and isinstance(prompt, str) and is_text:
        return raw(record, tokenizer)
    responses, messages = list(record.responses), messages_of(prompt)
    if template == "chat":
        responses = [without_end(response, tokenizer.eos_token) for response in responses]
    if is_dialogue(prompt):  # "Assistant: answer": the space belongs to the format of HH-RLHF
        responses = [response.removeprefix(" ") for response in responses]
    if template == "pku" and is_text and all(each["role"] in PKU_HEADERS for each in messages):
        turns = [PKU_HEADERS[message["role"]] + message["content"] for message in messages]
        text = f"BEGINNING OF CONVERSATION:{''.join(turns)} ASSISTANT:"
        return Text(text, responses, plain=True)
    from nanoalign.formats.chat import chat

    return chat(record, messages, responses, tokenizer, template, named)


def resolve_template(template: str, prompt: str | list[dict], tokenizer) -> str:
    """The template that `auto` selects for this prompt and tokenizer; other names unchanged."""
    auto = "chat" if tokenizer.chat_template else "raw" if is_dialogue(prompt) else "pku"
    return auto if template == "auto" else template


def is_dialogue(prompt: str | list[dict]) -> bool:
    """Whether a prompt is an HH-RLHF dialogue, from "\\n\\nHuman:" to "\\n\\nAssistant:"."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)


def messages_of(prompt: str | list[dict]) -> list[dict]:
    """The prompt as messages: the turns of a dialogue; other text is one message of the user."""
    if isinstance(prompt, list):
        return prompt
    if not is_dialogue(prompt):
        return [{"role": "user", "content": prompt}]
    from nanoalign.formats.dialogues import turns_of

    return turns_of(prompt)
