"""python -m pytest tests/formats/test_columns.py: columns that nothing reads are named"""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from nanoalign import tiny
from nanoalign.formats.load import load_rows
from nanoalign.rewards import several

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1,
       "safer_response_id": 0, "is_response_0_safe": True, "response_1_sha256": "x"}  # fmt: skip
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
MANY = {f"c{n}": n for n in range(8)}


def printed(records: list[dict], tmp_path: Path, capsys, tokenizer, world, **changes) -> str:
    """The line of the data, in memory; it is the same from a store."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    tokenizer.save_pretrained(tmp_path / "model")
    default = {"data": [str(path)], "eval_data": None, "eval_share": 0.0, "seed": 0, "cache": None,
               "max_length": 64, "template": "auto", "preference": "better"}  # fmt: skip
    found = []
    for cache in (None, str(tmp_path / "cache")):
        args = Namespace(**default | changes | {"cache": cache})
        load_rows(args, tokenizer, tmp_path / "model", world)
        lines = capsys.readouterr().out.splitlines()
        found += [line for line in lines if line.startswith("data")]
    assert found[0] == found[1]
    return found[0].removeprefix(f"data        {path}: 2 pairs")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([PAIR, PAIR], ""),
        ([PAIR | {"margin": 2, "tools": None, "system": ""}] * 2, ""),
        ([PAIR | {"id": 1, "source": "x"}, PAIR], "; 1 records with ignored columns: id, source"),
        ([PAIR | {"id": 1}, PAIR | {"source": 1}], "; 2 records with ignored columns: id, source"),
        ([PAIR | MANY] * 2,
         "; 2 records with ignored columns: c0, c1, c2, c3, c4, c5 and 2 more"),
        ([PAIR | {"sytem": "Be brief."}] * 2, "; 2 records with ignored columns: sytem"),
        ([PKU, PKU], ""),
        ([PKU, PKU | {"response_2": "c"}], "; 1 records with ignored columns: response_2"),
        ([RANKED, RANKED | {"margin": 1}], "; 1 records with ignored columns: margin"),
    ],
)  # fmt: skip
def test_the_line_of_the_data_names_them(records, expected, tmp_path, capsys, tokenizer, world):
    assert printed(records, tmp_path, capsys, tokenizer, world) == expected


def test_the_embedded_data_have_none():
    for path in (tiny.TRAIN, tiny.TEST):
        record = json.loads(path.read_text().splitlines()[0])
        read = several.formats(["better", "safer"])["prompt", "response_0", "response_1"]
        assert read(record).notes == () and read(record | {"id": 1}).notes != ()
