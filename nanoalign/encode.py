"""Record -> Row: text -> token ids.

    tokens = tokenize(prompt) ++ tokenize(response) ++ EOS

The prompt is tokenized by itself, as generation will see it, so it is the same for every response.
At most one BOS, before the prompt; exactly one EOS, after a response that was not cut. A template
is a function from a Record to its Text; nanoalign/formats/templates.py has those of --template.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from nanoalign.batch import Row
from nanoalign.errors import RunError
from nanoalign.records import Record

CUT_PROMPT = "prompts cut at their beginning"
CUT_RESPONSE = "responses cut at their end (no EOS)"
BLANK_RESPONSE = "responses of white space alone"


class Text(NamedTuple):
    """A record as a template writes it, and how that is tokenized."""

    prompt: str  # with the assistant's header
    responses: list[str]  # without EOS
    add_bos: bool = True  # False: the template wrote the tokenizer's BOS, if it has one
    plain: bool = False  # whether "<eos>" in the text is text, not a special token


Template = Callable[[Record, object], Text]  # of a record and a tokenizer


def raw(record: Record, tokenizer) -> Text:
    """The text of the record, unchanged but for an EOS that the data wrote."""
    responses = [without_end(response, tokenizer.eos_token) for response in record.responses]
    return Text(record.prompt, responses)


def encode(
    prompt: str, responses: Sequence[str], tokenizer, max_length: int = 1024, name: str = ""
) -> Row:
    """The Row of a prompt and its responses; of two responses the first is the chosen one.

    max_length: tokens of the prompt and one response. Where they are more, the prompt loses its
        beginning, once for all responses, but keeps at least half of max_length; then a response
        loses its end, and with it its EOS.
    Raises RunError if the tokenizer has no EOS.
    """
    record = Record(prompt, responses, ((0, 1),) if len(responses) == 2 else (), name=name)
    return encode_all([record], tokenizer, max_length)[0]


def encode_all(
    records: Sequence[Record], tokenizer, max_length: int = 1024, template: Template = raw
) -> list[Row]:
    """The rows of many records, which are tokenized together: see `encode`."""
    if (eos := tokenizer.eos_token_id) is None:
        raise RunError("the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if max_length < 2:
        raise RunError(f"--max_length {max_length}: a prompt and a response need at least 2 tokens")
    texts = [template(record, tokenizer) for record in records]
    rows: dict[int, Row] = {}
    for add_bos, plain in dict.fromkeys(text[2:] for text in texts):
        chosen = [i for i, text in enumerate(texts) if text[2:] == (add_bos, plain)]
        options = {"add_special_tokens": add_bos, "split_special_tokens": plain}
        prompts = tokenize([texts[i].prompt for i in chosen], tokenizer, **options)
        answers = [answer for i in chosen for answer in texts[i].responses]
        tokens = iter(tokenize_continuations(answers, tokenizer, plain))
        for i, prompt in zip(chosen, prompts, strict=True):
            responses = [next(tokens) for _ in texts[i].responses]
            for ids in responses:
                while ids[-1:] == [eos]:  # "<eos>" is a word of some models, also as plain text
                    ids.pop()
                ids.append(eos)
            rows[i] = truncate(records[i], prompt, responses, max_length, tokenizer.bos_token_id)
    return [rows[i] for i in range(len(records))]


def truncate(
    record: Record, prompt: list[int], responses: list[list[int]], limit: int, bos: int | None
) -> Row:
    """The Row of a record, cut to `limit` tokens of a prompt and one response."""
    if not prompt:
        raise RunError(f"{record.name}: the prompt has no tokens in this tokenizer; remove it")
    notes = [*record.notes, *(BLANK_RESPONSE for each in record.responses if not each.strip())]
    # What the prompt may keep: all that the longest response leaves, and at least half.
    room = max(limit - max(map(len, responses), default=0), limit // 2)
    if len(prompt) > room:
        notes.append(CUT_PROMPT)
        head = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    room = limit - len(prompt)
    notes += [CUT_RESPONSE for response in responses if len(response) > room]
    ids = [np.array(part, dtype=np.int32) for part in (prompt, *(r[:room] for r in responses))]
    extra = {name: np.array(values) for name, values in record.extra.items()}
    extra = {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in extra.items()}
    return Row(record.name, ids[0], tuple(ids[1:]), record.pairs, extra, tuple(notes))


def tokenize(texts: Sequence[str], tokenizer, **options) -> list[list[int]]:
    """Token ids of each text: at most one BOS before it, and no EOS that the tokenizer appends."""
    if not texts:
        return []
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokens = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    if options.get("add_special_tokens"):
        tokens = [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in tokens]
        tokens = [ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids for ids in tokens]
    return tokens


def tokenize_continuations(texts: Sequence[str], tokenizer, plain: bool = False) -> list[list[int]]:
    """Token ids of texts that follow a prompt. plain: special tokens in a text are plain text.

    SentencePiece puts a space before a text, which a response does not begin with: with such a
    tokenizer each text is tokenized behind a newline, whose tokens are then removed.
    """
    options = {"add_special_tokens": False, "split_special_tokens": plain}
    ids_of = partial(tokenize, tokenizer=tokenizer, **options)
    alone, (newline, x, both) = ids_of(texts), ids_of(["\n", "x", "\nx"])
    if both == newline + x:
        return alone
    behind, n = ids_of(["\n" + text for text in texts]), len(newline)
    return [b[n:] if b[:n] == newline else a for a, b in zip(alone, behind, strict=True)]


def without_end(text: str, end: str) -> str:
    """The text without any `end` at its end, and without white space behind these."""
    return re.sub(rf"(?:{re.escape(end)}\s*)+\Z", "", text)
