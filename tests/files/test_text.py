"""python -m pytest tests/files/test_text.py"""

import logging
import sys
import unicodedata

import pytest
from processes import run_ranks

import train_dpo
from nanoalign.distributed import run
from nanoalign.errors import RunError
from nanoalign.files.text import (
    LENGTH,
    in_a_line,
    in_markdown,
    in_picture,
    in_short,
    read_json,
    visible,
)
from nanoalign.ranks.groups import setup
from nanoalign.ranks.report import report


def test_what_moves_a_cursor_or_reorders_text_is_visible():
    text = "a\x1b[2J\r\x00\x7f\x85\u202eb\u2066\ud800c"
    assert visible(text) == r"a\x1b[2J\x0d\x00\x7f\x85\u202eb\u2066\ud800c"
    every = visible("".join(map(chr, range(0x3000))) + "\ud800\udfff")
    every.encode()  # raises for a surrogate
    assert {unicodedata.category(c) for c in every if c not in "\n\t"}.isdisjoint({"Cc", "Cs"})


def test_other_text_is_as_it_was():
    text = "naïve 你好 שלום 👩\u200d🔬 é \u00a0\u3000 line\nnext\ttab"
    assert visible(text) == text


def test_an_error_is_one_line_of_bounded_length():
    assert in_short("one\ntwo\rthree\tfour") == r"one\ntwo\x0dthree\tfour"
    text = in_short("file.jsonl:3: " + "x" * 3_000_000 + " remove the record")
    assert len(text) < LENGTH + 10
    assert text.startswith("file.jsonl:3: ") and text.endswith(" remove the record")
    assert len(in_a_line(ValueError("x" * 10_000))) < 400


def _logs() -> None:
    sys.argv = ["train_dpo.py"]
    setup(train_dpo.parse_args([]))
    logging.getLogger("transformers.models").warning("rope_type=%s", "\x1b[31m\u202e")


def test_what_transformers_logs_has_no_escape_sequences():
    outcome = run_ranks(1, _logs)
    assert outcome.codes == [0]
    assert r"rope_type=\x1b[31m\u202e" in outcome.stderr and "\x1b" not in outcome.stderr


def _fails() -> None:
    def main() -> None:
        raise RunError("data.jsonl:1: the role '\x1b]0;title\x07\x1b[31m' is unknown\nand more")

    sys.argv = ["train_dpo.py"]
    run(main, report)


def test_a_printed_error_has_no_escape_sequences():
    outcome = run_ranks(1, _fails)
    expected = r"error: data.jsonl:1: the role '\x1b]0;title\x07\x1b[31m' is unknown\nand more"
    assert outcome.codes == [1] and outcome.stderr == expected + "\n"


def test_an_error_has_at_most_2000_characters_with_what_precedes_it():
    assert len("error: " + in_short("\x00" * 10**6)) <= 2000


def test_names_have_no_meaning_in_markdown_and_pictures():
    name = "<img src=x> [a](javascript:b) `c` $x_1$ \x1b[31m\n# d"
    for mark in "<>[]()`$#":
        assert in_markdown(name).count(mark) == in_markdown(name).count("\\" + mark) > 0
    assert "\n" not in in_markdown(name) and "\x1b" not in in_markdown(name)
    assert in_markdown("held_out/a-b.jsonl:3") == "held_out/a-b.jsonl:3"
    assert in_picture(r"$x$ \$y \x1b") == r"\$x\$ \$y \x1b"


@pytest.mark.parametrize("content", [b"[" * 10**5, b"[]", b"{", b"\xff", b"1" * 5000, b""])
def test_a_file_without_an_object_of_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path}: "):
        read_json(path)
