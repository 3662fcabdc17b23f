"""Formats of other programs and data sets, read as records of our own formats.

A function takes a copy of a record, removes the keys that it reads, and returns a record of one of
our formats. Keys that it leaves are named with the ignored columns. docs/data.md has an example of
each format.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import NoReturn

from nanoalign.data.columns import SUBSET, ignored, number
from nanoalign.records import Formats, Record, check_text

ROLES = {  # of ShareGPT -> of messages
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}
KEPT = ("system", "tools", "margin", SUBSET)  # columns that our formats read, too
HEADER = "<extra_id_1>"  # of a turn of HelpSteer2


def read_foreign(convert: Callable[[dict], dict], ours: Formats, record: dict) -> Record:
    """Converts a record by a function of FOREIGN, and reads the result by one of our formats.

    Adds a note of the keys that `convert` has left.
    """
    rest = dict(record)
    converted = convert(rest)
    for key in KEPT:
        if key in rest and key not in converted:
            converted[key] = rest.pop(key)
    keys = next(keys for keys in ours if converted.keys() >= set(keys))
    parsed = ours[keys](converted)
    return replace(parsed, notes=(*parsed.notes, *ignored(rest.keys(), keys))) if rest else parsed


def refuse_unknown(known: Sequence[tuple[str, ...]], record: dict) -> NoReturn:
    """Raises ValueError for a record that no format reads.

    The error names the format, of `known`, of whose keys the record has the largest share.
    """
    nearest = max(known, key=lambda keys: len(record.keys() & {*keys}) / len(keys))
    missing = " and ".join(repr(key) for key in nearest if key not in record)
    raise ValueError(
        f"unknown keys {sorted(record)}; the nearest format is {' + '.join(nearest)}, without "
        f"{missing} here. docs/data.md has all formats; for other names of keys give --keys "
        "prompt=NAME chosen=NAME rejected=NAME"
    )


# --- what several formats have --------------------------------------------------------------------


def turns(values: object, name: str) -> list[dict]:
    """Returns messages of ShareGPT, {"from", "value"}, as {"role", "content"}; others unchanged.

    Raises ValueError if there are none, or one is from an unknown role. name: for errors.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of at least one message")
    return [turn(value, name) for value in values]


def turn(value: object, name: str) -> dict:
    """Returns one message as `turns` does."""
    if not isinstance(value, dict) or "from" not in value:
        return value
    if (role := ROLES.get(str(value["from"]))) is None:
        raise ValueError(f"{name} has a message from {value['from']!r}; expected one of {[*ROLES]}")
    if value["from"] == "function_call":
        return {"role": role, "content": "", "tool_calls": calls(value.get("value"), name)}
    return {"role": role, "content": value.get("value")}


def calls(text: object, name: str) -> list[dict]:
    """Returns the tool calls of a function_call: JSON of one {name, arguments}, or a list of them.

    Raises ValueError for any other text. name: for errors.
    """
    try:
        values = json.loads(text)
        return [
            {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
            for call in (values if isinstance(values, list) else [values])
        ]
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{name} has a function_call of {str(text)[:60]!r}; expected JSON with name and "
            "arguments"
        ) from error


def instruction(rest: dict) -> list[dict] | str:
    """Returns an Alpaca record's prompt: earlier turns, instruction, and input in its own line.

    It is text if there are no earlier turns, else messages. Removes its keys from `rest`. Raises
    ValueError if instruction or input is no text, or history no list of [question, answer].
    """
    text, more, history = rest.pop("instruction"), rest.pop("input", ""), rest.pop("history", None)
    check_text("instruction", text)
    if more:
        check_text("input", more)
        text = f"{text}\n{more}"
    are_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in history
    )
    if history and not are_pairs:
        raise ValueError(f"history is {str(history)[:60]}; expected a list of [question, answer]")
    before = [
        {"role": role, "content": content}
        for question, answer in history or ()
        for role, content in (("user", question), ("assistant", answer))
    ]
    return [*before, {"role": "user", "content": text}] if before else text


def objects(values: object, name: str, *keys: str) -> list[dict]:
    """Returns the values. Raises ValueError unless they are a list of objects with these keys."""
    if not isinstance(values, list) or not all(
        isinstance(value, dict) and value.keys() >= {*keys} for value in values
    ):
        raise ValueError(f"{name} must be a list of objects with {' and '.join(keys)}")
    return values


# --- pairs ----------------------------------------------------------------------------------------


