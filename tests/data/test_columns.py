"""python -m pytest tests/data/test_columns.py columns that nothing reads are named"""

from pathlib import Path

import pytest
from conftest import byte_tokenizer
from stores import write

from nanoalign.data.encoding import DataSettings
from nanoalign.data.rows import load_rows
from nanoalign.data.templates import encode_records
from nanoalign.records import Record

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}
PKU |= {"safer_response_id": 0, "is_response_0_safe": True, "response_1_sha256": "x"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
MANY = {f"c{n}": n for n in range(8)}


def printed(records: list[dict], tmp_path: Path, capsys, tokenizer, world, **changes) -> str:
    """The line of the data, in memory; it is the same from a store."""
    path = write(tmp_path / "a.jsonl", *records)
    tokenizer.save_pretrained(tmp_path / "model")
    found = []
    for cache in (None, str(tmp_path / "cache")):
        settings = DataSettings([path], eval_share=0.0, max_length=64, cache=cache, **changes)
        load_rows(settings, tokenizer, tmp_path / "model", world)
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
        ([RANKED | {"tokenizer": "x"}] * 2, "; 2 records with ignored columns: tokenizer"),
    ],
)  # fmt: skip
def test_the_line_of_the_data_names_them(records, expected, tmp_path, capsys, tokenizer, world):
    assert printed(records, tmp_path, capsys, tokenizer, world) == expected


NAMED = {"role": "user", "content": "p", "name": "bob", "weight": None}
FOUND = {"role": "tool", "content": "42", "name": "look", "tool_call_id": "7"}
CITING = {"role": "assistant", "content": "a", "citations": ["x"]}
SHOW_TOOLS = "{% if m.role == 'tool' %}[{{ m.name }} {{ m.tool_call_id }}]{% endif %}"
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{more}{{ eos_token }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}<assistant>{% endif %}"


def line(records: list[dict], tmp_path: Path, capsys, world, template: str | None) -> str:
    tokenizer = byte_tokenizer(chat_template=template)
    return printed(records, tmp_path, capsys, tokenizer, world)


@pytest.mark.parametrize(
    ("prompt", "chosen", "more", "expected"),
    [
        ([NAMED | {"name": None}], [{"role": "assistant", "content": "a"}], None, ""),
        ([NAMED | {"tool_call_id": "7"}], [CITING], None,
         "id, prompt[].name, prompt[].tool_call_id, responses[].citations"),
        ([NAMED], "a", "", "id, prompt[].name"),
        ([NAMED], "a", "{{ m.name }}", ""),
        ([NAMED], [CITING], "{{ m.citations }}", "id, prompt[].name"),
        ([NAMED, FOUND], "a", SHOW_TOOLS, "id, prompt[].name"),
        ([NAMED | {"name": None}, FOUND], "a", SHOW_TOOLS, ""),
        ([NAMED | {"name": None}, FOUND], "a", "", "id, prompt[].name, prompt[].tool_call_id"),
    ],
)  # fmt: skip
def test_keys_of_messages_that_are_not_in_the_text_are_named(
    prompt, chosen, more, expected, tmp_path, capsys, world
):
    """Beside the columns, and once per record. A key counts for each role that has it."""
    record = {"prompt": prompt, "chosen": chosen, "rejected": "b"}
    template = None if more is None else TURNS.replace("{more}", more)
    if expected.startswith("id, "):
        record, expected = record | {"id": 1}, f"; 2 records with ignored columns: {expected}"
    assert line([record] * 2, tmp_path, capsys, world, template) == expected


def test_an_answer_with_an_ignored_key_is_trained_on_as_its_text(tokenizer):
    """A chat template that reads the key shows it."""
    record = Record("Hi", ("a", "b"), answers=(CITING, CITING | {"content": "b"}))
    for name in ("raw", "pku"):
        (row,) = encode_records([record], tokenizer, 64, name)
        (bare,) = encode_records([Record("Hi", ("a", "b"))], tokenizer, 64, name)
        assert row.prompt.tolist() == bare.prompt.tolist()
        assert [r.tolist() for r in row.responses] == [r.tolist() for r in bare.responses]
        assert row.notes == ("records with ignored columns: responses[].citations",)
    chat = byte_tokenizer(chat_template=TURNS.replace("{more}", "{{ (m.citations or [])[0] }}"))
    (row,) = encode_records([record], chat, 64, "auto")
    assert [chat.decode(r) for r in row.responses] == ["ax<eos>", "bx<eos>"] and row.notes == ()
