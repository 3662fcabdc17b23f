"""The data of evaluate.py policy: prompts without responses, and answers of other programs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nanoalign.data.foreign import instruction
from nanoalign.data.formats import formats, token_ids
from nanoalign.data.messages import BARE, read_messages
from nanoalign.data.sources import check_sources, open_source
from nanoalign.errors import RunError
from nanoalign.records import Record, check_text, decode, parse

PROMPT_KEYS = ("prompt", "system", "tools")  # what an answer follows
ANSWER_KEYS = ("response", "answer", "completion", "output")  # what programs call an answer


class Written(NamedTuple):
    """An answer as answers.jsonl has it. What is not known of those of other programs is None."""

    answer: str  # as text
    ended: bool | None = None  # whether it ended with EOS; False: sampling stopped
    tokenizer: str | None = None  # of token_ids, see templates.tokenizer_name
    token_ids: list[int] | None = None  # as they were sampled, up to the EOS that encoding appends


def prompt_key(prompt: str | list[dict], tools: list[dict] | None = None) -> str:
    """Returns the prompt as one text, which is JSON if there are messages or tools."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return json.dumps((text, tools)) if tools else text


def prompt_text(prompt: str | list[dict], between: str) -> str:
    """Returns the prompt as text for a reader: "role: content" of each message, or the text itself.

    Further keys of a message follow its content as JSON. between: what separates two messages.
    """
    if isinstance(prompt, str):
        return prompt
    parts = []
    for message in prompt:
        further = {key: value for key, value in message.items() if key not in BARE}
        suffix = f" {json.dumps(further, ensure_ascii=False)}" if further else ""
        parts.append(f"{message['role']}: {message['content']}{suffix}")
    return between.join(parts)


def read_prompts(sources: Sequence[str], keys: Sequence[str] = ()) -> list[Record]:
    """Returns the prompt of each record of some sources, in their order, as a Record.

    The records may be preference records; their responses are left out. keys: of --keys. Raises
    RunError, with file and line, for a record without a prompt, and for a source without records.
    """
    check_sources(sources)
    prompts = []
    for source in sources:
        before = len(prompts)
        for where, name, subset, raw in open_source(source, keys):
            prompt = prompt_of(decode(raw, where), where)
            prompts.append(replace(prompt, name=name, subset=subset))
        if len(prompts) == before:
            raise RunError(f"{source}: has no records; expected the key 'prompt'")
    return prompts


def prompt_of(record: object, where: str) -> Record:
    """Returns the prompt and tools of a record, which was read at `where`, without responses.

    Raises RunError for a record without a prompt, or of no known format.
    """
    keys = record.keys() if isinstance(record, dict) else set()
    if "prompt" in keys and not {"chosen", "preference_strength"} & keys:  # HelpSteer2 has turns
        try:
            prompt = read_messages(lambda record: Record(record["prompt"], (), ()), record)
            if not isinstance(prompt.prompt, list):
                check_text("prompt", prompt.prompt)
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        return prompt
    if len({"chosen", "rejected"} & keys) == 1:
        raise RunError(f"{where}: give both 'chosen' and 'rejected', or 'prompt' without them")
    _, parsed = parse(record, where, formats(unpaired="prompts"))
    return Record(parsed.prompt, (), (), tools=parsed.tools)


def read_answers(
    source: str, role: str | None = None
) -> tuple[list[Record], dict[str, list[Written]]]:
    """Returns (the prompts of a source of answers, each once; prompt_key -> answers to it).

    Both are in the order of the records. role: policy or baseline, whose answers are read of an
        answers.jsonl, which has those of both; None: all.
    Raises RunError, with file and line, for a record without a prompt or without exactly one key of
    ANSWER_KEYS, and for an answer that is no text; and for a source without answers of the role.
    """
    check_sources([source])
    prompts, answers = [], {}
    for where, name, subset, raw in open_source(source):
        record = decode(raw, where)
        try:
            record = of_leaderboard(record) if isinstance(record, dict) else {}
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        keys = [key for key in ANSWER_KEYS if key in record]
        if "prompt" not in record or len(keys) != 1:
            raise RunError(
                f"{where}: expected the key 'prompt' and exactly one of "
                f"{', '.join(map(repr, ANSWER_KEYS))}, found {sorted(record)}"
            )
        if role and "token_ids" in record and record.get("side", role) != role:
            continue
        try:
            answer = written(record, keys[0])
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        context = {key: record[key] for key in PROMPT_KEYS if key in record}
        prompt = replace(prompt_of(context, where), name=name, subset=subset)
        key = prompt_key(prompt.prompt, prompt.tools)
        if key not in answers:
            prompts.append(prompt)
        answers.setdefault(key, []).append(answer)
    if not answers:
        raise RunError(f"{source}: has no answers{f' of the {role}' if role else ''}; give others")
    return prompts, answers


def written(record: dict, key: str) -> Written:
    """Returns the answer that a record has under a key, with its tokens, if it has these.

    Raises ValueError for an answer that is no text, and for tokens that are no token ids.
    """
    text = record[key]
    if text != "":  # an answer may be empty
        check_text(key, text)
    if record.get("token_ids") is None or not isinstance(record.get("tokenizer"), str):
        return Written(text)
    ended = record.get("ended")
    if ended not in (True, False, None):
        raise ValueError(f"ended must be true, false or null, found {str(ended)[:60]}")
    return Written(text, ended, record["tokenizer"], token_ids(record, "token_ids"))


def of_leaderboard(record: dict) -> dict:
    """Returns an answer of AlpacaEval or Arena-Hard as one with prompt and output; others as is.

    Arena-Hard's judge reads the question and the answer: the last two of its messages. Raises
    ValueError if these are no messages of a user and an assistant.
    """
    if record.keys() >= {"instruction", "output"} and "prompt" not in record:
        return {"prompt": instruction(dict(record)), "output": record["output"]}
    if not record.keys() >= {"uid", "messages"}:
        return record
    try:
        question, answer = record["messages"][-2:]
        roles, texts = (
            [message[key] for message in (question, answer)] for key in ("role", "content")
        )
        output = texts[1]["answer"]
    except (KeyError, TypeError, ValueError):
        roles = ()
    if roles != ["user", "assistant"]:
        raise ValueError("messages must end with a user's question and the assistant's answer")
    return {"prompt": texts[0], "output": output}
