"""python -m pytest tests/data/test_load.py"""

from collections import Counter
from itertools import compress
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer
from stores import read, write

import train_rm
from nanoalign.batch import Row
from nanoalign.data.encoding import DataSettings
from nanoalign.data.rows import load_rows
from nanoalign.data.split import (
    EQUAL_RESPONSES,
    EQUAL_SCORES,
    Data,
    count_notes,
    drop_equal,
    hold_out,
    hold_out_fold,
    record_digests,
)
from nanoalign.distributed import setup
from nanoalign.encode import CUT_RESPONSE, encode_all
from nanoalign.errors import RunError
from nanoalign.records import Record

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


# --- pairs that teach nothing


def row(*responses: list[int], **fields) -> Row:
    return Row("row", np.int32([1]), tuple(map(np.int32, responses)), **fields)


def test_equal_responses_are_dropped_with_their_values():
    """Of pairs a-b, a-c, b-c, where a and b are equal, the last two are left."""
    assert drop_equal(row([5], [5])) == (None, [EQUAL_RESPONSES])
    values = {"margins": np.float32([1, 3, 2]), "dimensions": np.array([0, 1, 2])}
    ranked = row([5], [5], [6], pairs=((0, 1), (0, 2), (1, 2)), extra=values)
    left, notes = drop_equal(ranked)
    assert left.pairs == ((0, 2), (1, 2)) and notes == [EQUAL_RESPONSES]
    assert left.extra["margins"].tolist() == [3, 2]
    assert left.extra["dimensions"].tolist() == [1, 2]
    assert {name: each.dtype for name, each in left.extra.items()} == {
        name: each.dtype for name, each in values.items()
    }


def test_rows_without_equal_responses_are_kept():
    """Also a response that is paired with itself; but not a record of equal scores."""
    single = row([5], pairs=((0, 0),), extra={"desirable": np.array([True])})
    for kept in (single, row([5], [6])):
        left, notes = drop_equal(kept)
        assert left is kept and notes == []
    assert drop_equal(row([5], [6], pairs=())) == (None, [EQUAL_SCORES])


def test_pairs_that_are_equal_after_cutting_are_dropped_and_all_notes_counted(tokenizer):
    """The prompt has 5 of the 10 tokens; of the ranked responses the first two become equal."""
    ranked = Record("01234", ("abcdeX", "abcdeY", "z"), ((0, 1), (0, 2), (1, 2)),
                    {"margins": [1.0, 3.0, 2.0]})  # fmt: skip
    equal, unequal = (Record("01234", ("abcdeX", "abcdeY")), Record("01234", ("abc", "abd")))
    rows = encode_all([ranked, equal, unequal], tokenizer, 10)
    (first, of_first), (second, of_second), (third, of_third) = map(drop_equal, rows)
    assert first.pairs == ((0, 2), (1, 2)) and second is None and third.pairs == ((0, 1),)
    assert first.extra["margins"].tolist() == [3.0, 2.0]
    counts = count_notes([*of_first, *of_second, *of_third])
    assert counts == {CUT_RESPONSE: 4, EQUAL_SCORES: 0, EQUAL_RESPONSES: 2}


# --- what is held out


