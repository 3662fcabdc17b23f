"""The data of evaluate.py policy: prompts alone, and answers of other programs."""

import json
from collections.abc import Sequence
from dataclasses import replace

from nanoalign.data.formats import decode_renamed, formats, names_of
from nanoalign.data.messages import read_messages
from nanoalign.data.sources import check_sources, open_source
from nanoalign.errors import RunError
from nanoalign.records import Record, check_text, decode, parse

CONTEXT = ("prompt", "system", "tools")  # what an answer follows
ANSWER_KEYS = ("response", "answer", "completion", "output")  # what programs call an answer


def prompt_key(prompt: str | list[dict], tools: list[dict] | None = None) -> str:
    """The prompt as one text; messages, and tools beside it, as JSON."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return json.dumps((text, tools)) if tools else text


def shown(prompt: str | list[dict], between: str) -> str:
    """The prompt as a page shows it; `between` stands between two messages."""
    if isinstance(prompt, str):
        return prompt
    parts = []
    for message in prompt:
        more = {key: each for key, each in message.items() if key not in ("role", "content")}
        more = f" {json.dumps(more, ensure_ascii=False)}" if more else ""
        parts.append(f"{message['role']}: {message['content']}{more}")
    return between.join(parts)


def read_prompts(sources: Sequence[str], keys: Sequence[str] = ()) -> list[Record]:
    """The prompts of records, which may be preference records, as Records without responses.

    keys: of --keys.
    """
    check_sources(sources)
    names = names_of(keys)
    found = []
    for source in sources:
        before = len(found)
        for where, name, subset, raw in open_source(source):
            record = prompt_of(decode_renamed(raw, where, names), where)
            found.append(replace(record, name=name, subset=subset))
        if len(found) == before:
            raise RunError(f"{source}: has no records; expected the key 'prompt'")
    return found


def prompt_of(record: object, where: str) -> Record:
    """The prompt of one record, which was read at `where`, with its tools; without responses."""
    keys = record.keys() if isinstance(record, dict) else set()
    if "prompt" in keys and not {"chosen", "preference_strength"} & keys:  # HelpSteer2 has turns
        try:
            found = read_messages(lambda own: Record(own["prompt"], (), ()), record)
            if not isinstance(found.prompt, list):
                check_text("prompt", found.prompt)
            elif found.prompt[-1]["role"] == "assistant":
                raise ValueError("the prompt ends with a message of 'assistant'")
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        return found
    if len({"chosen", "rejected"} & keys) == 1:
        raise RunError(f"{where}: give both 'chosen' and 'rejected', or 'prompt' without them")
    found = parse(record, where, formats(unpaired="prompts"))[1]
    return Record(found.prompt, (), (), tools=found.tools)


def read_answers(source: str) -> tuple[list[Record], dict[str, list[str]]]:
    """(the prompts of a source of answers, each once; its answers by prompt_key, in their order).

    Raises RunError for a record without a prompt, or without exactly one key of ANSWER_KEYS.
    """
    check_sources([source])
    prompts, answers = [], {}
    for where, name, subset, raw in open_source(source):
        record = decode(raw, where)
        record = record if isinstance(record, dict) else {}
        keys = [key for key in ANSWER_KEYS if key in record]
        if "prompt" not in record or not keys:
            raise RunError(
                f"{where}: expected the key 'prompt' and one of {', '.join(map(repr, ANSWER_KEYS))}"
            )
        if len(keys) > 1:
            raise RunError(
                f"{where}: {' and '.join(map(repr, keys))} may both be the answer; remove what is "
                "not"
            )
        answer = record[keys[0]]
        if not isinstance(answer, str) or any("\ud800" <= c <= "\udfff" for c in answer):
            raise RunError(f"{where}: the {keys[0]} must be text")  # it may be empty
        context = {each: record[each] for each in CONTEXT if each in record}
        prompt = replace(prompt_of(context, where), name=name, subset=subset)
        key = prompt_key(prompt.prompt, prompt.tools)
        if key not in answers:
            prompts.append(prompt)
        answers.setdefault(key, []).append(answer)
    return prompts, answers
