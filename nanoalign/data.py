"""Files of preference records -> Examples, one by one.

A source is a path, NAME=PATH, embedded data ("tiny", "tiny:test", "tiny:tiny-a", ...), or a file on the
Hub. A file has one format of nanoalign/records.py.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from nanoalign import tiny
from nanoalign.errors import RunError, in_a_line
from nanoalign.records import EXPECTED, Example, parse, parse_answer, parse_prompt

Reader = Callable[[], object]  # decodes one record

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
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


def read_examples(path_or_name: str, preference: str | Sequence[str] = "better") -> list[Example]:
    """All examples of one source, in the file's order.

    path_or_name: a local file (.jsonl, .json, either also .gz; .parquet where pyarrow is
        installed); "tiny" or "tiny:test", the embedded data, or "tiny:tiny-a", "tiny:test:tiny-a",
        ..., a pair of one of its three sources for every prompt; hf://datasets/OWNER/NAME/PATH, a
        file on the Hub; each also as NAME=SOURCE.
    preference: which PKU-SafeRLHF label orders the responses, "better" or "safer"; or several, each of
        which makes a pair.
    Raises RunError, with file and line, for the first record that can't be read.
    """
    return [example for _, example in stream_examples([path_or_name], preference, unpaired=True)]


def read_sources(
    sources: list[str], preference: str | Sequence[str] = "better", unpaired: bool = False
) -> list[Example]:
    """The examples of several sources, one after the other: see stream_examples."""
    return [example for _, example in stream_examples(sources, preference, unpaired)]


def stream_examples(
    sources: list[str],
    preference: str | Sequence[str] = "better",
    unpaired: bool = False,
    mine: Callable[[int], bool] = lambda number: True,
) -> Iterator[tuple[int, Example]]:
    """(its number among all, Example) of the records of several sources, one by one; names must differ.

    unpaired: whether single responses with a label will do.
    mine: of which numbers, from 0. The others are passed over unread, but for each source's first
        one, which says its format.
    """
    _check_names(sources)
    preferences = (preference,) if isinstance(preference, str) else tuple(preference)
    number = -1
    for source in sources:
        first_format = None
        for where, pair_id, subset, read in _located(source):
            number += 1
            wanted = mine(number)
            if not wanted and first_format is not None:
                continue
            record_format, example = parse(read(), preferences, where, pair_id, subset)
            first_format = first_format or record_format
            if record_format != first_format:
                raise RunError(
                    f"{where}: a record of the format '{record_format}' in a file that began with "
                    f"'{first_format}'; put each format into a file of its own"
                )
            if not unpaired and not example.is_paired():
                raise RunError(
                    f"{pair_id}: a completion with a label, where pairs are wanted; only "
                    "train_dpo.py --loss kto learns from such records"
                )
            if wanted:
                yield number, example


def read_prompts(sources: list[str]) -> list[Example]:
    """The prompts of several sources, as Examples without responses: alone, or of preference records."""
    _check_names(sources)
    return [parse_prompt(read(), *rest) for source in sources for *rest, read in _located(source)]


def read_answers(path_or_name: str) -> dict[str, list[str]]:
    """Answers that were made elsewhere, by the key of their prompt and in the file's order."""
    answers: dict[str, list[str]] = {}
    for where, _, _, read in _located(path_or_name):
        prompt, answer = parse_answer(read(), where)
        answers.setdefault(prompt, []).append(answer)
    return answers


def _located(path_or_name: str) -> Iterator[tuple[str, str, str, Reader]]:
    """(where it stands, its pair_id, its subset, what reads it) of every record of a source."""
    subset, source = _split_name(path_or_name)
    if source in EMBEDDED_SOURCES:
        path, records = source, _embedded_records(*EMBEDDED_SOURCES[source])
    else:
        path = _resolve(source)
        records = _records(path)
    line = None
    for line, read in records:
        yield f"{path}:{line}", f"{subset}:{line}", subset, read
    if line is None:
        raise RunError(f"{path}: holds no records; expected {EXPECTED}")


def files_of(path_or_name: str) -> tuple[str, list[Path]]:
    """(the name that begins its pair_ids, the files that all of it follows from) of a source."""
    subset, source = _split_name(path_or_name)
    if source in EMBEDDED_SOURCES:  # generated, by these
        return f"{subset}={source}", sorted(Path(tiny.__file__).parent.glob("*.py"))
    return subset, [_resolve(source)]


def _check_names(sources: list[str]) -> None:
    names = [_split_name(source)[0] for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two data sources are named '{name}'; name them apart: A=PATH B=PATH")


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


def _embedded_records(split: str, source: str) -> Iterator[tuple[int, Reader]]:
    from nanoalign.tiny import world  # the generator takes a second; most runs do not need it

    for line, record in enumerate(world.records(split, source), start=1):
        yield line, partial(_as_it_is, record)


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


def _records(path: Path) -> Iterator[tuple[int, Reader]]:
    """(line number, what reads it) of every record of a file; blank lines are passed over."""
    if path.name.endswith(".parquet"):
        yield from _parquet_records(path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            before = ""  # blank lines at the file's head
            for number, line in enumerate(file, start=1):  # a line ends with \n, not with U+2028
                if before is not None and line.lstrip().startswith("["):
                    # An array may stand in one line, so it is held as a whole.
                    yield from _array_records(before + line + file.read(), path)
                    return
                if line.strip():
                    before = None
                    yield number, partial(_decode, line.removesuffix("\n"), path, number)
                elif before is not None:
                    before += line
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(f"{path}: not a readable UTF-8 text file ({error})") from error


def _decode(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error


def _as_it_is(record: object) -> object:
    return record


def _array_records(text: str, path: Path) -> Iterator[tuple[int, Reader]]:
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
        yield line, partial(_as_it_is, record)
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


def _parquet_records(path: Path) -> Iterator[tuple[int, Reader]]:
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
            yield row, partial(_as_it_is, record)