def mixed(value: int, seed: int) -> int:
    """SplitMix64, in Python's integers."""
    value = (value + seed * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def prompts_of(records: list[Record]) -> np.ndarray:
    return record_digests(records)[:, 0]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_held_out_prompts_are_those_of_the_oracle(seed):
    """The first tenth by a hash, with all their records, in whatever order these are."""
    digests = prompts_of([Record(f"{i // 2}", ("a", "b")) for i in range(400)])
    held = hold_out(digests, 0.1, seed)
    first = sorted(set(digests.tolist()), key=lambda prompt: mixed(prompt, seed))[:20]
    assert held.tolist() == [prompt in first for prompt in digests.tolist()]
    assert held.sum() == 40 and (held[::2] == held[1::2]).all()
    assert hold_out(digests[::-1], 0.1, seed).tolist() == held.tolist()[::-1]
    assert hold_out(digests, 0.1, seed + 1).tolist() != held.tolist()


def test_some_prompts_are_on_either_side_of_a_split():
    digests = prompts_of([Record(f"{i // 2}", ("a", "b")) for i in range(400)])
    assert not hold_out(digests, 0.0, 0).any()
    assert hold_out(digests, 0.001, 0).sum() == 2  # one prompt, which has two records
    assert hold_out(digests, 0.9999, 0).sum() == 398  # one prompt stays
    assert hold_out(digests[:2], 0.5, 0).tolist() == [False, False]  # there is but one


@pytest.mark.parametrize("parts", [2, 3, 200])
def test_folds_divide_the_prompts(parts):
    """Each record is in one fold, with all others of its prompt, and folds differ by one prompt."""
    digests = prompts_of([Record(f"{i // 2}", ("a", "b")) for i in range(400)])
    folds = [hold_out_fold(digests, f"{k}/{parts}", 0) for k in range(1, parts + 1)]
    assert (np.sum(folds, axis=0) == 1).all()
    assert all((fold[::2] == fold[1::2]).all() for fold in folds)
    sizes = {int(fold.sum()) // 2 for fold in folds}
    assert max(sizes) - min(sizes) <= 1
    assert np.array_equal(folds[0], hold_out(digests, (200 // parts) / 200, 0))
    assert hold_out_fold(digests, f"1/{parts}", 1).tolist() != folds[0].tolist()


def test_more_folds_than_prompts_are_refused():
    digests = prompts_of([Record("p", ("a", "b")), Record("q", ("a", "b"))])
    with pytest.raises(RunError, match="--fold 3/3: the data have 2 prompts; give fewer parts"):
        hold_out_fold(digests, "3/3", 0)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/1", "1", "a/3", "-1/3", "1/3/5", "1.0/3"])
def test_what_is_no_fold_is_refused(text):
    with pytest.raises(RunError, match="expected K/N, such as 1/5"):
        train_rm.parse_args([f"--fold={text}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval_data x.jsonl", "--fold and --eval_data both say what is held out"),
        ("--keep_best", "--keep_best would choose by them"),
        ("--patience 3", "--keep_best would choose by them"),
    ],
)
def test_a_fold_is_what_is_held_out_and_chooses_nothing(flags, message):
    with pytest.raises(RunError, match=message):
        train_rm.parse_args(["--fold", "1/3", *flags.split()])
    assert train_rm.parse_args(["--fold", "01/3"]).fold == "1/3"
    assert train_rm.parse_args(["--fold", "1/3"]).eval_data is None  # not tiny:test:tiny-a


# --- the rows of a run


def load(tokenizer, source: str, **changes) -> Data:
    """The data of a run, in memory: a quarter is held out."""
    settings = DataSettings([source], **{"eval_share": 0.25, "max_length": 64} | changes)
    return load_rows(settings, tokenizer, Path("."), setup())


def test_data_are_held_out_by_share_or_from_files(tmp_path, tokenizer, capsys):
    records = [PAIR | {"prompt": f"{i}"} for i in range(7)]
    source = write(tmp_path / "a.jsonl", *records, PAIR | {"prompt": "1", "rejected": "c"})
    data = load(tokenizer, source)
    held = hold_out(prompts_of(read(source)), 0.25, 0)
    assert held.sum() == 2
    names = [f"a:{n}" for n in range(1, 8)]  # the last one has equal responses
    assert [row.name for row in data.held_out] == list(compress(names, held))
    assert [row.name for row in data.rows] == list(compress(names, ~held))
    assert data.counts == {EQUAL_SCORES: 0, EQUAL_RESPONSES: 1} and data.template == "pku"
    assert capsys.readouterr().out == (
        f"data        {source}: 6 pairs; 1 pairs dropped: both responses equal\n"
        "held out    0.25 of the prompts: 2 pairs\n"
    )
    folds = [load(tokenizer, source, fold=f"{k}/2") for k in (1, 2)]
    assert "held out    part 2/2 of the prompts: " in capsys.readouterr().out
    for data, other in zip(folds, folds[::-1], strict=True):
        assert [row.name for row in data.rows] == [row.name for row in other.held_out]
    other = write(tmp_path / "b.jsonl", PAIR)
    data = load(tokenizer, source, eval_data=[other])
    assert len(data.rows) == 7 and [row.name for row in data.held_out] == ["b:1"]
    assert f"held out    {other}: 1 pairs\n" in capsys.readouterr().out


def test_the_template_is_the_one_that_all_records_have(tmp_path, tokenizer):
    dialogue, other = (PAIR | {"prompt": f"\n\nHuman: {q}\n\nAssistant:"} for q in "qr")
    source = write(tmp_path / "a.jsonl", dialogue, other)
    both = write(tmp_path / "b.jsonl", PAIR, dialogue)
    assert load(tokenizer, source).template == "raw"
    assert load(tokenizer, both).template == "auto"
    assert load(tokenizer, both, template="pku").template == "pku"
    chat = byte_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load(chat, both).template == "chat"


def test_records_are_changed_after_prompts_are_held_out(tmp_path, tokenizer):
    """So all records that are made of one prompt are on the same side."""

    records = [
        {"prompt": f"{i}", "response_0": "a", "response_1": "b", "better_response_id": i % 2,
         "safer_response_id": i % 3 % 2} for i in range(40)
    ]  # fmt: skip
    source, both = write(tmp_path / "a.jsonl", *records), ("better", "safer")
    data = load(tokenizer, source, template="raw", preferences=both, condition=True)
    texts = [[tokenizer.decode(row.prompt) for row in part] for part in (data.rows, data.held_out)]
    assert list(map(len, texts)) == [60, 20]
    for part in texts:
        assert set(Counter(text.partition(" [")[0] for text in part).values()) == {2}
        marks = Counter(text.partition(" [")[2] for text in part)
        assert marks == {"better]": len(part) / 2, "safer]": len(part) / 2}
