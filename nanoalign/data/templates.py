"""The templates of --template: a record -> its text.

chat    the chat template of the tokenizer                                  (chat_template.py)
pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF)
raw     the text of the record, unchanged
auto    chat if the tokenizer has a chat template, raw for HH-RLHF dialogues, else pku
"""

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jinja2 import TemplateError

from nanoalign.batch import Row
from nanoalign.data.chat_template import (
    END_OF_THINKING,
    ChatTemplate,
    without_earlier_reasoning,
    without_hidden_keys,
)
from nanoalign.data.dialogues import is_dialogue, messages_of
from nanoalign.data.messages import BARE, FURTHER, is_of_assistant
from nanoalign.encode import Text, encode_all, raw, truncate, without_end
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.records import Record

ECHO = "responses that begin with their own prompt"
AS_TEXT = "sampled answers with special tokens (tool calls, reasoning) that are read as text"
ECHOED_WORDS = 3  # of a prompt: "Hi" begins many responses
THINKING_ARGUMENTS = ("enable_thinking", "thinking")  # of chat templates: false opens no reasoning
PKU_HEADERS = {"user": " USER: ", "assistant": " ASSISTANT:"}


def resolve_template(template: str, prompt: str | list[dict], tokenizer) -> str:
    """Returns the template that `auto` selects for this prompt; other names unchanged."""
    auto = "chat" if tokenizer.chat_template else "raw" if is_dialogue(prompt) else "pku"
    return auto if template == "auto" else template


def encode_records(
    records: Sequence[Record],
    tokenizer,
    max_length: int,
    template: str,
    date: datetime.date | None = None,
) -> list[Row]:
    """Returns the rows of the records, as encode.encode_all does, by the template of a name.

    date: what the chat template may write; None: today.
    Raises RunError for a record that the template can't render, or would not show as a whole.
    """
    chat_template, records = ChatTemplate(tokenizer, date), list(map(with_echoes, records))
    written = [record.responses for record in records]
    records = with_own_tokens(records, tokenizer, template)
    if tokenizer.chat_template or any(
        record.tools or record.answers or isinstance(record.prompt, list) for record in records
    ):
        records = [prepared(record, tokenizer, template, chat_template) for record in records]
    render_record = partial(render, template=template, chat_template=chat_template)
    own, texts = ([r for r in records if has_own_tokens(r) == kind] for kind in (True, False))
    rows = iter(encode_all(texts, tokenizer, max_length, render_record))
    prompts = iter(encode_all(own, tokenizer, sys.maxsize, render_record))
    return [
        with_tokens(record, responses, next(prompts).prompt, tokenizer, max_length)
        if has_own_tokens(record)
        else next(rows)
        for record, responses in zip(records, written, strict=True)
    ]


def with_tokens(
    record: Record, written: Sequence[str], prompt: np.ndarray, tokenizer, max_length: int
) -> Row:
    """Returns the row of a record whose responses are its sampled tokens, each with one EOS.

    written: their texts, for the notes. prompt: its tokens, (P,), not cut.
    """
    record = replace(record, responses=written)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    responses = [[*ids, *([eos] if ids[-1:] != [eos] else [])] for ids in record.sampled[1]]
    return truncate(record, prompt.tolist(), responses, max_length, bos)


def with_own_tokens(records: Sequence[Record], tokenizer, template: str) -> list[Record]:
    """Returns the records without texts of responses where `sampled` is of this tokenizer.

    There the sampled tokens are taken as they are. Of the others a note counts the responses with
    added tokens: a chat template writes them as the content of a message, and so it may add or
    leave out a header, or the end of a tool call.
    """
    if not any(record.sampled for record in records):
        return list(records)
    own, chosen, marks = {}, [], marks_of(tokenizer)
    for record in records:
        name = resolve_template(template, record.prompt, tokenizer)
        if name not in own:  # hashing a vocabulary takes a tenth of a second
            own[name] = tokenizer_name(tokenizer, name)
        if record.sampled and record.sampled[0] == own[name]:
            chosen.append(replace(record, responses=(), answers=()))
        else:
            chosen.append(as_text(record, marks))
    return chosen


def has_own_tokens(record: Record) -> bool:
    """Whether a record of with_own_tokens has the sampled tokens in place of texts."""
    return bool(record.sampled) and not record.responses


def marks_of(tokenizer) -> tuple[str, ...]:
    """What a sampled answer may have that a chat template writes itself."""
    return (*tokenizer.get_added_vocab(), END_OF_THINKING)