def renamed_prompt(name: str, rest: dict) -> dict:
    """Reads a pair whose prompt has another name. Removes these three keys from `rest`."""
    return {"prompt": rest.pop(name)} | {side: rest.pop(side) for side in ("chosen", "rejected")}


def sharegpt(rest: dict) -> dict:
    """Reads a pair in LLaMA-Factory's sharegpt format. Removes its keys from `rest`.

    `conversations` is the prompt; `chosen` and `rejected` are one turn {from, value} each.
    """
    prompt = turns(rest.pop("conversations"), "conversations")
    sides = {side: [turn(rest.pop(side), side)] for side in ("chosen", "rejected")}
    return {"prompt": prompt} | sides


def alpaca(rest: dict) -> dict:
    """Reads a pair in LLaMA-Factory's alpaca format: instruction, input, chosen, rejected."""
    return {"prompt": instruction(rest)} | {side: rest.pop(side) for side in ("chosen", "rejected")}


def swift(name: str, rest: dict) -> dict:
    """Reads a pair of ms-swift: messages that end with the chosen answer, and the rejected one.

    rest[name]: the rejected answer, as text or messages.
    """
    *prompt, chosen = turns(rest.pop("messages"), "messages")
    rejected = rest.pop(name)
    if isinstance(rejected, list):
        return {"chosen": [*prompt, chosen], "rejected": rejected}
    return {"prompt": prompt, "chosen": [chosen], "rejected": rejected}


def two_conversations(rest: dict) -> dict:
    """Reads a pair of torchtune: two lists of messages that begin with the same prompt."""
    return {side: rest.pop(f"{side}_conversations") for side in ("chosen", "rejected")}


