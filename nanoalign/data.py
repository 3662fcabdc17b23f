"""Files of preference records -> Examples: text in the order chosen, rejected, with no tokens yet.

Formats, recognised by a record's keys (one format a file):

    prompt, chosen, rejected         text, or lists of {"role", "content"} messages
    chosen, rejected                 HH-RLHF dialogues ("\\n\\nHuman: ...\\n\\nAssistant: ..."), or
                                     message lists that both begin with the prompt
    prompt, response_0, response_1   PKU-SafeRLHF, with better_response_id and/or safer_response_id
    prompt, responses, scores        K ranked responses: each makes a pair with every one of a lower score

A pair of texts may have a `margin`: by how much the chosen one is better.
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanoalign import tiny
from nanoalign.errors import RunError, in_a_line

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
EXPECTED = (
    "prompt + chosen + rejected; chosen + rejected; prompt + response_0 + response_1 with "
    "better_response_id or safer_response_id; or prompt + responses + scores"
)
ASSISTANT = "\n\nAssistant:"  # opens an answer in HH-RLHF
# The embedded data by name: two files, and for each of their sources a pair for every prompt.
EMBEDDED_FILES = {"tiny": tiny.TRAIN, "tiny:test": tiny.TEST}
EMBEDDED_SOURCES = {
    f"{file}:{source}": (split, source)
    for file, split in (("tiny", "train"), ("tiny:test", "test"))
    for source in tiny.SOURCE_NAMES
}
# What is held out where the embedded data are trained on.
TEST_OF = {
    name: name.replace("tiny", "tiny:test", 1)
    for name in (*EMBEDDED_FILES, *EMBEDDED_SOURCES)
    if "test" not in name
}


class Pair(NamedTuple):
    """Two of an example's responses, by their index, and by how much the chosen one is better."""

    chosen: int
    rejected: int
    margin: float = 1.0  # a difference of scores; 1 where the data only say which is better


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its responses, the best one first.

    kind says what `prompt` is: "text" (a plain prompt), "dialogue" (HH-RLHF text that ends with the
    assistant's header) or "messages" (a tuple of messages that ends before the assistant's turn).
    """

    pair_id: str  # file's name and line: unique in a run, and where to look
    kind: str
    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    subset: str = ""
    pairs: tuple[Pair, ...] = (Pair(0, 1),)  # none where all of a ranked record's scores are equal

    def messages(self) -> list[Message]:
        """The prompt as messages, whatever its kind."""
        if self.kind == "messages":
            return list(self.prompt)
        if self.kind == "text":
            return [{"role": "user", "content": self.prompt}]
        # "", who, text, who, text, ..., "Assistant", "": without the last, open header
        turns = re.split(r"\n\n(Human|Assistant):", self.prompt)[1:-2]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[who], "content": text.strip()}
            for who, text in zip(turns[::2], turns[1::2], strict=True)
        ]

    def prompt_key(self) -> str:
        """The same for two examples exactly when their prompts are the same."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt)


def read_examples(path_or_name: str, preference: str = "better") -> list[Example]:
    """All examples of one source, in the file's order.

    path_or_name: a local file (.jsonl, .json, either also .gz; .parquet where pyarrow is
        installed); "tiny" or "tiny:test", the embedded data, or "tiny:tiny-a", "tiny:test:tiny-a",
        ..., a pair of one of its three sources for every prompt; hf://datasets/OWNER/NAME/PATH, a
        file on the Hub; each also as NAME=SOURCE.
    preference: which PKU-SafeRLHF label orders the responses, "better" or "safer".
    Raises RunError, with file and line, for the first record that can't be read.
    """
    subset, source = _split_name(path_or_name)
    examples, first_format = [], None
    if source in EMBEDDED_SOURCES:
        path, records = source, _embedded_records(*EMBEDDED_SOURCES[source])
    else:
        path = _resolve(source)
        records = _records(path)
    for line, record in records:
        where = f"{path}:{line}"
        record_format, example = _parse(record, preference, where, f"{subset}:{line}", subset)
        first_format = first_format or record_format
        if record_format != first_format:
            raise RunError(
                f"{where}: a record of the format '{record_format}' in a file that began with "
                f"'{first_format}'; put each format into a file of its own"
            )
        examples.append(example)
    if not examples:
        raise RunError(f"{path}: holds no records; expected {EXPECTED}")
    return examples


