"""Record -> Row: text -> token ids.

    tokens = tokenize(prompt) ++ tokenize(response) ++ EOS

The prompt is tokenized by itself, as generation will see it, so it is the same for every response.
At most one BOS, before the prompt; exactly one EOS, after a response that was not cut. A template
is a function from a Record to its Text; nanoalign/data/templates.py has those of --template.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from nanoalign.batch import Row
from nanoalign.errors import RunError
from nanoalign.records import Record

CUT_PROMPT = "prompts cut at their beginning"
CUT_RESPONSE = "responses cut at their end (no EOS)"
BLANK_RESPONSE = "responses of white space alone"


@dataclass(frozen=True, slots=True)
class Text:
    """A record as a template writes it, and how that is tokenized."""

    prompt: str  # with the assistant's header
    responses: list[str]  # without EOS
    add_bos: bool = True  # False: the template wrote the tokenizer's BOS, if it has one
    escape: bool = False  # whether "<eos>" in the text is tokenized as any other text


Template = Callable[[Record, object], Text]  # of a record and a tokenizer


def raw(record: Record, tokenizer) -> Text:
    """The text of the record, unchanged but for an EOS that the data wrote."""
    responses = [without_end(response, tokenizer.eos_token) for response in record.responses]
    return Text(record.prompt, responses)


def encode_all(
    records: Sequence[Record], tokenizer, max_length: int = 1024, template: Template = raw
) -> list[Row]:
    """Returns the rows of some records, in their order.

    max_length: tokens of the prompt and one response. Where they are more, the prompt loses its
        beginning, once for all responses, but keeps at least half of max_length; then a response
        loses its end, and with it its EOS.
    Raises RunError if the tokenizer has no EOS, if max_length is below 2, and for a prompt without
        tokens.
    """
    if tokenizer.eos_token_id is None:
        raise RunError("the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if max_length < 2:
        raise RunError(f"--max_length {max_length}: a prompt and a response need at least 2 tokens")
    texts = [template(record, tokenizer) for record in records]
    # A call of the tokenizer for many texts is faster, but has the same options for all of them.
    groups: dict[tuple[bool, bool], list[int]] = {}
    for n, text in enumerate(texts):
        groups.setdefault((text.add_bos, text.escape), []).append(n)
    rows = {}
    for (add_bos, escape), numbers in groups.items():
        prompts = tokenize([texts[n].prompt for n in numbers], tokenizer, add_bos, escape)
        responses = tokenize_responses([texts[n].responses for n in numbers], tokenizer, escape)
        for n, prompt, answers in zip(numbers, prompts, responses, strict=True):
            rows[n] = truncate(records[n], prompt, answers, max_length, tokenizer.bos_token_id)
    return [rows[n] for n in range(len(records))]


def tokenize(
    texts: Sequence[str], tokenizer, add_bos: bool = False, escape: bool = False
) -> list[list[int]]:
    """Token ids of each text: at most one BOS before it, and no EOS that the tokenizer appends."""
    if not texts:
        return []
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    options = {"add_special_tokens": add_bos, "split_special_tokens": escape}
    tokens = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    if add_bos:
        tokens = [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in tokens]
        tokens = [ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids for ids in tokens]
    return tokens


def tokenize_responses(
    responses: Sequence[Sequence[str]], tokenizer, escape: bool
) -> list[list[list[int]]]:
    """Token ids of the responses of each record, each response with one EOS at its end."""
    eos = tokenizer.eos_token_id
    tokens = tokenize_continuations([t for texts in responses for t in texts], tokenizer, escape)
    for ids in tokens:
        while ids[-1:] == [eos]:  # "<eos>" is a word of some models, also where it is escaped
            ids.pop()
        ids.append(eos)
    ends = accumulate(map(len, responses))
    return [tokens[end - len(texts) : end] for texts, end in zip(responses, ends, strict=True)]


def tokenize_continuations(
    texts: Sequence[str], tokenizer, escape: bool = False
) -> list[list[int]]:
    """Token ids of texts that follow a prompt.

    SentencePiece puts a space before a text, which a response does not begin with: with such a
    tokenizer each text is tokenized behind a newline, whose tokens are then removed.
    """
    alone = tokenize(texts, tokenizer, escape=escape)
    newline, x, both = tokenize(["\n", "x", "\nx"], tokenizer, escape=escape)
    if both == newline + x:
        return alone
    behind, n = tokenize(["\n" + text for text in texts], tokenizer, escape=escape), len(newline)
    return [b[n:] if b[:n] == newline else a for a, b in zip(alone, behind, strict=True)]


def truncate(
    record: Record, prompt: list[int], responses: list[list[int]], max_length: int, bos: int | None
) -> Row:
    """Returns the Row of a record, cut to `max_length` tokens of the prompt and each response.

    Its notes have what was cut. Raises RunError for a prompt without tokens.
    """
    if not prompt:
        raise RunError(f"{record.name}: the prompt has no tokens in this tokenizer; remove it")
    blank = [BLANK_RESPONSE for response in record.responses if not response.strip()]
    notes = [*record.notes, *blank]
    # The prompt may keep what the longest response leaves, and at least half.
    room = max(max_length - max(map(len, responses), default=0), max_length // 2)
    if len(prompt) > room:
        notes.append(CUT_PROMPT)
        head = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    room = max_length - len(prompt)
    notes += [CUT_RESPONSE for response in responses if len(response) > room]
    return Row(
        record.name,
        np.array(prompt, dtype=np.int32),
        tuple(np.array(response[:room], dtype=np.int32) for response in responses),
        record.pairs,
        {name: values_of(values) for name, values in record.extra.items()},
        tuple(notes),
    )


def values_of(values: Sequence[float]) -> np.ndarray:
    """The values of pairs as an array; fractions in float32, whole numbers and truth values not."""
    array = np.array(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def without_end(text: str, end: str) -> str:
    """The text without each `end` at its end and the white space behind such an `end`."""
    return re.sub(rf"(?:{re.escape(end)}\s*)+\Z", "", text)


def encode(
    prompt: str, responses: Sequence[str], tokenizer, max_length: int = 1024, name: str = ""
) -> Row:
    """The Row of one prompt and its responses, without a chat template, for notebooks.

    Two responses are a pair, the chosen one first; any other number has no pairs. max_length and
    errors are those of `encode_all`. name: for errors.
    """
    record = Record(prompt, responses, ((0, 1),) if len(responses) == 2 else (), name=name)
    return encode_all([record], tokenizer, max_length)[0]