def shp(rest: dict) -> dict:
    """Reads Stanford SHP: a post and two comments; `labels` is 1 if A has the higher score.

    Raises ValueError if `labels` is not 0 or 1.
    """
    label = rest.pop("labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise ValueError(f"labels is {label!r}; expected 1 where A is preferred, else 0")
    answers = [rest.pop("human_ref_A"), rest.pop("human_ref_B")]
    chosen, rejected = answers if label else answers[::-1]
    return {"prompt": rest.pop("history"), "chosen": chosen, "rejected": rejected}


# --- rankings, in which equal scores make no pair -------------------------------------------------


def nectar(rest: dict) -> dict:
    """Reads Nectar: HH-RLHF dialogues as prompts, and answers with ranks (1 is the best)."""
    prompt, answers = rest.pop("prompt"), objects(rest.pop("answers"), "answers", "answer", "rank")
    texts = [answer["answer"] for answer in answers]
    if isinstance(prompt, str) and prompt.rstrip(" ").endswith("\n\nAssistant:"):
        prompt, texts = prompt.rstrip(" "), [f" {text}" for text in texts]
    ranks = [number(answer["rank"], "rank") for answer in answers]
    return {"prompt": prompt, "responses": texts, "scores": [-rank for rank in ranks]}


def nemo(rest: dict) -> dict:
    """Reads NeMo-RL's preferences: messages, and completions with ranks, of which 0 is the best."""
    completions = objects(rest.pop("completions"), "completions", "rank", "completion")
    ranks = [number(each["rank"], "rank") for each in completions]
    responses = [each["completion"] for each in completions]
    return {
        "prompt": rest.pop("context"),
        "responses": responses,
        "scores": [-rank for rank in ranks],
    }


def ultrafeedback(rest: dict) -> dict:
    """Reads rated UltraFeedback: the score of an answer is the mean of its aspects' ratings."""
    answers = objects(rest.pop("completions"), "completions", "response")
    prompt, responses = instruction(rest), [answer["response"] for answer in answers]
    return {"prompt": prompt, "responses": responses, "scores": [rating(each) for each in answers]}


def rating(answer: dict) -> float:
    """Returns the mean of an answer's ratings but "N/A"; without any, its overall_score.

    Raises ValueError if it has neither, or a rating is no number.
    """
    aspects = answer.get("annotations")
    parts = aspects.values() if isinstance(aspects, dict) else ()
    ratings = [part.get("Rating") for part in parts if isinstance(part, dict)]
    ratings = [value for value in ratings if value != "N/A"]
    try:
        return fmean(map(float, ratings)) if ratings else answer["overall_score"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a completion has no ratings: annotations are {str(aspects)[:60]!r}"
        ) from error


def helpsteer2(rest: dict) -> dict:
    """Reads HelpSteer2's preferences: from -3 (first answer much better) to 3 (second is)."""
    answers = [rest.pop(f"response_{n}") for n in (1, 2)]
    return two_ranked(turns_of_helpsteer(rest.pop("prompt")), answers, "preference_strength", rest)


def turns_of_helpsteer(prompt: object) -> object:
    """Returns a prompt, split at lines "<extra_id_1>Assistant" and "<extra_id_1>User", as messages.

    A prompt without such lines is returned unchanged. Raises ValueError for a turn of another name.
    """
    if not isinstance(prompt, str) or HEADER not in prompt:
        return prompt
    messages = []
    for part in f"User\n{prompt}".split(HEADER):
        who, _, text = part.partition("\n")
        if who not in ("User", "Assistant"):
            raise ValueError(f"the prompt has a turn of {who[:60]!r}; expected User or Assistant")
        messages.append({"role": who.lower(), "content": text.removesuffix("\n")})
    return messages


def helpsteer3(rest: dict) -> dict:
    """Reads HelpSteer3: `context` is messages, `overall_preference` as HelpSteer2's."""
    answers = [rest.pop(f"response{n}") for n in (1, 2)]
    return two_ranked(rest.pop("context"), answers, "overall_preference", rest)


def two_ranked(prompt: object, answers: list, name: str, rest: dict) -> dict:
    """Returns a ranking of two answers. rest[name]: how much better the second one is.

    Removes that key from `rest`. Raises ValueError if its value is no number.
    """
    strength = number(rest.pop(name), name)
    return {"prompt": prompt, "responses": answers, "scores": [-strength, 0]}


def helpsteer_ratings(rest: dict) -> NoReturn:
    """Raises ValueError: HelpSteer2's ratings have one answer a record, so they make no pairs."""
    raise ValueError(
        "HelpSteer2's ratings have one answer a record; take its preferences (the folder "
        "preference/), or make records of prompt + responses + scores"
    )


# --- single responses -----------------------------------------------------------------------------


def conversation(name: str, rest: dict) -> dict:
    """Reads messages, of which the last one is the response, and perhaps its label (kto_tag).

    Raises ValueError if there is one message alone.
    """
    *prompt, last = turns(rest.pop(name), name)
    if not prompt:
        raise ValueError(f"{name} has one message; expected a prompt and an answer")
    return {"prompt": prompt, "completion": [last]} | label(rest)


def instructed(rest: dict) -> dict:
    """Reads an Alpaca record as prompt + completion, and label if it has kto_tag or label.

    The prompt is as in `instruction`, which may raise ValueError: of instruction, input, history.
    """
    return {"prompt": instruction(rest), "completion": rest.pop("output")} | label(rest)


def label(rest: dict) -> dict:
    """Returns {"label": the label of a response}, or {} if it has none; removes it from `rest`."""
    labels = [rest.pop(key) for key in ("kto_tag", "label") if key in rest]
    return {"label": labels[0]} if labels else {}


# Keys of records of other programs -> the function that reads them.
FOREIGN = {
    ("conversations", "chosen", "rejected"): sharegpt,
    ("instruction", "chosen", "rejected"): alpaca,
    ("question", "chosen", "rejected"): partial(renamed_prompt, "question"),  # Intel's Orca pairs
    ("input", "chosen", "rejected"): partial(renamed_prompt, "input"),  # Argilla's Orca pairs
    # OpenRLHF, and LLaMA-Factory with messages of OpenAI
    ("context_messages", "chosen", "rejected"): partial(renamed_prompt, "context_messages"),
    ("messages", "chosen", "rejected"): partial(renamed_prompt, "messages"),
    ("messages", "rejected_response"): partial(swift, "rejected_response"),
    ("messages", "rejected_messages"): partial(swift, "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"): two_conversations,
    ("history", "human_ref_A", "human_ref_B", "labels"): shp,
    ("prompt", "answers"): nectar,
    ("context", "completions"): nemo,
    ("instruction", "completions"): ultrafeedback,
    ("prompt", "response_1", "response_2", "preference_strength"): helpsteer2,
    ("context", "response1", "response2", "overall_preference"): helpsteer3,
    ("prompt", "response", "helpfulness"): helpsteer_ratings,
    ("messages",): partial(conversation, "messages"),
    ("conversations",): partial(conversation, "conversations"),
    ("instruction", "output"): instructed,
}
