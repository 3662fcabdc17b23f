"""python -m pytest tests/test_data.py"""

import gzip
import json
import math

import pytest

from nanoalign import tiny
from nanoalign.data import TEST_OF, read_examples, read_sources
from nanoalign.errors import RunError
from nanoalign.records import Pair
from nanoalign.tiny import world as tiny_world


def write(path, *records, text=None):
    path.write_text(text if text is not None else "".join(json.dumps(r) + "\n" for r in records))
    return str(path)


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


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_prompt_chosen_rejected(tmp_path):
    (example,) = read_examples(write(tmp_path / "a.jsonl", PAIR))
    assert (example.kind, example.prompt, example.responses) == ("text", "p", ("c", "r"))
    assert (example.pair_id, example.subset) == ("a:1", "a")


@pytest.mark.parametrize(
    ("preference", "responses"), [("better", ("b", "a")), ("safer", ("a", "b"))]
)
def test_pku_label_orders_the_responses(tmp_path, preference, responses):
    (example,) = read_examples(write(tmp_path / "a.jsonl", PKU), preference)
    assert example.responses == responses


def test_hh_dialogue_is_split_at_the_last_shared_header(tmp_path):
    (example,) = read_examples(write(tmp_path / "a.jsonl", DIALOGUE))
    assert example.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant:"
    assert example.responses == (" good", " bad")
    assert example.messages() == [user("q"), assistant("a"), user("s")]


def test_hh_dialogues_that_part_early_keep_their_further_turns(tmp_path):
    record = {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: b",
        "rejected": "\n\nHuman: q\n\nAssistant: other",
    }
    (example,) = read_examples(write(tmp_path / "a.jsonl", record))
    assert example.prompt == "\n\nHuman: q\n\nAssistant:"
    assert example.responses == (" a\n\nHuman: more\n\nAssistant: b", " other")


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        {"prompt": [user("q")], "chosen": "c", "rejected": "r"},
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("c")],
            "rejected": [user("q"), assistant("r")],
        },
    ],
)
def test_messages_in_all_their_forms(tmp_path, record):
    (example,) = read_examples(write(tmp_path / "a.jsonl", record))
    assert (example.kind, example.prompt, example.responses) == (
        "messages",
        (user("q"),),
        ("c", "r"),
    )


def test_json_array_and_gzip_read_the_same(tmp_path):
    records = [PAIR, PAIR | {"chosen": "other, with a \u2028 line separator"}]
    expected = [e.responses for e in read_examples(write(tmp_path / "a.jsonl", *records))]
    array = write(tmp_path / "b.json", text=json.dumps(records, indent=2, ensure_ascii=False))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for path in (array, str(packed)):
        assert [e.responses for e in read_examples(path)] == expected


def test_parquet_reads_the_same(tmp_path):
    reason = "pyarrow is not installed, so .parquet is not read"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)
    parquet.write_table(pyarrow.Table.from_pylist([PKU, PKU]), tmp_path / "a.parquet")
    assert [e.responses for e in read_examples(str(tmp_path / "a.parquet"))] == [("b", "a")] * 2


def test_ranked_responses_stand_best_first_and_make_their_unequal_pairs(tmp_path):
    """Scores 1, 3, 1, 2: b before d before a and c, which tie: five pairs."""
    record = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3.0, 1, 2]}
    tied = record | {"scores": [1, 1, 1, 1]}
    first, second = read_examples(write(tmp_path / "a.jsonl", record, tied))
    assert first.responses == ("b", "d", "a", "c")
    by_hand = (0, 1, 1.0), (0, 2, 2.0), (0, 3, 2.0), (1, 2, 1.0), (1, 3, 1.0)
    assert first.pairs == tuple(Pair(*pair) for pair in by_hand)
    assert second.pairs == ()


def test_a_margin_goes_with_its_pair(tmp_path):
    """A column of margins may have gaps; in a ranked record it says nothing."""
    records = [PAIR | {"margin": 0.5}, PAIR, PAIR | {"margin": None}]
    first, *others = read_examples(write(tmp_path / "a.jsonl", *records))
    assert first.pairs == (Pair(0, 1, 0.5),)
    assert all(example.pairs == (Pair(0, 1, 1.0),) for example in others)
    (ranked,) = read_examples(write(tmp_path / "b.jsonl", RANKED | {"margin": 9}))
    assert ranked.pairs == (Pair(0, 1, 1.0),)


def test_embedded_data_by_source():
    """A pair for every prompt of the split; the files hold every third of them."""
    prompts = tiny_world.split_prompts()
    for i, name in enumerate(tiny.SOURCE_NAMES):
        examples = read_examples(f"tiny:test:{name}")
        assert [e.prompt for e in examples] == prompts["test"]
        in_file = read_examples("tiny:test")[i::3]
        assert [(e.prompt, e.responses) for e in examples[i::3]] == [
            (e.prompt, e.responses) for e in in_file
        ]
    assert [e.prompt for e in read_examples("tiny:tiny-b")] == prompts["train"]
    assert tuple(tiny_world.SOURCES) == tiny.SOURCE_NAMES
    assert TEST_OF["tiny"] == "tiny:test" and TEST_OF["tiny:tiny-b"] == "tiny:test:tiny-b"


