"""The chat template of a tokenizer, and what of a record it does not show.

A template may leave out tools, tool calls, reasoning, messages of a role or further keys without a
word. So each part of a record is changed or taken away: where the text stays the same, the template
does not show the part, and it would be trained on as if it were not there.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from jinja2 import TemplateError

from nanoalign.data.columns import with_names
from nanoalign.data.dialogues import messages_of
from nanoalign.data.messages import BARE, FURTHER, REASONING
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Record

SECONDS = 5.0  # of one dialogue, which takes less than a thousandth of that
LETTERS = 20_000_000  # of its text
OTHER = "another text"

# (messages, tools, add_generation_prompt) -> text; raises TemplateError whatever goes wrong
Renderer = Callable[..., str]


def renderer(tokenizer) -> Renderer:
    """What renders messages by the chat template of a tokenizer."""

    def render(
        messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False
    ) -> str:
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            with time_limit(SECONDS):
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(in_a_line(error)) from error
        if len(text) > LETTERS:
            raise TemplateError(f"it writes {len(text):,} characters")
        return text

    return render


def render_nothing(messages: list[dict], tools: list | None = None) -> str:
    """The Renderer of a template that shows no part of a record beside its texts."""
    return ""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
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


def differs(render: Renderer, *dialogues: tuple[list[dict], list | None]) -> bool:
    """Whether two dialogues, (messages, tools), have two texts."""
    try:
        first, second = (render(*dialogue) for dialogue in dialogues)
    except TemplateError:  # of a record's own dialogue it is reported where the record is rendered
        return True
    return first != second


def messages_with_context(record: Record) -> list[tuple[list[dict], dict]]:
    """(messages before it, message) of each message of the prompt, and of each answer.

    So a message is looked at where an answer is, last: some templates show reasoning only there.
    """
    prompt = messages_of(record.prompt)
    in_prompt = [(prompt[:n], message) for n, message in enumerate(prompt)]
    return in_prompt + [(prompt, answer) for answer in record.answers]


def check_roles(record: Record, render: Renderer, shown_roles: set[str]) -> None:
    """Raises RunError for a message of the prompt whose content is not in the text.

    shown_roles: the roles whose messages the template shows, which are not looked at; this adds to
        them.
    """
    prompt, tools = messages_of(record.prompt), record.tools
    for n, message in enumerate(prompt):
        if message["content"] and message["role"] not in shown_roles:
            others = [*prompt[:n], message | {"content": OTHER}, *prompt[n + 1 :]]
            if not differs(render, (prompt, tools), (others, tools)):
                raise RunError(
                    f"{record.name}: the chat template of this tokenizer does not show the text "
                    f"of a message of '{message['role']}'; a template for images may need lists "
                    "of parts. Use --template pku or raw, or remove such messages"
                )
            shown_roles.add(message["role"])


def check_parts(record: Record, render: Renderer, template: str) -> None:
    """Raises RunError for tools, or parts of messages, that are not in the text.

    template: what renders the record, as the error names it.
    """
    prompt, tools = messages_of(record.prompt), record.tools
    is_shown = {"tools": differs(render, (prompt, tools), (prompt, None))} if tools else {}
    for before, message in messages_with_context(record):
        for part, other in without_parts(message):
            if is_shown.get(part, True):
                dialogues = ([*before, message], tools), ([*before, other], tools)
                is_shown[part] = differs(render, *dialogues)
    if hidden := [part for part in is_shown if not is_shown[part]]:
        raise RunError(
            f"{record.name}: {template} does not show {' and '.join(hidden)}; take a tokenizer "
            "whose chat template does, or remove what is not to be learned from the record"
        )


def without_parts(message: dict) -> Iterator[tuple[str, dict]]:
    """(part, the message without it) of the parts of a message that must be in the text."""
    for keys in (("tool_calls",), ("function_call",), REASONING):
        if present := [key for key in keys if key in message]:
            yield present[0], {key: message[key] for key in message if key not in keys}
    if message["content"] and "tool_calls" in message:  # which some templates show in its place
        yield "content beside tool_calls", message | {"content": ""}


def without_hidden_keys(record: Record, render: Renderer) -> Record:
    """The record whose notes name further keys of messages, if its text is the same without them.

    Its answers have none of these keys. Those that `check_parts` refuses are not looked at.
    """
    prompt, answers = messages_of(record.prompt), []
    names = {f"prompt[].{key}" for _, key in hidden_keys(render, [], prompt, record.tools)}
    for answer in record.answers:
        hidden = hidden_keys(render, prompt, [answer], record.tools)
        names |= {f"responses[].{key}" for _, key in hidden}
        answers += without(hidden, [answer])
    if not names:
        return record
    if not any(answer.keys() - BARE for answer in answers):
        answers = []
    return replace(record, answers=tuple(answers), notes=with_names(record.notes, names))


def hidden_keys(
    render: Renderer, before: list[dict], messages: list[dict], tools: list | None
) -> set[tuple[str, str]]:
    """(role, key) of the further keys of `messages` without which a dialogue has the same text.

    before: messages of the dialogue that precede them.
    """
    keys = {(each["role"], key) for each in messages for key in each.keys() - BARE - FURTHER}
    whole = ([*before, *messages], tools)
    return {
        key
        for key in keys
        if not differs(render, whole, ([*before, *without({key}, messages)], tools))
    }


def without(keys: set[tuple[str, str]], messages: list[dict]) -> list[dict]:
    """The messages without these keys, (role, key)."""
    return [
        {key: message[key] for key in message if (message["role"], key) not in keys}
        for message in messages
    ]
