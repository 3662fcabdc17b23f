"""Record -> Row: text -> token ids.

    tokens = tokenize(prompt) ++ tokenize(response) ++ EOS

The prompt is tokenized by itself, as generation will see it, so it is the same for every response.
At most one BOS, before the prompt; exactly one EOS, after a response that was not cut. A template
is a function from a Record to its Text; nanoalign/formats/templates.py has those of --template.
"""

import json
from collections.abc import Callable, Iterator, Sequence
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
    name: str = ""  # file and line: unique in a run
    subset: str = ""  # the source's name
    tools: list[dict] | None = None  # for the chat template
    answers: Sequence[dict] = ()  # the responses as messages, if they have more than text
    notes: tuple[str, ...] = ()  # what reading left out, to be counted


def plain(record: dict) -> Record:
    """A prompt, a chosen and a rejected response."""
    return Record(record["prompt"], (record["chosen"], record["rejected"]))


Format = Callable[[dict], Record]  # raises ValueError for a record that it cannot read
# Keys of a record -> its format. The first entry whose keys are all there is taken.
FORMATS: dict[tuple[str, ...], Format] = {("prompt", "chosen", "rejected"): plain}


def open_jsonl(path: str) -> Iterator[tuple[str, str, str, str | dict]]:
    """(path and line, name and line, name, record as JSON text) of the records of a .jsonl file."""
    name = Path(path).stem
    with open(path, encoding="utf-8-sig") as file:
        for n, text in enumerate(file, start=1):
            if text.strip():
                yield f"{path}:{n}", f"{name}:{n}", name, text


def read(
    sources: Sequence[str],
    formats: dict[tuple[str, ...], Format] = FORMATS,
    open_source: Callable[[str], Iterator[tuple[str, str, str, str | dict]]] = open_jsonl,
) -> Iterator[Record]:
    """The records of some sources, one by one. A file has one format.

    Raises RunError, with file and line, for a record that has no known format.
    """
    for source in sources:
        first = {}  # the format of each file
        for where, name, subset, raw in open_source(source):
            keys, record = parse(raw, where, formats)
            if keys != (begun := first.setdefault(where.rpartition(":")[0], keys)):
                raise RunError(
                    f"{where}: a record with the keys {' + '.join(keys)} in a file that began with "
                    f"{' + '.join(begun)}; put each format into a file of its own"
                )
            yield replace(record, name=name, subset=subset)
        if not first:
            raise RunError(f"{source}: has no records; expected {expected(formats)}")


def parse(raw: str | dict, where: str, formats: dict = FORMATS) -> tuple[tuple[str, ...], Record]:
    """(keys of the format, Record) of one record, which was read at `where`."""
    raw = decode(raw, where)
    if not isinstance(raw, dict):
        raise RunError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    keys = next((keys for keys in formats if raw.keys() >= set(keys)), None)
    if keys is None:
        raise RunError(f"{where}: unknown keys {sorted(raw)}; expected {expected(formats)}")
    try:
        record = formats[keys](raw)
        if not isinstance(record.prompt, list):  # what reads messages checks them
            check_text("prompt", record.prompt)
        for n, response in enumerate(record.responses, start=1):
            check_text(f"response {n} of {len(record.responses)}, best first,", response)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error
    return keys, record


def decode(raw: str | dict, where: str) -> object:
    """A record as an object; one that is not text was decoded by what read it."""
    try:
        return json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError) as error:  # 5,000 digits; nested 1,000 deep
        what = f"{error.msg} (column {error.colno})" if hasattr(error, "colno") else error
        raise RunError(f"{where}: not valid JSON: {what}") from error


def expected(formats: dict) -> str:
    return "; or ".join([" + ".join(keys) for keys in formats if keys][:5])


def check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, found {type(text).__name__}")
    if not text:
        raise ValueError(f"the {name} is empty; correct or remove the record")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the {name} has half a character (a lone surrogate)")
