"""The chat template of a tokenizer: renders dialogues, and finds what of a record it leaves out.

A template may leave out tools, tool calls, reasoning, messages, or a part of a content without a
word, and what is left out would be trained on as if it were not there. So every text of a record is
looked for in its rendering. A short text may be there by chance: of each new shape of a dialogue, a
copy whose texts are words that nothing else has is rendered and looked through, too.
"""

import datetime
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from jinja2 import TemplateError

from nanoalign.data.columns import with_names
from nanoalign.data.dialogues import messages_of
from nanoalign.data.messages import BARE, FURTHER, REASONING, is_of_assistant
from nanoalign.data.template_limits import limits
from nanoalign.encode import tokenize, tokenize_continuations
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.records import Record

SECONDS = 5.0  # of one dialogue, which takes less than a thousandth of that
LETTERS = 20_000_000  # of its text
HALF = re.compile(r"[\ud800-\udfff]")  # of a character: a lone surrogate
END_OF_THINKING = "</think>"
EARLIER_REASONING = "prompts without earlier reasoning, which the chat template leaves out"
NOT_TEXT = {"type", "id", "index"}  # keys of a tool call that templates need not show
ANYWHERE = {"system", "developer"}  # roles whose messages some templates move

# (messages, tools) -> text; raises TemplateError whatever goes wrong
Renderer = Callable[..., str]


