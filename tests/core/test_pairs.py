"""python -m pytest tests/core/test_pairs.py"""

import json
from pathlib import Path

import pytest

from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.pairs import read

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}


def write(path: Path, *records: dict) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return str(path)


def test_the_core_reads_pairs_and_the_labels_of_pku(tmp_path):
    pairs, pku = write(tmp_path / "a.jsonl", PAIR, PAIR), write(tmp_path / "b.v1.jsonl", PKU)
    found = [(r.name, r.subset, r.prompt, r.responses, r.pairs) for r in read([pairs, pku])]
    assert found == [
        ("a:1", "a", "p", ("c", "r"), ((0, 1),)),
        ("a:2", "a", "p", ("c", "r"), ((0, 1),)),
        ("b.v1:1", "b.v1", "p", ("b", "a"), ((0, 1),)),
    ]


def test_a_format_is_one_more_entry(tmp_path):
    formats = {("question", "answers"): lambda r: Record(r["question"], tuple(r["answers"]))}
    source = write(tmp_path / "a.jsonl", {"question": "q", "answers": ["x", "y"], "note": 1})
    (record,) = read([source], formats)
    assert (record.prompt, record.responses) == ("q", ("x", "y"))
    with pytest.raises(RunError, match=r"a.jsonl:1: unknown keys .*; expected prompt \+ respon"):
        list(read([source]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": ', r":1: not valid JSON: .*\(column 12\)"),
        ("3", ":1: expected a JSON object, found int"),
        ("", ": has no records; expected prompt"),
        (json.dumps(PAIR) + "\n" + json.dumps(PKU), ":2: a record with the keys"),
        (json.dumps(PAIR | {"prompt": 1}), ":1: the prompt must be text, found int"),
        (json.dumps(PKU | {"better_response_id": None}), ":1: better_response_id is None"),
    ],
)
def test_bad_lines_are_errors_with_file_and_line(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(RunError, match=f"a.jsonl{message}"):
        list(read([str(tmp_path / "a.jsonl")]))
