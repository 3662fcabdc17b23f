"""A line of a file -> Record: a prompt and its responses as text.

A format is a function from a decoded line, a dict, to a Record. It is found by the keys of the
dict: FORMATS has the plain pair, nanoalign/data/formats.py has all formats of the scripts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanoalign.errors import RunError


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt and its responses as text: one record of a file."""

    prompt: str | list[dict]  # text, or messages {"role", "content", ...} before the response
    responses: Sequence[str]
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)  # (chosen, rejected): indices of responses
    extra: dict[str, Sequence[float]] = field(default_factory=dict)  # a value per pair
    name: str = ""  # the source's name and the line: unique in a run
    subset: str = ""  # the source's name; with a column `subset`: NAME/SUBSET
    tools: list[dict] | None = None  # for the chat template
    answers: Sequence[dict] = ()  # the responses as messages, if they have more than text
    notes: tuple[str, ...] = ()  # what reading left out, to be counted
    sampled: tuple[str, Sequence] | None = None  # (name of a tokenizer, tokens of each response)


def pair(record: dict) -> Record:
    """A prompt, a chosen and a rejected response."""
    return Record(record["prompt"], (record["chosen"], record["rejected"]))


Format = Callable[[dict], Record]  # raises ValueError for a record that it cannot read
Formats = dict[tuple[str, ...], Format]  # the first entry whose keys a record has reads it
FORMATS: Formats = {("prompt", "chosen", "rejected"): pair}

# "path:line" for errors, name of the record, name of the source, the record as JSON or decoded
Located = tuple[str, str, str, str | dict]


def lines_of(file: Iterable[str], path: str | Path) -> Iterator[tuple[int, str, str]]:
    """(line number from 1, "path:line", text) of the lines of a text file that are not blank."""
    for number, text in enumerate(file, start=1):
        if text.strip():
            yield number, f"{path}:{number}", text.removesuffix("\n")


def open_jsonl(path: str) -> Iterator[Located]:
    """Yields the records of a .jsonl file. Their source has the name of the file without suffix."""
    name = Path(path).stem
    with open(path, encoding="utf-8-sig") as file:
        for number, where, text in lines_of(file, path):
            yield where, f"{name}:{number}", name, text


def read(
    sources: Sequence[str],
    formats: Formats = FORMATS,
    open_source: Callable[[str], Iterator[Located]] = open_jsonl,
) -> Iterator[Record]:
    """Yields the records of some sources, in their order.

    open_source: yields the undecoded records of one source, each as a Located.
    Raises RunError, with file and line, for a record that no format reads, and for one whose format
        is not that of the records before it in its file; and for a source without records.
    """
    for source in sources:
        format_of: dict[str, tuple[str, ...]] = {}  # file -> the keys that found its format
        for where, name, subset, raw in open_source(source):
            keys, record = parse(raw, where, formats)
            first_keys = format_of.setdefault(where.rpartition(":")[0], keys)
            if keys != first_keys:
                raise RunError(
                    f"{where}: a record with the keys {' + '.join(keys)} in a file that began with "
                    f"{' + '.join(first_keys)}; put each format into a file of its own"
                )
            yield replace(record, name=name, subset=f"{subset}/{record.subset}".removesuffix("/"))
        if not format_of:
            raise RunError(f"{source}: has no records; expected {expected(formats)}")


def parse(
    raw: str | dict, where: str, formats: Formats = FORMATS
) -> tuple[tuple[str, ...], Record]:
    """Returns (the keys that found the format, the Record) of a record that was read at `where`.

    Raises RunError, which begins with `where`, if no format reads it.
    """
    decoded = decode(raw, where)
    if not isinstance(decoded, dict):
        raise RunError(f"{where}: expected a JSON object, found {type(decoded).__name__}")
    keys = next((keys for keys in formats if decoded.keys() >= set(keys)), None)
    if keys is None:
        raise RunError(f"{where}: unknown keys {sorted(decoded)}; expected {expected(formats)}")
    try:
        record = formats[keys](decoded)
        if not isinstance(record.prompt, list):
            check_text("prompt", record.prompt)  # messages were checked by the format
        for n, response in enumerate(record.responses, start=1):
            check_text(f"response {n} of {len(record.responses)}, best first,", response)
    except (ValueError, RecursionError) as error:  # the latter of 1,000 brackets
        raise RunError(f"{where}: {error}") from error
    return keys, record


def decode(raw: str | dict, where: str) -> object:
    """Returns the value of a record's JSON text; a record that is no text as it is.

    Raises RunError for text that is not valid JSON.
    """
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} (column {error.colno})"
        raise RunError(f"{where}: not valid JSON: {problem}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 brackets
        raise RunError(f"{where}: not valid JSON: {error}") from error


def expected(formats: Formats) -> str:
    """The keys of the first formats, for an error."""
    return "; or ".join([" + ".join(keys) for keys in formats if keys][:5])


def check_text(name: str, text: object) -> None:
    """Raises ValueError for what can't be tokenized as the text called `name`."""
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, found {type(text).__name__}")
    if not text:
        raise ValueError(f"the {name} is empty; correct or remove the record")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the {name} has half a character (a lone surrogate); remove it")
