"""python -m pytest tests/data/test_formats.py"""

import math

import pytest
from stores import parsed, read, write

from nanoalign import records
from nanoalign.data.dialogues import DIFFER_EARLIER
from nanoalign.data.formats import formats
from nanoalign.errors import RunError
from nanoalign.records import Record

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b"}
PKU |= {"better_response_id": 1, "safer_response_id": 0}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
BEGIN = "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant:"
DIALOGUE = {"chosen": f"{BEGIN} good", "rejected": f"{BEGIN} bad"}
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
def test_the_label_of_pku_orders_the_responses(preference, responses):
    whole_number = PKU | {"better_response_id": 1.0, "safer_response_id": 0.0}
    for record in (PKU, whole_number):
        assert parsed(record, preference=preference).responses == responses


def test_a_dialogue_is_split_at_the_last_header_that_both_share():
    """Dialogues that differ earlier have no pair: turns of the human would be scored."""
    record = parsed(DIALOGUE)
    assert (record.prompt, record.responses) == (BEGIN, (" good", " bad"))
    begin = "\n\nHuman: q\n\nAssistant:"
    more = " a\n\nHuman: more\n\nAssistant: b"
    record = parsed({"chosen": begin + more, "rejected": begin + " other"})
    assert (record.prompt, record.responses) == (begin, (more, " other"))
    assert record.pairs == () and record.notes == (DIFFER_EARLIER,)


def test_ranked_responses_are_sorted_and_make_their_unequal_pairs():
    """Scores 1, 3, 1, 2: b before d before a and c, which tie: five pairs."""
    record = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3.0, 1, 2]}
    first, tied = parsed(record), parsed(record | {"scores": [1, 1, 1, 1]})
    assert first.responses == ("b", "d", "a", "c")
    assert first.pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    assert first.extra == {"margins": [1.0, 2.0, 2.0, 1.0, 1.0]}
    assert tied.pairs == () and tied.extra == {"margins": []}


def test_a_margin_goes_with_its_pair():
    """A column of margins may have gaps; a ranked record has margins of its own."""
    for record, margin in (
        (PAIR | {"margin": 0.5}, 0.5),
        (PAIR, 1.0),
        (PAIR | {"margin": None}, 1.0),
        (PAIR | {"margin": 0}, 0.0),
        (PKU | {"margin": 3}, 3.0),
        (DIALOGUE | {"margin": 3}, 3.0),
        (RANKED | {"margin": 9}, 1.0),
    ):
        assert parsed(record).extra == {"margins": [margin]}


def test_unpaired_records_are_paired_with_themselves():
    """They have a label, as pairs have beside them, and no margin."""
    for completion in ("c", [assistant("c")]):
        record = parsed(SINGLE | {"completion": completion}, unpaired="kto")
        assert (record.responses, record.pairs) == (("c",), ((0, 0),))
        assert record.extra == {"desirable": [False]}
    for other in (PAIR, RANKED):
        assert parsed(other, unpaired="kto").extra == {"desirable": [True]}


@pytest.mark.parametrize(
    ("changes", "unpaired", "message"),
    [
        ({"completion": [assistant("c")] * 2}, "kto", "the completion must be text or exactly one"),
        ({"completion": [user("c")]}, "kto", "the completion must be text or exactly one"),
        ({"label": 2}, "kto", "the label must be true or false, found 2"),
        ({}, "", "train_dpo.py --loss kto"),
    ],
)
def test_what_is_wrong_with_unpaired_records(changes, unpaired, message):
    with pytest.raises(RunError, match=f"a.jsonl:1: .*{message}"):
        parsed(SINGLE | changes, unpaired=unpaired)


ONE, OTHER = [user("q"), assistant("c")], [user("p"), assistant("c")]
BAD = {
    "unknown keys": ({"question": "q"}, r"unknown keys \['question'\]; the nearest"),
    "half a character": (PAIR | {"chosen": "\ud800"}, "lone surrogate"),
    "empty response": (PAIR | {"rejected": ""}, "response 2 of 2, .* is empty"),
    "empty prompt": (PAIR | {"prompt": ""}, "the prompt is empty"),
    "empty message": (PAIR | {"prompt": [user("")]}, "the prompt is empty"),
    "response no text": (PAIR | {"chosen": 3}, "response 1 .* must be text, found"),
    "label of 2": (PKU | {"better_response_id": 2}, "_response_id is 2; .* needs 0 or 1"),
    "label of true": (PKU | {"better_response_id": True}, "is True; .* needs 0 or 1"),
    "no label": ({k: PKU[k] for k in list(PKU)[:3]}, "better_response_id is None"),
    "ends with the user": ({"chosen": ONE[:1], "rejected": ONE[:1]},
                           "chosen ends with a message of 'user'"),
    "contexts differ": ({"chosen": ONE, "rejected": OTHER}, "differ before their last message"),
    "no context": ({"chosen": ONE[1:], "rejected": ONE[1:]}, "the prompt is empty"),
    "one response": (RANKED | {"responses": ["a"]}, "responses must be a list of"),
    "scores missing": (RANKED | {"scores": [1, 2, 3]}, "2 responses, but 3 scores"),
    "score of text": (RANKED | {"scores": [1, "2"]}, "score must be a finite .*, found '2'"),
    "score of true": (RANKED | {"scores": [1, True]}, "score must be a finite number"),
    "score of nan": (RANKED | {"scores": [1, math.nan]}, "score must be a finite number"),
    "negative margin": (PAIR | {"margin": -1}, "the margin is -1; it must not be negative"),
    "huge margin": (PAIR | {"margin": 1e300},
                    "the margin must .* of at most 1e\\+30, found '1e\\+300'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_errors_with_file_and_line(name):
    record, message = BAD[name]
    with pytest.raises(RunError, match=f"^a.jsonl:1: .*{message}"):
        parsed(record)


def test_a_file_has_one_format(tmp_path):
    with pytest.raises(RunError, match=r":2: a record with the keys prompt \+ response_0"):
        read(write(tmp_path / "a.jsonl", PAIR, PKU))


def test_an_entry_of_the_core_is_a_format_of_the_scripts(monkeypatch):
    """Its keys come after those of our own formats."""
    keys = ("question", "good", "bad")
    monkeypatch.setitem(records.FORMATS, keys, lambda record: Record("q", ("g", "b")))
    known = formats()
    assert known[keys]({}) == Record("q", ("g", "b"))
    assert list(known).index(keys) > list(known).index(("prompt", "chosen", "rejected"))
