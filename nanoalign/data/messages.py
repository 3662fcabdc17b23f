"""Records of messages, and what belongs to a prompt beside them: a system prompt and tools.

A message has a role and a content, which is text. It may have tool calls, reasoning and further
keys, which a chat template gets (nanoalign/data/templates.py).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from nanoalign.data.columns import TEXTS
from nanoalign.data.dialogues import is_dialogue, messages_of
from nanoalign.data.table_files import without_null
from nanoalign.records import Format, Record, check_text

REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same in chat templates
BARE = {"role", "content"}
FURTHER = {"tool_calls", "function_call", *REASONING}  # text of a message beside its content


def read_messages(read: Format, record: dict) -> Record:
    """Reads a record that has messages, which may be JSON text, tools or `system`, by `read`.

    read: gets the record with its messages decoded; it need not read tools and `system`. Raises
    ValueError for messages or tools that are wrong.
    """
    record = decode_messages(record)
    if isinstance(record.get("prompt"), list) and record["prompt"]:
        record = record | {"prompt": messages(record["prompt"], "prompt")}
    parsed = with_context(read(record), record)
    if isinstance(parsed.prompt, list):
        check_text("prompt", "\n".join(message["content"] for message in parsed.prompt))
    return parsed


def decode_messages(record: dict) -> dict:
    """Returns the record with messages in place of JSON text of messages; other text unchanged."""
    decoded = {key: json_messages(record[key]) or record[key] for key in TEXTS if key in record}
    if isinstance(responses := record.get("responses"), list):
        decoded["responses"] = [json_messages(response) or response for response in responses]
    return record | decoded


def json_messages(value: object) -> list[dict] | None:
    """Returns the messages of a JSON text, a list of objects with a role and a content.

    Tool calls or reasoning may be in place of the content. Returns None for any other value.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        values = json.loads(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits; 1,000 brackets
        return None
    are_messages = isinstance(values, list) and all(
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and value.keys() & {"content", *FURTHER}
        for value in values
    )
    return values if are_messages and values else None


def messages(values: object, name: str) -> list[dict]:
    """Returns the messages of a list, each as `message` returns it. name: of it, for errors.

    Raises ValueError if there are none, or one is wrong.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of at least one message")
    return [message(value, name) for value in values]


def message(value: object, name: str) -> dict:
    """Returns a message with role, content as one text, and its further keys, sorted.

    Keys without a value are left out: a table of records has all keys in every message. Raises
    ValueError if role or content is missing or no text. name: of the list, for errors.
    """
    further = {}
    for key, item in sorted(without_null(value).items()) if isinstance(value, dict) else ():
        if item or key not in FURTHER:
            further[key] = item
    role, content = further.pop("role", None), further.pop("content", None)
    if "tool_calls" in further:
        further["tool_calls"] = tool_calls(further["tool_calls"], name)
    if isinstance(content, list):
        content = "".join(text_of(part, name) for part in content)
    if content is None and FURTHER & further.keys():
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{name} has {value!r}; expected {{'role': text, 'content': text}}")
    if further:
        check_json(f"further keys of a message of {name}", further)
    return {"role": role, "content": content} | further


def check_json(name: str, value: object) -> None:
    """Raises ValueError for a value that JSON does not have, or with half a character."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a date or bytes, of a table
        raise ValueError(f"the {name} are no JSON: {error}") from error
    check_text(name, text)


def is_of_assistant(message: dict) -> bool:
    return message["role"] == "assistant"


def text_of(part: object, name: str) -> str:
    """Returns the text of one part of a message whose content is a list of parts.

    Raises ValueError if the part is not text. name: of the field, for errors.
    """
    kind, text = type(part).__name__, None
    if isinstance(part, dict):
        kind, text = part.get("type", "text"), part.get("text")
    if kind == "text" and isinstance(text, str):
        return text
    raise ValueError(f"{name} has a content with a part of type {kind!r}; only text can be read")


def tool_calls(calls: object, name: str) -> list[dict]:
    """Returns the calls with their arguments as objects, which chat templates expect.

    Arguments may be JSON text, of the call itself or of its "function". Raises ValueError for calls
    that are no list of objects, or text that is no JSON.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{name} has the tool_calls {calls!r}; expected a list of objects")
    return [
        {
            key: decode_arguments(item, name) if key == "function" else item
            for key, item in decode_arguments(call, name).items()
        }
        for call in calls
    ]


def decode_arguments(function: object, name: str) -> object:
    """Returns a called function with its arguments, if they are JSON text, decoded.

    Raises ValueError if the text is no JSON. name: for errors.
    """
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return function
    try:
        return function | {"arguments": json.loads(arguments or "{}")}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} has a tool call whose arguments are no JSON: {error}") from error


def with_context(parsed: Record, record: dict) -> Record:
    """Returns the Record with `system` as its first message, and with `tools`.

    Raises ValueError if its messages begin with another system prompt.
    """
    prompt, responses = parsed.prompt, parsed.responses
    if prompt == [] or not isinstance(prompt, list):
        check_text("prompt", prompt or "")
    if system := record.get("system"):
        check_text("system prompt", system)
        first, turns = {"role": "system", "content": system}, messages_of(prompt)
        if turns[0]["role"] != "system":
            if is_dialogue(prompt):  # the space before an answer belongs to its headers
                responses = tuple(response.removeprefix(" ") for response in responses)
            prompt = [first, *turns]
        elif turns[0] != first:
            raise ValueError(
                "the key 'system' and the first message are different system prompts; remove one"
            )
    return replace(parsed, prompt=prompt, responses=responses, tools=tools_of(record.get("tools")))


def tools_of(tools: object) -> list[dict] | None:
    """Returns the tools of a record, which may be JSON text; None if there are none.

    Raises ValueError if they are no list of objects.
    """
    try:
        decoded = without_null(tools)  # of a table; JSON text is as it was written
        decoded = json.loads(tools) if isinstance(tools, str) and tools else decoded
    except (ValueError, RecursionError):
        decoded = tools
    if decoded and not (
        isinstance(decoded, list) and all(isinstance(tool, dict) for tool in decoded)
    ):
        raise ValueError(f"tools must be a list of JSON schemas, found {str(tools)[:60]!r}")
    check_json("tools", decoded)
    return decoded or None


# --- responses ------------------------------------------------------------------------------------


def answer(value: object, name: str) -> dict:
    """Returns a response as a message: it is text, one message of the assistant, or a list of one.

    Raises ValueError for anything else. name: of the response, for errors.
    """
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    first, *more = messages(value if isinstance(value, list) else [value], name)
    if more or first["role"] != "assistant":
        found = f"{1 + len(more)} messages" if more else f"role {first['role']!r}"
        raise ValueError(
            f"the {name} must be text or exactly one message with role 'assistant'; found {found}"
        )
    return first


def with_answers(record: Record, answers: Sequence[dict]) -> Record:
    """Returns the record with these messages as its responses, as texts.

    The text of a message with tool calls or reasoning is its JSON. The messages are its `answers`,
    too, if one has a further key, which a chat template may read.
    """
    texts = [
        json.dumps(message, ensure_ascii=False) if FURTHER & message.keys() else message["content"]
        for message in answers
    ]
    more = any(message.keys() - BARE for message in answers)
    return replace(record, responses=tuple(texts), answers=tuple(answers) if more else ())


def pair_of_messages(record: dict) -> Record:
    """Reads two lists of messages: the last one is the response, those before it are the prompt.

    A prompt of the record goes before them, unless they begin or end with it. Raises ValueError if
    the prompts differ or are empty, or a list does not end with the assistant.
    """
    prompt = record.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = messages(prompt, "prompt") if prompt else []
    contexts, answers = [], []
    for side in ("chosen", "rejected"):
        *before, last = messages(record[side], side)
        if not is_of_assistant(last):
            raise ValueError(f"{side} ends with a message of '{last['role']}', not of 'assistant'")
        contexts.append(with_prompt(prompt, before))
        answers.append(last)
    if contexts[0] != contexts[1]:
        raise ValueError(
            "chosen and rejected differ before their last message: no common prompt. A response is "
            "one message of 'assistant'; put the turns before it into the prompt of both, or make "
            "a record of each turn"
        )
    if not contexts[0]:
        raise ValueError("the prompt is empty; give 'prompt', or messages before the response")
    return with_answers(Record(contexts[0], ()), answers)


def with_prompt(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """Returns the messages behind those of a prompt, unless they begin or end with the prompt.

    White space around contents, and a system prompt that the messages lack, make no other prompt.
    """

    def bare(values: list[dict]) -> list[dict]:
        return [each | {"content": each["content"].strip()} for each in values]

    system = prompt[:1] if [each["role"] for each in prompt[:1]] == ["system"] else []
    if "system" in [each["role"] for each in messages]:
        system = []
    for first in ([], system):
        theirs, ours = bare(messages), bare(prompt[len(first) :])
        if ours and ours in (theirs[: len(ours)], theirs[-len(ours) :]):
            return first + messages
    return prompt + messages


def from_messages(record: Record, *names: str) -> Record:
    """Returns the record with text in place of responses that are messages (with_answers).

    names: of the responses, or one for all, for errors. Raises ValueError as `answer` does.
    """
    if not any(isinstance(response, dict | list) for response in record.responses):
        return record
    return with_answers(record, list(map(answer, record.responses, cycle(names))))
