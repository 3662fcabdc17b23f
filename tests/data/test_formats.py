"""python -m pytest tests/data/test_formats.py"""

import json
import math
import sys

import pytest

from nanoalign import records
from nanoalign.data.formats import formats
from nanoalign.data.sources import open_source, read_records
from nanoalign.errors import RunError
from nanoalign.records import Record


def write(path, *records, text=None):
    path.write_text(text if text is not None else "".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def read(path: str, preference: str = "better", unpaired: str = ""):
    return list(records.read([path], formats(preference, unpaired), open_source))


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {
    "prompt": "p",
    "response_0": "a",
    "response_1": "b",
    "better_response_id": 1,
    "safer_response_id": 0,
}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
DIALOGUE = {
    "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant: good",
    "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant: bad",
}
SINGLE = {"prompt": "p", "completion": "c", "label": False}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_prompt_chosen_rejected(tmp_path):
    (record,) = read(write(tmp_path / "a.jsonl", PAIR))
    assert (record.prompt, record.responses, record.pairs) == ("p", ("c", "r"), ((0, 1),))
    assert (record.name, record.subset, record.tools) == ("a:1", "a", None)


@pytest.mark.parametrize(
    ("preference", "responses"), [("better", ("b", "a")), ("safer", ("a", "b"))]
)
def test_the_label_of_pku_orders_the_responses(tmp_path, preference, responses):
    (record,) = read(write(tmp_path / "a.jsonl", PKU), preference)
    assert record.responses == responses
    whole_number = PKU | {"better_response_id": 1.0, "safer_response_id": 0.0}
    (record,) = read(write(tmp_path / "b.jsonl", whole_number), preference)
    assert record.responses == responses


def test_a_dialogue_is_split_at_the_last_header_that_both_share(tmp_path):
    (record,) = read(write(tmp_path / "a.jsonl", DIALOGUE))
    assert record.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant:"
    assert record.responses == (" good", " bad")


def test_dialogues_that_differ_early_keep_their_further_turns(tmp_path):
    record = {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: b",
        "rejected": "\n\nHuman: q\n\nAssistant: other",
    }
    (record,) = read(write(tmp_path / "a.jsonl", record))
    assert record.prompt == "\n\nHuman: q\n\nAssistant:"
    assert record.responses == (" a\n\nHuman: more\n\nAssistant: b", " other")


def test_ranked_responses_are_sorted_and_make_their_unequal_pairs(tmp_path):
    """Scores 1, 3, 1, 2: b before d before a and c, which tie: five pairs."""
    record = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3.0, 1, 2]}
    tied = record | {"scores": [1, 1, 1, 1]}
    first, second = read(write(tmp_path / "a.jsonl", record, tied))
    assert first.responses == ("b", "d", "a", "c")
    assert first.pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    assert first.extra == {"margins": [1.0, 2.0, 2.0, 1.0, 1.0]}
    assert second.pairs == () and second.extra == {"margins": []}


def test_a_margin_goes_with_its_pair(tmp_path):
    """A column of margins may have gaps; a ranked record has margins of its own."""
    records = [PAIR | {"margin": 0.5}, PAIR, PAIR | {"margin": None}, PAIR | {"margin": 0}]
    found = read(write(tmp_path / "a.jsonl", *records))
    assert [record.extra["margins"] for record in found] == [[0.5], [1.0], [1.0], [0.0]]
    for other in (PKU | {"margin": 3}, DIALOGUE | {"margin": 3}):
        (record,) = read(write(tmp_path / "b.jsonl", other))
        assert record.extra == {"margins": [3.0]}
    (ranked,) = read(write(tmp_path / "c.jsonl", RANKED | {"margin": 9}))
    assert ranked.extra == {"margins": [1.0]}


def test_unpaired_records_are_paired_with_themselves(tmp_path):
    """They have a label, as pairs have beside them, and no margin."""
    for completion in ("c", [assistant("c")]):
        source = write(tmp_path / "a.jsonl", SINGLE | {"completion": completion})
        (record,) = read(source, unpaired="kto")
        assert (record.responses, record.pairs) == (("c",), ((0, 0),))
        assert record.extra == {"desirable": [False]}
    assert read(write(tmp_path / "b.jsonl", PAIR), unpaired="kto")[0].extra == {"desirable": [True]}
    (ranked,) = read(write(tmp_path / "c.jsonl", RANKED), unpaired="kto")
    assert ranked.extra == {"desirable": [True]}


def test_what_is_wrong_with_unpaired_records(tmp_path):
    for bad in ([assistant("c")] * 2, [user("c")]):
        source = write(tmp_path / "a.jsonl", SINGLE | {"completion": bad})
        with pytest.raises(RunError, match="jsonl:1: the completion must be text or exactly one"):
            read(source, unpaired="kto")
    with pytest.raises(RunError, match="jsonl:1: the label must be true or false, found 2"):
        read(write(tmp_path / "a.jsonl", SINGLE | {"label": 2}), unpaired="kto")
    with pytest.raises(RunError, match="a.jsonl:1: .* train_dpo.py --loss kto"):
        read(write(tmp_path / "a.jsonl", SINGLE))


def lines(*records) -> str:
    return "\n".join(map(json.dumps, records))


