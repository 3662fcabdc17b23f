"""python -m pytest tests/core/test_records.py"""

import json
from pathlib import Path

import pytest

from nanoalign.errors import RunError
from nanoalign.records import FORMATS, Record, read

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
QUESTION = {"question": "q", "answers": ["x", "y"], "note": 1}
ANSWERS = {("question", "answers"): lambda r: Record(r["question"], tuple(r["answers"]))}


def write(path: Path, *records: dict) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return str(path)


def test_the_core_reads_pairs(tmp_path):
    first, second = write(tmp_path / "a.jsonl", PAIR, PAIR), write(tmp_path / "b.v1.jsonl", PAIR)
    found = [(r.name, r.subset, r.prompt, r.responses, r.pairs) for r in read([first, second])]
    assert found == [
        (name, subset, "p", ("c", "r"), ((0, 1),))
        for name, subset in (("a:1", "a"), ("a:2", "a"), ("b.v1:1", "b.v1"))
    ]


def test_a_format_is_one_more_entry(tmp_path):
    source = write(tmp_path / "a.jsonl", QUESTION)
    (record,) = read([source], ANSWERS)
    assert (record.prompt, record.responses) == ("q", ("x", "y"))
    with pytest.raises(RunError, match=r"a.jsonl:1: unknown keys .*; expected prompt \+ chosen"):
        list(read([source]))


def test_a_source_has_one_format(tmp_path):
    source = write(tmp_path / "a.jsonl", PAIR, QUESTION)
    with pytest.raises(RunError, match=r"a.jsonl:2: .* keys question \+ answers .* prompt"):
        list(read([source], FORMATS | ANSWERS))


def test_an_error_of_a_format_gets_file_and_line(tmp_path):
    def never(record: dict) -> Record:
        raise ValueError("not today")

    with pytest.raises(RunError, match="a.jsonl:1: not today"):
        list(read([write(tmp_path / "a.jsonl", PAIR)], {("prompt",): never}))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": ', r":1: not valid JSON: .*\(column 12\)"),
        ("3", ":1: expected a JSON object, found int"),
        ("", ": has no records; expected prompt"),
        (json.dumps(PAIR | {"prompt": 1}), ":1: the prompt must be text, found int"),
    ],
)
def test_bad_lines_are_errors_with_file_and_line(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(RunError, match=f"a.jsonl{message}"):
        list(read([str(tmp_path / "a.jsonl")]))
