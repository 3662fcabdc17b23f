"""The templates of --template: a record -> its text.

chat    the chat template of the tokenizer                                  (chat_template.py)
pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF)
raw     the text of the record, unchanged
auto    chat if the tokenizer has a chat template, raw for HH-RLHF dialogues, else pku
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jinja2 import TemplateError

from nanoalign.batch import Row
from nanoalign.data.chat_template import (
    check_parts,
    check_roles,
    render_nothing,
    renderer,
    without_hidden_keys,
)
from nanoalign.data.dialogues import is_dialogue, messages_of
from nanoalign.data.messages import BARE
from nanoalign.encode import Text, encode_all, raw, without_end
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Record

PKU_HEADERS = {"user": " USER: ", "assistant": " ASSISTANT:"}


def resolve_template(template: str, prompt: str | list[dict], tokenizer) -> str:
    """Returns the template that `auto` selects for this prompt; other names unchanged."""
    auto = "chat" if tokenizer.chat_template else "raw" if is_dialogue(prompt) else "pku"
    return auto if template == "auto" else template


def encode_records(
    records: Sequence[Record], tokenizer, max_length: int, template: str
) -> list[Row]:
    """Returns the rows of the records, as encode.encode_all does, by the template of a name.

    Raises RunError for a record that the template can't render, or would not show as a whole.
    """
    if tokenizer.chat_template or any(
        record.tools or record.answers or isinstance(record.prompt, list) for record in records
    ):
        records = prepared(records, tokenizer, template)
    return encode_all(records, tokenizer, max_length, partial(render, template=template))


def prepared(records: Sequence[Record], tokenizer, template: str) -> list[Record]:
    """Returns the records with responses that do not end with the chat template's end of a turn.

    Their notes name further keys of messages that are not in the text. Raises RunError for tools,
    tool calls, reasoning or contents that are not in the text.
    """
    render_chat, added_tokens = renderer(tokenizer), tuple(tokenizer.get_added_vocab())
    prepared_records, shown_roles = [], set()
    for record in records:
        name = resolve_template(template, record.prompt, tokenizer)
        if name == "chat" and tokenizer.chat_template:
            check_roles(record, render_chat, shown_roles)
            check_parts(record, render_chat, "the chat template of this tokenizer")
            record = without_hidden_keys(record, render_chat)
            record = without_end_of_turn(record, tokenizer, added_tokens)
        else:
            check_parts(record, render_nothing, f"--template {name}")
            record = without_hidden_keys(record, render_nothing)
        prepared_records.append(record)
    return prepared_records


def render(record: Record, tokenizer, template: str) -> Text:
    """Returns the text of a record by the template of a name; it is an encode.Template.

    Raises RunError for a record that the template can't render.
    """
    name = resolve_template(template, record.prompt, tokenizer)
    is_text = not (record.tools or record.answers)
    if name == "raw" and is_text and isinstance(record.prompt, str):
        return raw(record, tokenizer)
    messages, responses = messages_of(record.prompt), list(record.responses)
    if is_dialogue(record.prompt):  # "Assistant: answer": the space is of the format of HH-RLHF
        responses = [response.removeprefix(" ") for response in responses]
    if name == "pku" and is_text and {each["role"] for each in messages} <= PKU_HEADERS.keys():
        turns = [PKU_HEADERS[message["role"]] + message["content"] for message in messages]
        text = f"BEGINNING OF CONVERSATION:{''.join(turns)} ASSISTANT:"
        return Text(text, responses, escape=True)
    if name == "chat" and tokenizer.chat_template:
        return chat(record, messages, responses, tokenizer)
    which = template if template == name else f"{template}, which is {name} here,"
    raise RunError(
        f"{record.name}: --template {which} can't be used for "
        f"{' and '.join(obstacles(record, messages, name))}; raw needs text, pku messages of user "
        "and assistant alone, both without tools; chat a tokenizer with a chat template"
    )


def chat(record: Record, messages: list[dict], responses: Sequence[str], tokenizer) -> Text:
    """The text of a record by the chat template of the tokenizer.

    messages, responses: the prompt as messages, and the responses without what its format adds.
    Raises RunError if the template fails, or writes the prompt in another way before a response.
    """
    render_chat, eos = renderer(tokenizer), tokenizer.eos_token
    answers = record.answers or [
        {"role": "assistant", "content": without_end(response, eos)} for response in responses
    ]
    try:
        prompt = render_chat(messages, record.tools, add_generation_prompt=True)
        dialogues = [render_chat([*messages, answer], record.tools) for answer in answers]
    except TemplateError as error:
        raise RunError(f"{record.name}: the chat template fails: {in_a_line(error)}") from error
    for dialogue in dialogues:
        if not dialogue.startswith(prompt):
            raise RunError(
                f"{record.name}: a dialogue that the chat template renders, ...{dialogue[-80:]!r}, "
                f"does not begin with its rendering of the prompt, ...{prompt[-80:]!r}; correct "
                "it, or use --template raw or pku"
            )
    texts = [without_end(dialogue[len(prompt) :], eos) for dialogue in dialogues]
    return Text(prompt, texts, add_bos=False)


def obstacles(record: Record, messages: list[dict], name: str) -> list[str]:
    """Returns what of the record, or its messages, the template of a name can't render."""
    if name == "chat":
        return ["a tokenizer without a chat template"]
    kinds = ["a list of messages"] if name == "raw" and isinstance(record.prompt, list) else []
    if name == "pku":
        hint = {"system": " (or the key 'system')"}
        roles = dict.fromkeys(each["role"] for each in messages)
        others = [role for role in roles if role not in PKU_HEADERS]
        kinds = [f"messages of '{role}'{hint.get(role, '')}" for role in others]
    keys = {key for answer in record.answers for key in answer.keys() - BARE}
    return kinds + (["tools"] if record.tools else []) + sorted(keys)


def without_end_of_turn(record: Record, tokenizer, added_tokens: tuple[str, ...]) -> Record:
    """The record whose responses have neither EOS nor the template's end of a turn at their end.

    An end of a turn is one of the added tokens of the tokenizer.
    """
    contents = [answer["content"] for answer in record.answers] or record.responses
    if not any(content.rstrip().endswith(added_tokens) for content in contents):
        return record
    ends = {tokenizer.eos_token}
    for content, text in zip(contents, render(record, tokenizer, "chat").responses, strict=True):
        bare = without_end(content, tokenizer.eos_token).strip()
        behind = text.rpartition(bare)[2] if bare else text
        ends |= {behind.strip()} & set(added_tokens)

    def without_ends(text: str) -> str:
        while text.rstrip().endswith(tuple(ends)):
            for end in ends:
                text = without_end(text, end)
        return text

    answers = [answer | {"content": without_ends(answer["content"])} for answer in record.answers]
    responses = record.responses if answers else map(without_ends, record.responses)
    return replace(record, responses=tuple(responses), answers=tuple(answers))
