"""The data of evaluate.py policy: prompts alone, and answers of other programs."""

import json
from collections.abc import Sequence

from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats.records import formats, messages
from nanoalign.formats.sources import check_sources, open_source
from nanoalign.pairs import check_text, decode, expected, parse


def prompt_key(prompt: str | list[dict]) -> str:
    """The prompt as one text; messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def read_prompts(sources: Sequence[str]) -> list[Record]:
    """The prompts of records, which may be preference records, as Records without responses."""
    check_sources(sources)
    found = []
    for source in sources:
        before = len(found)
        for where, name, subset, raw in open_source(source):
            prompt = prompt_of(decode(raw, where), where)
            found.append(Record(prompt, (), (), name=name, subset=subset))
        if len(found) == before:
            raise RunError(f"{source}: has no records; expected the key 'prompt'")
    return found


def prompt_of(record: object, where: str) -> str | list[dict]:
    """The prompt of one record, which was read at `where`."""
    keys = record.keys() if isinstance(record, dict) else set()
    if "prompt" in keys and "chosen" not in keys:
        prompt = record["prompt"]
        try:
            if isinstance(prompt, list):
                prompt = messages(prompt, "prompt")
                if prompt[-1]["role"] == "assistant":
                    raise ValueError("the prompt ends with a message of 'assistant'")
            else:
                check_text("prompt", prompt)
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        return prompt
    if len({"chosen", "rejected"} & keys) == 1:
        raise RunError(f"{where}: give both 'chosen' and 'rejected', or 'prompt' without them")
    if not {"chosen", "rejected"} <= keys:
        raise RunError(
            f"{where}: no prompt in the record; expected the key 'prompt', or {expected(formats())}"
        )
    return parse(record, where, formats())[1].prompt


def read_answers(source: str) -> dict[str, list[str]]:
    """The answers of a source by the prompt_key of their prompt, in the order of the source."""
    check_sources([source])
    answers: dict[str, list[str]] = {}
    for where, _, _, raw in open_source(source):
        record = decode(raw, where)
        keys = record.keys() if isinstance(record, dict) else set()
        name = "answer" if "answer" in keys else "response"
        if "prompt" not in keys or name not in keys:
            raise RunError(f"{where}: expected the keys 'prompt' and 'response' or 'answer'")
        answer = record[name]
        if not isinstance(answer, str) or any("\ud800" <= c <= "\udfff" for c in answer):
            raise RunError(f"{where}: the {name} must be text")  # it may be empty
        prompt = prompt_of({"prompt": record["prompt"]}, where)
        answers.setdefault(prompt_key(prompt), []).append(answer)
    return answers