def read_sources(sources: list[str], preference: str = "better") -> list[Example]:
    """The examples of several sources, one after the other; their names must differ."""
    names = [_split_name(source)[0] for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two data sources are named '{name}'; name them apart: A=PATH B=PATH")
    return [example for source in sources for example in read_examples(source, preference)]


def hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out): `share` of the prompts, with all their pairs, are held out.

    Those are the first by a hash of (seed, prompt), whatever the order of the examples. A share
    above 0 holds out one prompt at least, and one prompt at least stays.
    """
    by_hash = sorted(
        {example.prompt_key() for example in examples},
        key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest(),
    )
    count = min(max(round(share * len(by_hash)), share > 0), len(by_hash) - 1)
    chosen = set(by_hash[:count])
    training = [example for example in examples if example.prompt_key() not in chosen]
    return training, [example for example in examples if example.prompt_key() in chosen]


# --- sources --------------------------------------------------------------------------------------


def _split_name(spec: str) -> tuple[str, str]:
    """NAME=SOURCE -> (NAME, SOURCE); without a name, the file's own without its suffixes."""
    name, equals, source = spec.partition("=")
    if equals and not Path(spec).exists():
        if not name or not source:
            raise RunError(f"data source '{spec}': expected NAME=PATH")
        return name, source
    return Path(spec).name.split(".")[0] or spec, spec


def _resolve(source: str) -> Path:
    """The local file of a data source, fetched from the Hub if need be."""
    if source in EMBEDDED_FILES:
        return EMBEDDED_FILES[source]
    if source.startswith("hf://"):
        return _from_hub(source)
    path = Path(source)
    if not path.exists():
        raise RunError(
            f"data file '{source}' does not exist; give a path, hf://datasets/... or one of the "
            f"embedded {', '.join((*EMBEDDED_FILES, *EMBEDDED_SOURCES))}"
        )
    if path.is_dir():
        raise RunError(
            f"data source '{source}' is a folder; give its files ({', '.join(SUFFIXES)})"
        )
    if not path.name.endswith(SUFFIXES):
        raise RunError(
            f"data file '{source}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
        )
    return path


def _embedded_records(split: str, source: str) -> Iterator[tuple[int, object]]:
    from nanoalign.tiny import world  # the generator takes a second; most runs do not need it

    yield from enumerate(world.records(split, source), start=1)


def _from_hub(source: str) -> Path:
    parts = source.removeprefix("hf://").split("/", 3)
    if len(parts) != 4 or parts[0] != "datasets":
        raise RunError(f"data source '{source}': expected hf://datasets/OWNER/NAME/PATH")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[1]}/{parts[2]}", parts[3], repo_type="dataset"))
    except (OSError, ValueError) as error:  # no network, no such file, not a valid name
        raise RunError(
            f"data source '{source}' could not be fetched: {in_a_line(error)}"
        ) from error


