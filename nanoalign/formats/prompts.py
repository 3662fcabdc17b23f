"""The data of evaluate.py policy: prompts alone, and answers of other programs."""

import json
from collections.abc import Sequence

from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats.records import formats, messages
from nanoalign.formats.sources import check_sources, open_source
from nanoalign.pairs import check_text, decode, expected, parse

ANSWER_KEYS = ("response", "answer", "completion", "output")  # what programs call an answer


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
        prompt = prompt_of({"prompt": record["prompt"]}, where)
        if prompt_key(prompt) not in answers:
            prompts.append(Record(prompt, (), (), name=name, subset=subset))
        answers.setdefault(prompt_key(prompt), []).append(answer)
    return prompts, answers