HALF = '{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}'  # of a character
BAD = {
    "unknown keys": ('{"question": "q"}', r"a\.jsonl:1: unknown keys \['question'\]; the nearest"),
    "not a record": ("[1]", ":1: expected a JSON object, found int"),
    "mixed formats": (lines(PAIR, PKU), r":2: a record with the keys prompt \+ response_0"),
    "half a character": (HALF, ":1: .* lone surrogate"),
    "empty response": (lines(PAIR | {"rejected": ""}), ":1: .* response 2 of 2, .* is empty"),
    "empty prompt": (lines(PAIR | {"prompt": ""}), ":1: the prompt is empty"),
    "empty message": (lines(PAIR | {"prompt": [user("")]}), ":1: the prompt is empty"),
    "response no text": (lines(PAIR | {"chosen": 3}), "1: .* response 1 .* must be text, found"),
    "label of 2": (lines(PKU | {"better_response_id": 2}), "_response_id is 2; .* needs 0 or 1"),
    "label of true": (lines(PKU | {"better_response_id": True}), "is True; .* needs 0 or 1"),
    "no label": (lines({k: PKU[k] for k in list(PKU)[:3]}), ":1: better_response_id is None"),
    "no shared dialogue": ('{"chosen": "x", "rejected": "y"}', "share no words at their beginning"),
    "ends with the user": (lines({"chosen": [user("q")], "rejected": [user("q")]}),
                           "chosen ends with a message of 'user'"),
    "contexts differ": (lines({"chosen": [user("q"), assistant("c")],
                               "rejected": [user("p"), assistant("c")]}),
                        "differ before their last message"),
    "no context": (lines({"chosen": [assistant("c")], "rejected": [assistant("r")]}),
                   "the prompt is empty"),
    "message without content": (lines({"chosen": [{"role": "user"}], "rejected": [user("p")]}),
                                "expected {'role': text"),
    "one response": (lines(RANKED | {"responses": ["a"]}), ":1: responses must be a list of"),
    "scores missing": (lines(RANKED | {"scores": [1, 2, 3]}), ":1: 2 responses, but 3 scores"),
    "score of text": (lines(RANKED | {"scores": [1, "2"]}), "score must be a finite .*, found '2'"),
    "score of true": (lines(RANKED | {"scores": [1, True]}), "score must be a finite number"),
    "score of nan": (lines(RANKED | {"scores": [1, math.nan]}), "score must be a finite number"),
    "huge score": (lines(RANKED | {"scores": [1, 10**400]}), "score must be a finite number"),
    "empty ranked response": (lines(RANKED | {"responses": ["", "b"]}), "response 2 .* is empty"),
    "negative margin": (lines(PAIR | {"margin": -1}), "the margin is -1; it must not be negative"),
    "huge margin": (lines(PAIR, PAIR | {"margin": 1e300}),
                    "a.jsonl:2: the margin must .* of at most 1e\\+30, found '1e\\+300'"),
    "score beyond float32": (lines(RANKED | {"scores": [-2e38, 2e38]}),
                             "a.jsonl:1: the score must .* at most 1e\\+30, found '-2e\\+38'"),
    "margin of text": (lines(PAIR | {"margin": "big"}), "the margin must be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_errors_with_file_and_line(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(RunError, match=message):
        read(write(tmp_path / "a.jsonl", text=content))


# --- the records that a rank encodes


def test_records_that_are_not_wanted_are_not_decoded(tmp_path):
    """The first one of each source is, as it decides the format; numbers go on over sources."""
    good, bad = json.dumps(PAIR), '{"prompt": '
    first = write(tmp_path / "a.jsonl", text=f"{good}\n{bad}\n{good}\n")
    second = write(tmp_path / "b.jsonl", text=f"{good}\n{good}\n{bad}\n")
    found = read_records(formats(), [first, second], lambda number: number in (2, 4))
    assert [record.name for record in found] == ["a:3", "b:2"]
    with pytest.raises(RunError, match=r"a\.jsonl:2: not valid JSON"):
        list(read_records(formats(), [first, second]))


def test_another_format_is_found_where_the_first_record_is_not_wanted(tmp_path):
    source = write(tmp_path / "a.jsonl", PAIR, PAIR, PKU)
    with pytest.raises(RunError, match=r"a\.jsonl:3: a record with the keys"):
        list(read_records(formats(), [source], lambda number: number == 2))


def test_a_plain_pair_is_read_by_the_functions_of_the_core(tmp_path):
    """From the line of the file to the Record; a breakpoint in one of them stops."""
    path, entered = write(tmp_path / "a.jsonl", PAIR), set()

    def trace(frame, event, _) -> None:
        if frame.f_code.co_filename == records.__file__:
            entered.add(frame.f_code.co_name)

    sys.setprofile(trace)
    try:
        read(path)
    finally:
        sys.setprofile(None)
    assert entered >= {"lines_of", "read", "parse", "decode", "pair", "check_text"}


def test_an_entry_of_the_core_is_a_format_of_the_scripts(monkeypatch):
    """Its keys come after those of our own formats."""
    keys = ("question", "good", "bad")
    monkeypatch.setitem(records.FORMATS, keys, lambda record: Record("q", ("g", "b")))
    known = formats()
    assert known[keys]({}) == Record("q", ("g", "b"))
    assert list(known).index(keys) > list(known).index(("prompt", "chosen", "rejected"))