def with_arguments(tokenizer, arguments: Sequence[str]):
    """The tokenizer, whose chat templates have these values where a caller gives no others.

    arguments: NAME=VALUE each, a JSON value or text. A model that is saved with the tokenizer keeps
        them. Raises RunError for what has another form, or that no chat template reads.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        templates = tokenizer.chat_template or {}
        texts = templates.values() if isinstance(templates, dict) else [templates]
        if (
            not name.isidentifier()
            or not value
            or not any(re.search(rf"\b{name}\b", text) for text in texts)
        ):
            raise RunError(
                f"--template_args {argument}: expected NAME=VALUE, with a NAME that the chat "
                f"template of the model reads{'' if templates else '; it has no chat template'}"
            )
        with suppress(ValueError, RecursionError):  # text without quotation marks; 1,000 brackets
            value = json.loads(value)
        # As repr writes it, a value is one of Jinja, too: True, None, 'text', [1], {'a': 1}.
        default = (
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
        )
        if isinstance(templates, dict):
            tokenizer.chat_template = {key: default + text for key, text in templates.items()}
        else:
            tokenizer.chat_template = default + templates
    return tokenizer


def of_date(date: datetime.date) -> str:
    """The text of a Jinja macro in place of strftime_now, of which transformers has today's.

    It replaces the directives of strftime by their values for a date, at midnight.
    """
    codes = [f"%{code}" for code in (*"aAbBcCdDeFgGhHIjklmMnpRStTuUVwWxXyYZ", "-d", "-m", "%")]
    values = "".join(f".replace({code!r}, {date.strftime(code)!r})" for code in codes)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{values} -}}}}{{%- endmacro %}}\n"


class ChatTemplate:
    """The chat template of a tokenizer. date: the day that it may write; None: today."""

    def __init__(self, tokenizer, date: datetime.date | None = None):
        self.tokenizer = tokenizer
        self.before = of_date(date) if date else ""  # of the text of the template
        self.added_tokens = tuple(tokenizer.get_added_vocab())  # "<|im_end|>" is one of these
        self.spaces: dict[str, bool] = {}  # whether `puts_space` behind a token
        self.shapes: set[tuple] = set()  # of dialogues whose copies `check_shown` looked through

    def render(self, messages: list[dict], tools: list | None = None, **options: object) -> str:
        """The text of messages. options: further arguments of apply_chat_template.

        Raises TemplateError whatever goes wrong.
        """
        options |= {"tools": tools, "tokenize": False}
        try:
            with limits(SECONDS):
                template = self.tokenizer.get_chat_template(None, tools)
                if self.before and "strftime_now" in template:
                    options["chat_template"] = self.before + template
                text = self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(in_a_line(error)) from error
        if len(text) > LETTERS:
            raise TemplateError(f"it writes {len(text):,} characters")
        if HALF.search(text):  # "\\ud83d" in its text
            raise TemplateError("it writes half a character (a lone surrogate)")
        return text

    def behind(self, prompt: str, texts: Sequence[str]) -> list[str]:
        """Returns texts that follow a prompt as the tokenizer reads them there.

        A SentencePiece tokenizer of the older kind ("legacy") puts a space before a text behind a
        special token.
        """
        token = next(filter(prompt.endswith, self.added_tokens), None)
        if token is None:
            return list(texts)
        if token not in self.spaces:
            self.spaces[token] = self.puts_space(token, "x")
        if not self.spaces[token]:
            return list(texts)
        return [f" {text}" if self.puts_space(token, text) else text for text in texts]

    def puts_space(self, token: str, text: str) -> bool:
        """Whether a text behind a token has the tokens of a text with a space before it."""
        alone, both = tokenize([token, f"{token}{text}"], self.tokenizer)
        plain, spaced = tokenize_continuations([text, f" {text}"], self.tokenizer)
        return both == alone + spaced != alone + plain

    def check_shown(
        self, record: Record, prompt: str, dialogues: Sequence[list[dict]], texts: Sequence[str]
    ) -> None:
        """Raises RunError for a text of a record that is not in its rendering.

        prompt: the text before the answers. dialogues: the messages of the prompt with each
        answer. texts: what they are rendered to.
        """
        lost: dict[str, str] = {}
        begun = dialogues and len(dialogues[0]) == len(messages_of(record.prompt))
        for n, (messages, text) in enumerate(zip(dialogues, texts, strict=True)):
            if n == 0 or begun:  # the answer continues the last message of the prompt
                lost |= lost_parts(messages, record.tools, text)
            else:  # the prompt is the same; its header may have what the answer begins with
                start = max(0, prompt.rfind(messages[-2]["content"].strip()))
                more = lost_parts(messages[-1:], None, text, start)
                if more:
                    # The prompt's last words may be in the header, too: "hi" in "<think>".
                    with suppress(TemplateError):
                        bare = self.render(messages[:-1], record.tools)
                        start = len(os.path.commonprefix([prompt, bare]))
                        more = lost_parts(messages[-1:], None, text, start)
                lost |= more
            shape = (bool(record.tools), *map(shape_of, messages))
            if not lost and shape not in self.shapes:
                self.shapes.add(shape)
                copy = marked(messages, record.tools)
                with suppress(TemplateError):  # it accepts some contents alone, as the record's
                    lost = dict.fromkeys(lost_parts(*copy, self.render(*copy)), "")
        if lost:
            word = next(iter(lost.values()))
            found = f": {word[:40]!r} is not in the text that it renders" if word else ""
            raise RunError(
                f"{record.name}: the chat template of this tokenizer does not show "
                f"{' and '.join(lost)}{found}. Take a tokenizer whose chat template does, "
                "--template pku or raw, or remove what is not to be learned from the record"
            )

    def check_begin(self, record: Record, messages: list[dict], prompt: str) -> None:
        """Raises RunError for a text that begins as a turn does: that would be there twice.

        prompt: the rendering of the messages of the record's prompt.
        """
        answers = [answer["content"] for answer in record.answers] or record.responses
        texts = [*answers, *([record.prompt] if isinstance(record.prompt, str) else [])]
        for text in texts:
            if text.lstrip().startswith(self.added_tokens):
                without_header = self.render(messages, record.tools)
                header = prompt[len(os.path.commonprefix([prompt, without_header])) :].lstrip()
                first = next(filter(header.startswith, self.added_tokens), None)
                if first and text.lstrip().startswith(first):
                    raise RunError(
                        f"{record.name}: {text[:40]!r} begins with {first!r}, as the turns that "
                        "the chat template writes; remove such headers, or use --template raw"
                    )


def differs(render: Renderer, *dialogues: tuple[list[dict], list | None]) -> bool:
    """Whether two dialogues, (messages, tools), have two texts."""
    try:
        first, second = (render(*dialogue) for dialogue in dialogues)
    except TemplateError:  # of a record's own dialogue it is reported where the record is rendered
        return True
    return first != second


# --- texts that are not in the rendering ----------------------------------------------------------


def shape_of(message: dict) -> tuple:
    """What the parts are that a message has: its role and keys, and how many tool calls."""
    calls = len(message.get("tool_calls", ()))
    return message["role"], bool(message["content"].strip()), calls, *sorted(message.keys() - BARE)


def lost_parts(
    messages: Sequence[dict], tools: list[dict] | None, text: str, start: int = 0
) -> dict[str, str]:
    """The parts of a dialogue that are not all in its text behind `start`, with a missing word."""
    names = [name for name in names_of_tools(tools) if name not in text]
    lost = {"tools": names[0]} if names else {}
    for message in messages:
        ends = []
        for part, groups in parts_of(message):
            place = 0 if message["role"] in ANYWHERE else start
            try:
                for texts in groups:
                    place = max(end_of(each, text, place) for each in texts)
                ends.append(place)
            except LookupError as error:
                lost.setdefault(part, error.args[0])
        if message["role"] not in ANYWHERE:
            start = min(ends, default=start)
    return lost


def parts_of(message: dict) -> Iterator[tuple[str, list[list[str]]]]:
    """(part, its groups of texts) of a message, for the parts that have a text.

    Groups follow one another in a rendering, the texts of a group have any order.
    """
    if message["content"].strip():
        yield f"the text of a message of '{message['role']}'", [[message["content"]]]
    if len(message) == len(BARE):
        return
    for key in (*REASONING, "function_call", "tool_calls"):
        values = message.get(key, ())
        groups = [list(texts_in(each)) for each in (values if key == "tool_calls" else [values])]
        if groups := [group for group in groups if group]:
            yield key, groups


def texts_in(value: object) -> Iterator[str]:
    """The texts of a tool call, or of reasoning, that are not blank: also names of arguments."""
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == "arguments" and isinstance(each, dict):
                yield from each
            if key not in NOT_TEXT:
                yield from texts_in(each)


def names_of_tools(tools: list[dict] | None) -> Iterator[str]:
    """The names of tools, and of their parameters."""
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            yield from properties if isinstance(properties, dict) else ()


def end_of(string: str, text: str, start: int) -> int:
    """Where a string ends in the part of a text behind `start`. Raises LookupError(a lost word).

    Templates may change white space, and may write a string as JSON: then its words are there, in
    their order.
    """
    string = string.strip()
    if (place := text.find(string, start)) >= 0:
        return place + len(string)
    for word in re.sub(r"(</?think>)", r" \1 ", string).split():
        forms = {word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]}
        places = [(place, len(form)) for form in forms if (place := text.find(form, start)) >= 0]
        if not places:
            raise LookupError(word)
        start = sum(min(places))
    return start


def marked(
    messages: Sequence[dict], tools: list[dict] | None
) -> tuple[list[dict], list[dict] | None]:
    """A copy of messages and tools whose texts and names are words that nothing else has."""
    numbers = count()

    def mark(value: object) -> object:
        if isinstance(value, str):
            return f"mark{next(numbers)}q" if value.strip() else value
        if isinstance(value, list | tuple):
            return [mark(each) for each in value]
        if isinstance(value, dict):
            return {key: mark(each) for key, each in value.items()}
        return value

    def marked_in(value: dict, key: str) -> dict:
        """A call with other arguments, or a tool with another name."""
        function = value.get("function", value)
        new = function | {key: mark(function[key])} if key in function else function
        return value | {"function": new} if "function" in value else new

    copies = []
    for message in messages:
        copy, words = dict(message), {}
        for key in REASONING:  # some programs write one reasoning under two names
            if key in message:
                copy[key] = words.setdefault(repr(message[key]), mark(message[key]))
        tags = re.fullmatch(r"(<(\w+)>).*(</\2>)", message["content"].strip(), re.DOTALL)
        copy["content"] = mark(message["content"])
        if tags:  # templates know tool results of the role user by their tags
            copy["content"] = f"{tags[1]}\n{copy['content']}\n{tags[3]}"
        if "tool_calls" in message:
            copy["tool_calls"] = [marked_in(call, "arguments") for call in message["tool_calls"]]
        copies.append(copy)
    return copies, tools and [marked_in(tool, "name") for tool in tools]


# --- what is left out before a record is rendered -------------------------------------------------


def without_earlier_reasoning(record: Record, render: Renderer) -> Record:
    """The record without reasoning of earlier turns that the template shows in the last one alone.

    So templates forget what was thought before an earlier answer; a note counts such records.
    """
    prompt = list(messages_of(record.prompt))
    for n, message in enumerate(prompt[:-1]):
        bare = {key: message[key] for key in message if key not in REASONING}
        content = message["content"].rpartition(END_OF_THINKING)[2]
        # Some templates remove the white space behind the reasoning, too.
        has_thought = content != message["content"]
        for text in (content, content.lstrip()) if has_thought else (content,):
            other = bare | {"content": text}
            if not is_of_assistant(message) or other == message:
                continue
            before, behind = prompt[:n], prompt[n + 1 :]
            as_last = [*before, message], [*before, other]
            earlier = [*before, message, *behind], [*before, other, *behind]
            if differs(render, *((dialogue, record.tools) for dialogue in as_last)) and not differs(
                render, *((dialogue, record.tools) for dialogue in earlier)
            ):
                prompt[n] = other
                break
    if prompt == messages_of(record.prompt):
        return record
    return replace(record, prompt=prompt, notes=(*record.notes, EARLIER_REASONING))


def without_hidden_keys(record: Record, render: Renderer | None) -> Record:
    """The record whose notes name further keys of messages, if its text is the same without them.

    Its answers have none of these keys. Those that `check_shown` refuses are not looked at.
    render: None for a template that shows no keys.
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
    render: Renderer | None, before: list[dict], messages: list[dict], tools: list | None
) -> set[tuple[str, str]]:
    """(role, key) of the further keys of `messages` without which a dialogue has the same text.

    before: messages of the dialogue that precede them.
    """
    keys = {(each["role"], key) for each in messages for key in each.keys() - BARE - FURTHER}
    whole = ([*before, *messages], tools)
    return {
        key
        for key in keys
        if render is None
        or not differs(render, whole, ([*before, *without({key}, messages)], tools))
    }


def without(keys: set[tuple[str, str]], messages: list[dict]) -> list[dict]:
    """The messages without these keys, (role, key)."""
    return [
        {key: message[key] for key in message if (message["role"], key) not in keys}
        for message in messages
    ]