# --- files ----------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, record) for every record of a file; blank lines are passed over."""
    if path.name.endswith(".parquet"):
        yield from _parquet_records(path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(f"{path}: not a readable UTF-8 text file ({error})") from error
    if text.lstrip().startswith("["):
        yield from _array_records(text, path)
        return
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # not splitlines: U+2028 may stand in a text
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise RunError(
                    f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"
                ) from error


def _array_records(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """The elements of a JSON array, decoded one by one so that each has its line number."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    position, line, counted = blank.match(text).end() + 1, 1, 0
    position = blank.match(text, position).end()
    if text[position : position + 1] == "]":
        _check_end(text, position + 1, path)
        return
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise RunError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
            ) from error
        yield line, record
        position = blank.match(text, position).end()
        separator = text[position : position + 1]
        if separator == "]":
            _check_end(text, position + 1, path)
            return
        if separator != ",":
            at = line + text.count("\n", counted, position)
            raise RunError(
                f"{path}:{at}: not valid JSON: expected ',' or ']' after a record, found {separator!r}"
            )
        position = blank.match(text, position + 1).end()


def _check_end(text: str, position: int, path: Path) -> None:
    if rest := text[position:].strip():
        line = text.count("\n", 0, text.index(rest, position)) + 1
        raise RunError(f"{path}:{line}: not valid JSON: {rest[:40]!r} follows the list of records")


def _parquet_records(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RunError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow, or convert to .jsonl"
        ) from error
    row = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            row += 1
            yield row, record


# --- records --------------------------------------------------------------------------------------


def _parse(
    record: object, preference: str, where: str, pair_id: str, subset: str
) -> tuple[str, Example]:
    """(name of the format, Example) of one record."""
    if not isinstance(record, dict):
        raise RunError(f"{where}: expected a record with keys, found {type(record).__name__}")
    keys = record.keys()
    pairs = (Pair(0, 1),)
    if {"prompt", "responses", "scores"} <= keys:
        record_format = "prompt + responses + scores"
        kind, prompt = "text", record["prompt"]
        if isinstance(prompt, list):
            kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
        responses, pairs = _ranked(record["responses"], record["scores"], where)
    elif {"prompt", "response_0", "response_1"} <= keys:
        kind, prompt, responses = "text", record["prompt"], _ordered_pku(record, preference, where)
        record_format = "prompt + response_0 + response_1"
    elif {"chosen", "rejected"} <= keys:
        chosen, rejected = record["chosen"], record["rejected"]
        record_format = "prompt + chosen + rejected" if "prompt" in keys else "chosen + rejected"
        if isinstance(chosen, list) and isinstance(rejected, list):
            kind, (prompt, responses) = "messages", _split_messages(record, where)
            record_format += " (messages)"
        elif "prompt" in keys:
            kind, prompt, responses = "text", record["prompt"], (chosen, rejected)
            if isinstance(prompt, list):
                kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
        else:
            kind, (prompt, responses) = "dialogue", _split_dialogue(chosen, rejected, where)
    else:
        raise RunError(f"{where}: unknown keys {sorted(map(str, keys))}; expected {EXPECTED}")
    if record.get("margin") is not None and "responses" not in keys:
        margin = _number(record["margin"], "margin", where)
        if margin < 0:
            raise RunError(f"{where}: the margin is {margin:g}; it must not be negative")
        pairs = (Pair(0, 1, margin),)
    text = "\n".join(m["content"] for m in prompt) if kind == "messages" else prompt
    _check_text({"prompt": text}, where)
    names = ("chosen response", "rejected response")
    if "responses" in keys:
        names = [f"response of rank {rank}" for rank in range(1, len(responses) + 1)]
    _check_text(dict(zip(names, responses, strict=True)), where)
    return record_format, Example(pair_id, kind, prompt, tuple(responses), subset, pairs)


def _ranked(
    responses: object, scores: object, where: str
) -> tuple[tuple[object, ...], tuple[Pair, ...]]:
    """K responses, best first, and all their pairs of unequal scores."""
    for name, value in (("responses", responses), ("scores", scores)):
        if not isinstance(value, list) or len(value) < 2:
            raise RunError(f"{where}: {name} must be a list of at least two, found {value!r}")
    if len(responses) != len(scores):
        raise RunError(f"{where}: {len(responses)} responses, but {len(scores)} scores")
    scores = [_number(score, "score", where) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = [scores[i] for i in order]
    pairs = tuple(
        Pair(i, j, ranked[i] - ranked[j])
        for i in range(len(ranked))
        for j in range(i + 1, len(ranked))
        if ranked[i] > ranked[j]
    )
    return tuple(responses[i] for i in order), pairs


def _number(value: object, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):  # not a number; an integer beyond all floats
        pass
    raise RunError(f"{where}: the {name} must be a finite number, found {str(value)[:40]!r}")


def _check_text(texts: dict[str, object], where: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise RunError(f"{where}: the {name} must be text, found {type(text).__name__}")
        if not text:
            raise RunError(f"{where}: the {name} is empty; mend or remove the record")
        if not _is_unicode(text):
            raise RunError(f"{where}: the {name} holds half a character (a lone surrogate)")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ordered_pku(record: dict, preference: str, where: str) -> tuple[object, object]:
    key = f"{preference}_response_id"
    if key not in record:
        raise RunError(
            f"{where}: no {key}, which --preference {preference} asks for; keys: {sorted(record)}"
        )
    label = record[key]
    if isinstance(label, bool) or label not in (0, 1):
        raise RunError(f"{where}: {key} is {label!r}; expected 0 or 1")
    pair = record["response_0"], record["response_1"]
    return pair if label == 0 else pair[::-1]


def _split_dialogue(chosen: object, rejected: object, where: str) -> tuple[str, tuple[str, str]]:
    """HH-RLHF: the prompt is all up to the last assistant's header that both dialogues share.

    A few records part before their last turn; then a response holds further turns, as the
    annotators saw it.
    """
    _check_text({"chosen dialogue": chosen, "rejected dialogue": rejected}, where)
    shared = os.path.commonprefix([chosen, rejected])
    if not shared.startswith("\n\nHuman:") or ASSISTANT not in shared:
        raise RunError(
            f"{where}: without a prompt, chosen and rejected must be HH-RLHF dialogues that begin "
            f"with the same '\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return chosen[:end], (chosen[end:], rejected[end:])


def _split_messages(record: dict, where: str) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """Message lists: all but the last message is prompt; a prompt of its own goes before them."""
    prompt = record.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _checked_messages(prompt, "prompt", where) if prompt else ()
    contexts, responses = [], []
    for side in ("chosen", "rejected"):
        messages = _checked_messages(record[side], side, where)
        if messages[-1]["role"] != "assistant":
            raise RunError(
                f"{where}: {side} ends with a message of '{messages[-1]['role']}'; expected 'assistant'"
            )
        before = messages[:-1]
        repeated = before[: len(prompt)] == prompt or before[-len(prompt) :] == prompt
        contexts.append(before if repeated else prompt + before)
        responses.append(messages[-1]["content"])
    if contexts[0] != contexts[1]:
        raise RunError(
            f"{where}: chosen and rejected differ before their last message; they must share one prompt"
        )
    if not contexts[0]:
        raise RunError(
            f"{where}: the prompt is empty; give 'prompt', or messages before the answer"
        )
    return contexts[0], (responses[0], responses[1])


def _checked_messages(messages: object, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise RunError(f"{where}: {name} must be a list of messages with at least one in it")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise RunError(
                f"{where}: {name} holds {message!r}; expected {{'role': text, 'content': text}}"
            )
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
