"""The templates of --template: a record -> its text.

chat    the tokenizer's own chat template                                   (chat.py)
pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF)
raw     the text of the record, unchanged
auto    chat if the tokenizer has a template, raw for HH-RLHF dialogues, else pku
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NoReturn

from jinja2 import TemplateError

from nanoalign.batch import Row
from nanoalign.data.columns import with_names
from nanoalign.data.dialogues import PKU_HEADERS, is_dialogue, messages_of, resolve_template
from nanoalign.data.messages import BARE, FURTHER, REASONING
from nanoalign.encode import Text, encode_all, raw, without_end
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Record


def encode_records(
    records: Sequence[Record], tokenizer, max_length: int, template: str
) -> list[Row]:
    """As encode.encode_all, by the template of a name.

    Raises RunError for a record that the template cannot render, or would not show as a whole.
    """
    if tokenizer.chat_template or any(
        record.tools or record.answers or isinstance(record.prompt, list) for record in records
    ):
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
        return Text(text, responses, escape=True)

    return chat(record, messages, responses, tokenizer, template, named)


GROUPS = (("tool_calls",), ("function_call",), REASONING)  # keys that mean one thing
OTHER = "another text"


def prepared(records: Sequence[Record], tokenizer, template: str) -> list[Record]:
    """The records for encode.encode_all, their responses without the template's end of a turn.

    Their notes name further keys of messages that are not in the text.
    Raises RunError for tools, tool calls or reasoning that are not in the text of a record.
    """
    apply = renderer(tokenizer)
    added, found, roles = tuple(tokenizer.get_added_vocab()), [], set()
    for record in records:
        name = resolve_template(template, record.prompt, tokenizer)
        chat = name == "chat" and bool(tokenizer.chat_template)
        if chat:
            check_content(record, apply, roles)
        check_shown(record, apply, chat, name)
        record = without_ignored(record, apply, chat)
        found.append(without_end_of_turn(record, tokenizer, added) if chat else record)
    return found


def chat(
    record: Record, messages: list[dict], responses: list[str], tokenizer, name: str, given: str
) -> Text:
    """The text of a record whose prompt is these messages. name: of the template; given: --template

    Raises RunError if there is no chat template, if it fails, or if it writes the prompt in another
    way before a response.
    """
    if name != "chat" or not tokenizer.chat_template:
        refuse(record, given, name)
    apply = renderer(tokenizer, tools=record.tools)
    answers = record.answers or [{"role": "assistant", "content": each} for each in responses]
    try:
        text = apply(messages, add_generation_prompt=True)
        texts = [apply([*messages, answer]) for answer in answers]
    except TemplateError as error:
        raise RunError(f"{record.name}: the chat template fails: {in_a_line(error)}") from error
    for whole in texts:
        if not whole.startswith(text):
            raise RunError(
                f"{record.name}: a dialogue that the chat template renders, ...{whole[-80:]!r}, "
                f"does not begin with its rendering of the prompt, ...{text[-80:]!r}; correct it, "
                "or use --template raw or pku"
            )
    eos = tokenizer.eos_token
    return Text(text, [without_end(whole[len(text) :], eos) for whole in texts], add_bos=False)


def check_content(record: Record, apply: Callable[..., str], known: set[str]) -> None:
    """Raises RunError for a message of the prompt whose content is not in the text.

    known: the roles that the template shows; only others are looked at, and then added.
    """
    prompt = messages_of(record.prompt)
    for n, message in enumerate(prompt):
        role = message["role"]
        if role not in known and message["content"]:
            other = [*prompt[:n], message | {"content": OTHER}, *prompt[n + 1 :]]
            if not differs(apply, prompt, other, record.tools, record.tools):
                raise RunError(
                    f"{record.name}: the chat template of this tokenizer does not show the text "
                    f"of a message of '{role}'; a template for images may need lists of parts. "
                    "Use --template pku or raw, or remove such messages"
                )
            known.add(role)


def check_shown(record: Record, apply: Callable[..., str], chat: bool, template: str) -> None:
    """Raises RunError if the text is the same without some key of the record. apply: the template.

    A message is looked at where an answer is, last: some templates show reasoning only there.
    """
    prompt, lacking = messages_of(record.prompt), []
    if record.tools and not (chat and differs(apply, prompt, prompt, record.tools, None)):
        lacking.append("tools")
    seen = set()
    for dialogue in (prompt, *([*prompt, answer] for answer in record.answers)):
        for n, message in enumerate(dialogue):
            for keys in GROUPS:
                if seen.isdisjoint(keys) and message.keys() & set(keys):
                    seen |= set(keys)
                    bare = {key: each for key, each in message.items() if key not in keys}
                    before, tools = dialogue[:n], record.tools
                    both = [*before, message], [*before, bare]
                    if not (chat and differs(apply, *both, tools, tools)):
                        lacking.append(next(key for key in keys if key in message))
            if chat and message["content"] and "tool_calls" in message:
                both = dialogue[: n + 1], [*dialogue[:n], message | {"content": ""}]
                if not differs(apply, *both, record.tools, record.tools):
                    lacking.append("content beside tool_calls")
    if lacking:
        which = "the chat template of this tokenizer" if chat else f"--template {template}"
        raise RunError(
            f"{record.name}: {which} does not show {' and '.join(lacking)}; take a tokenizer whose "
            "chat template does, or remove what is not to be learned from the record"
        )


def without_ignored(record: Record, apply: Callable[..., str], chat: bool) -> Record:
    """The record whose notes name the keys of messages that its text is the same without.

    Its answers have none of these keys. Keys that `check_shown` refuses are not looked at.
    """
    prompt, tools = messages_of(record.prompt), record.tools

    def hidden(before: list[dict], messages: list[dict]) -> set[tuple[str, str]]:
        """(role, key) of further keys of `messages`, which follow `before` in a dialogue."""
        own = {(each["role"], key) for each in messages for key in each.keys() - BARE - FURTHER}
        whole = [*before, *messages]
        return {
            one for one in own
            if not chat
            or not differs(apply, whole, [*before, *without(messages, {one})], tools, tools)
        }  # fmt: skip

    of_prompt = hidden([], prompt)
    of_answers = [hidden(prompt, [answer]) for answer in record.answers]
    names = {f"prompt[].{key}" for _, key in of_prompt}
    names |= {f"responses[].{key}" for keys in of_answers for _, key in keys}
    if not names:
        return record
    both = zip(record.answers, of_answers, strict=True)
    answers = [each for answer, keys in both for each in without([answer], keys)]
    more = any(answer.keys() - BARE for answer in answers)
    notes = with_names(record.notes, names)
    return replace(record, answers=tuple(answers) if more else (), notes=notes)


def without(messages: list[dict], keys: set[tuple[str, str]]) -> list[dict]:
    """The messages without the keys (role, key)."""
    return [
        {key: value for key, value in each.items() if (each["role"], key) not in keys}
        for each in messages
    ]


def refuse(record: Record, template: str, name: str) -> NoReturn:
    """Raises RunError for a record that the template `name`, which is that of --template, can't
    render: with the roles, keys or kind of prompt that are in the way."""
    reasons = ["tools"] if record.tools else []
    reasons += sorted({key for answer in record.answers for key in answer.keys() - BARE})
    if name == "chat":
        reasons = ["a tokenizer without a chat template"]
    elif name == "raw" and isinstance(record.prompt, list):
        reasons.insert(0, "a list of messages")
    elif name == "pku":
        roles = dict.fromkeys(each["role"] for each in messages_of(record.prompt))
        key = {"system": " (or the key 'system')"}
        others = [role for role in roles if role not in PKU_HEADERS]
        reasons = [f"messages of '{role}'{key.get(role, '')}" for role in others] + reasons
    which = template if template == name else f"{template}, which is {name} here,"
    raise RunError(
        f"{record.name}: --template {which} can't be used for {' and '.join(reasons)}; raw needs "
        "text, pku messages of user and assistant alone, both without tools; chat a tokenizer with "
        "a chat template"
    )


def differs(
    apply: Callable[..., str], messages: list[dict], others: list[dict], tools: list | None,
    other_tools: list | None,
) -> bool:  # fmt: skip
    """Whether a chat template renders two dialogues as two texts."""
    try:
        return apply(messages, tools=tools) != apply(others, tools=other_tools)
    except TemplateError:  # it refuses one of them; `chat` reports the first
        return True


def without_end_of_turn(record: Record, tokenizer, added: tuple[str, ...]) -> Record:
    """The record whose responses have neither EOS nor the template's end of a turn at their end.

    added: the added tokens of the tokenizer. An end of a turn is one of them.
    """
    contents = [answer["content"] for answer in record.answers] or record.responses
    if not any(content.rstrip().endswith(added) for content in contents):
        return record
    ends = {tokenizer.eos_token}
    for content, text in zip(contents, render(record, tokenizer, "chat").responses, strict=True):
        own = without_end(content, tokenizer.eos_token).strip()
        end = text.rpartition(own)[2] if own else text
        ends |= {end.strip()} & set(added)

    def without_ends(text: str) -> str:
        while text.rstrip().endswith(tuple(ends)):
            for end in ends:
                text = without_end(text, end)
        return text

    answers = [each | {"content": without_ends(each["content"])} for each in record.answers]
    responses = record.responses if answers else map(without_ends, record.responses)
    return replace(record, responses=tuple(responses), answers=tuple(answers))


SECONDS = 5.0  # of one dialogue; it takes less than a thousandth of that
LETTERS = 20_000_000  # of its text


def renderer(tokenizer, **options: object) -> Callable[..., str]:
    """Messages -> their text by the chat template of a tokenizer. options: of apply_chat_template.

    Raises TemplateError whatever goes wrong.
    """

    def apply(messages: list[dict], **more: object) -> str:
        try:
            with ended_after(SECONDS):
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(in_a_line(error)) from error
        if len(text) > LETTERS:
            raise TemplateError(f"it writes {len(text):,} characters")
        return text

    return apply


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raises TemplateError inside after some time; in the main thread alone, which gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TemplateError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