def test_names_keep_sources_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR)
    assert {e.pair_id for e in read_sources([f"x={path}", f"y={path}"])} == {"x:1", "y:1"}
    with pytest.raises(RunError, match="two data sources are named 'a'"):
        read_sources([path, path])


BAD = {
    "broken JSON": (json.dumps(PAIR) + '\n{"prompt": \n', r"a\.jsonl:2: not valid JSON: .* \(column 12\)"),
    "broken array": (f"[\n{json.dumps(PAIR)},\n{{'a': }}\n]", r"a\.jsonl:3: not valid JSON"),
    "array without comma": (f"[{json.dumps(PAIR)}\n{json.dumps(PAIR)}]", r":2: .* expected ',' or '\]'"),
    "empty file": ("", "holds no records; expected prompt"),
    "two arrays": (f"[{json.dumps(PAIR)}]\n[]", r":2: not valid JSON: '\[\]' follows the list"),
    "half a character": ('{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', "a lone surrogate"),
    "empty array": ("[]", "holds no records"),
    "unknown keys": ('{"question": "q"}', r"a\.jsonl:1: unknown keys \['question'\]; expected prompt"),
    "not a record": ("[1]", ":1: expected a record with keys, found int"),
    "empty response": (json.dumps(PAIR | {"rejected": ""}), ":1: the rejected response is empty"),
    "empty prompt": (json.dumps(PAIR | {"prompt": ""}), ":1: the prompt is empty"),
    "response no text": (json.dumps(PAIR | {"chosen": 3}), ":1: the chosen response must be text, found int"),
    "label of 2": (json.dumps(PKU | {"better_response_id": 2}), "better_response_id is 2; expected 0 or 1"),
    "label of true": (json.dumps(PKU | {"better_response_id": True}), "is True; expected 0 or 1"),
    "no label": (json.dumps({k: PKU[k] for k in list(PKU)[:3]}), ":1: no better_response_id"),
    "mixed formats": (f"{json.dumps(PAIR)}\n{json.dumps(PKU)}", r":2: a record of the format"),
    "no shared dialogue": ('{"chosen": "x", "rejected": "y"}', "must be HH-RLHF dialogues"),
    "ends with the user": (
        json.dumps({"chosen": [user("q")], "rejected": [user("q")]}), "ends with a message of 'user'"),
    "contexts differ": (
        json.dumps({"chosen": [user("q"), assistant("c")], "rejected": [user("p"), assistant("c")]}),
        "differ before their last message"),
    "one response": (json.dumps(RANKED | {"responses": ["a"]}), ":1: responses must be a list of at least"),
    "scores missing": (json.dumps(RANKED | {"scores": [1, 2, 3]}), ":1: 2 responses, but 3 scores"),
    "score of text": (json.dumps(RANKED | {"scores": [1, "2"]}), "score must be a finite number, found '2'"),
    "score of nan": (json.dumps(RANKED | {"scores": [1, math.nan]}), "the score must be a finite number"),
    "empty ranked response": (json.dumps(RANKED | {"responses": ["", "b"]}), "response of rank 2 is empty"),
    "huge score": (json.dumps(RANKED | {"scores": [1, 10**400]}), "score must be a finite number"),
    "negative margin": (json.dumps(PAIR | {"margin": -1}), "the margin is -1; it must not be negative"),
    "margin of text": (json.dumps(PAIR | {"margin": "big"}), "the margin must be a finite number"),
    "message without content": (
        json.dumps({"chosen": [{"role": "user"}], "rejected": [user("p")]}), "expected {'role': text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_errors_that_say_where_and_what(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(RunError, match=message):
        read_examples(write(tmp_path / "a.jsonl", text=content))


def test_bad_files_are_errors(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "not.json.gz").write_text("plain")
    for path, message in {
        "missing.jsonl": "does not exist",
        "latin.jsonl": "not a readable UTF-8",
        "not.json.gz": "not a readable",
        "text.csv": "unknown kind of file",
        ".": "is a folder",
    }.items():
        with pytest.raises(RunError, match=message):
            read_examples(str(tmp_path / path))
    with pytest.raises(RunError, match="expected hf://datasets/OWNER/NAME/PATH"):
        read_examples("hf://datasets/owner")


def test_unpaired_records_and_what_is_wrong_with_them(tmp_path):
    record = {"prompt": "p", "completion": "c", "label": False}
    message = {"role": "assistant", "content": "c"}
    for completion in ("c", [message]):
        (example,) = read_examples(write(tmp_path / "a.jsonl", record | {"completion": completion}))
        assert example.responses == ("c",) and example.pairs == (Pair(None, 0),)
    for bad in ([message, message], [message | {"role": "user"}]):
        with pytest.raises(
            RunError, match="a.jsonl:1: the completion must be one message of 'assistant'"
        ):
            read_examples(write(tmp_path / "a.jsonl", record | {"completion": bad}))
    pku = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1.0}
    (example,) = read_examples(write(tmp_path / "b.jsonl", pku))
    assert example.responses == ("b", "a")