def as_text(record: Record, marks: Sequence[str]) -> Record:
    """Returns the record with a note for each sampled answer with a mark, which is read as text."""
    texts = record.responses if record.sampled else ()
    notes = [AS_TEXT for text in texts if any(mark in text for mark in marks)]
    return replace(record, notes=(*record.notes, *notes))


def tokenizer_name(tokenizer, template: str) -> str:
    """Returns a hash of all that decides what tokens of a response mean, as 16 digits.

    It is of the vocabulary, and of the template that writes the prompt before them.
    """
    text = tokenizer.chat_template if template == "chat" else template
    everything = json.dumps([sorted(tokenizer.get_vocab().items()), text], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def frame_of_answers(tokenizer, template: str) -> tuple[str, str]:
    """Returns what a template writes before the text of an answer, and between it and EOS.

    Before it some write a space, or an empty reasoning. Both are "" where they can't be known.
    """
    mark = "XYZZY"
    for answer in (mark, f"<think>\nHm.\n</think>\n\n{mark}"):  # some refuse answers without it
        try:
            record = Record("Hello.", (answer,), name="frame")
            (text,) = render(record, tokenizer, template).responses
        except RunError:
            continue
        before, _, after = text.rpartition(mark)
        return before if answer == mark else "", after
    return "", ""


def end_of_calls(tokenizer) -> str:
    """Returns what the chat template writes behind the argument of a tool call; "" if not known."""
    mark, kind = "XYZZY", {"type": "string", "description": "Where."}
    look = {"name": "look", "description": "Looks."}
    look["parameters"] = {"type": "object", "properties": {"at": kind}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": mark}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call | {"id": "abcdefghi"}]}
    tools = [{"type": "function", "function": look}]
    record = Record("Hello.", ("",), answers=(answer,), tools=tools, name="a tool call")
    try:
        (text,) = render(record, tokenizer, "chat").responses
    except RunError:
        return ""
    return text.rpartition(mark)[2]


def with_echoes(record: Record) -> Record:
    """Returns the record with a note for each response that begins with the words of its prompt."""
    if is_dialogue(record.prompt):
        return record
    question = messages_of(record.prompt)[-1]["content"].strip()
    if len(question.split()) < ECHOED_WORDS:
        return record
    echoes = [ECHO for response in record.responses if response.lstrip().startswith(question)]
    return replace(record, notes=(*record.notes, *echoes)) if echoes else record


def prepared(record: Record, tokenizer, template: str, chat_template: ChatTemplate) -> Record:
    """Returns the record with responses that do not end with the chat template's end of a turn.

    Its notes name what of its messages is not in the text: further keys, earlier reasoning. Raises
    RunError for tools, tool calls and reasoning, which the templates pku and raw do not show.
    """
    name = resolve_template(template, record.prompt, tokenizer)
    if name == "chat" and tokenizer.chat_template:
        record = without_earlier_reasoning(record, chat_template.render)
        record = without_hidden_keys(record, chat_template.render)
        return without_end_of_turn(record, chat_template)
    messages = (*messages_of(record.prompt), *record.answers)
    keys = dict.fromkeys(key for message in messages for key in message if key in FURTHER)
    if hidden := [*(["tools"] if record.tools else []), *keys]:
        raise RunError(
            f"{record.name}: --template {name} does not show {' and '.join(hidden)}; take a "
            "tokenizer whose chat template does, or remove what is not to be learned from the "
            "record"
        )
    return without_hidden_keys(record, None)


def render(
    record: Record, tokenizer, template: str, chat_template: ChatTemplate | None = None
) -> Text:
    """Returns the text of a record by the template of a name; it is an encode.Template.

    chat_template: that of the tokenizer, if it was made before. Raises RunError for a record that
    the template can't render, or does not show as a whole.
    """
    name = resolve_template(template, record.prompt, tokenizer)
    is_text = not (record.tools or record.answers)
    if name == "raw" and is_text and isinstance(record.prompt, str):
        return raw(record, tokenizer)
    messages, responses = messages_of(record.prompt), responses_of(record)
    if name == "pku" and is_text and {each["role"] for each in messages} <= PKU_HEADERS.keys():
        turns = [PKU_HEADERS[message["role"]] + message["content"] for message in messages]
        header = "" if is_of_assistant(messages[-1]) else PKU_HEADERS["assistant"]
        text = f"BEGINNING OF CONVERSATION:{''.join(turns)}{header}"
        return Text(text, responses, escape=True)
    if name == "chat" and tokenizer.chat_template:
        return chat(record, chat_template or ChatTemplate(tokenizer))
    which = template if template == name else f"{template}, which is {name} here,"
    raise RunError(
        f"{record.name}: --template {which} can't be used for "
        f"{' and '.join(obstacles(record, messages, name))}; raw needs text, pku messages of user "
        "and assistant alone, both without tools; chat a tokenizer with a chat template"
    )


def responses_of(record: Record) -> list[str]:
    """The responses as texts of messages, without what the format of the record adds."""
    if is_dialogue(record.prompt):  # "Assistant: answer": the space is of the format of HH-RLHF
        return [response.removeprefix(" ") for response in record.responses]
    return list(record.responses)


def chat(record: Record, template: ChatTemplate) -> Text:
    """The text of a record by the chat template of a tokenizer.

    Raises RunError as whole_dialogues, and if the template writes the prompt in another way before
    a response.
    """
    prompt, whole = whole_dialogues(record, template)
    for dialogue in whole:
        if not dialogue.startswith(prompt):
            raise RunError(f"{record.name}: {another_prompt(prompt, dialogue, template.tokenizer)}")
    eos = template.tokenizer.eos_token
    texts = [without_end(dialogue[len(prompt) :], eos) for dialogue in whole]
    return Text(prompt, template.behind(prompt, texts), add_bos=False)


def whole_dialogues(record: Record, template: ChatTemplate) -> tuple[str, list[str]]:
    """(the prompt with the header of an answer, the whole dialogue with each response), as texts.

    If the last message of the prompt is of the assistant, the responses continue it.
    Raises RunError if the template fails, or does not show all of the record.
    """
    eos, messages = template.tokenizer.eos_token, messages_of(record.prompt)
    answers = record.answers or [
        {"role": "assistant", "content": without_end(response, eos)}
        for response in responses_of(record)
    ]
    dialogues, end = [[*messages, answer] for answer in answers], "add_generation_prompt"
    if is_of_assistant(messages[-1]):
        *before, begun = messages
        contents = [begun["content"] + answer["content"] for answer in answers]
        dialogues = [
            [*before, begun | answer | {"content": content}]
            for answer, content in zip(answers, contents, strict=True)
        ]
        end = "continue_final_message"
    try:
        prompt = template.render(messages, record.tools, **{end: True})
        whole = [template.render(dialogue, record.tools) for dialogue in dialogues]
        if not record.sampled:  # what a policy samples may begin as a turn does
            template.check_begin(record, messages, prompt)
    except TemplateError as error:
        raise RunError(f"{record.name}: the chat template fails: {in_a_line(error)}") from error
    shown = (dialogues, whole) if answers else ([messages], [prompt])
    template.check_shown(record, prompt, *shown)
    return prompt, whole


def another_prompt(prompt: str, dialogue: str, tokenizer) -> str:
    """What is wrong where a template renders a dialogue that does not begin with the prompt."""
    found = f"...{dialogue[-80:]!r}, does not begin with its rendering of the prompt, "
    found = f"a dialogue that the chat template renders, {found}...{prompt[-80:]!r}; "
    header = prompt[len(os.path.commonprefix([prompt, dialogue])) :]
    if "think" not in header.lower():
        return found + "correct it, or use --template raw or pku"
    found += "it opens reasoning before an answer, and this answer has none at its beginning; "
    names = [name for name in THINKING_ARGUMENTS if name in str(tokenizer.chat_template)]
    if names:
        return found + f"give --template_args {names[0]}=false, or answers with reasoning"
    return found + "give answers with reasoning, another chat template, or --template raw or pku"


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


def without_end_of_turn(record: Record, chat_template: ChatTemplate) -> Record:
    """The record whose responses have neither EOS nor the template's end of a turn at their end.

    An end of a turn is one of the added tokens of the tokenizer.
    """
    tokenizer, added_tokens = chat_template.tokenizer, chat_template.added_tokens
    contents = [answer["content"] for answer in record.answers] or record.responses
    if not any(content.rstrip().endswith(added_tokens) for content in contents):
        return record
    ends = {tokenizer.eos_token}
    prompt, whole = whole_dialogues(record, chat_template)
    for content, dialogue in zip(contents, whole, strict=True):
        text = dialogue[len(os.path.commonprefix([prompt, dialogue])) :]
        text = without_end(text, tokenizer.eos_token)
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
