"""python -m pytest tests/data/test_audit.py"""

import json
import re
from collections import Counter
from functools import partial

import pytest
from processes import run_ranks

import train_dpo
import train_rm
from nanoalign.data.audit import audit
from nanoalign.distributed import run
from nanoalign.encode import encode_all
from nanoalign.ranks.report import report
from nanoalign.records import Record


@pytest.fixture
def rows(tokenizer):
    pairs = [("ab", "cd", "e"), ("ab", "cd", "e"), ("ab", "e", "cd"), ("x", "long answer", "b")]
    records = [Record(p, (c, r), name=f"t:{n}") for n, (p, c, r) in enumerate(pairs, start=1)]
    return encode_all(records, tokenizer)


def lines_of(text: str, number: int) -> list[list[str]]:
    """The token lines of one example, as words."""
    part = text.split(f"example {number}: ")[1].split("\n\n")[0]
    return [line.split() for line in part.splitlines() if re.match(r" +\d+ ", line)]


def test_every_scored_token_is_listed_with_the_place_that_predicts_it(rows, tokenizer):
    """a b | c d EOS | e EOS: c and e are both predicted at b, place 1."""
    found = lines_of(audit(rows, Counter(), tokenizer, 1, rewards=False), 1)
    columns = [(word[0], word[2], word[3], word[5]) for word in found]
    assert columns == [
        ("0", "0", "prompt", "-"),
        ("1", "1", "prompt", "-"),
        ("2", "2", "chosen", "1"),
        ("3", "3", "chosen", "2"),
        ("4", "4", "chosen", "3"),
        ("5", "2", "rejected", "1"),
        ("6", "3", "rejected", "5"),
    ]
    text = audit(rows, Counter(), tokenizer, 1, rewards=False)
    assert "response 1, chosen: 3 scored, first 'c' at 2, last '<eos>' at 4" in text
    assert "response 2, rejected: 2 scored, first 'e' at 5, last '<eos>' at 6" in text
    assert "example 2" not in text


def test_a_reward_is_read_at_the_last_token_alone(rows, tokenizer):
    found = lines_of(audit(rows, Counter(), tokenizer, 2, rewards=True), 2)
    assert [word[0] for word in found if word[4] == "yes"] == ["4", "6"]
    assert [word[5] for word in found if word[4] == "yes"] == ["4", "6"]


def figures(text: str) -> dict[str, str]:
    table = text.split("all of the training data\n")[1]
    return dict(re.split(r"  +", line, maxsplit=1) for line in table.splitlines())


def test_the_table_counts_duplicates_and_contradictions(rows, tokenizer):
    """Of four pairs two are the same, and one has the opposite label; one chosen is shorter."""
    found = figures(audit(rows, Counter({"prompts cut": 7}), tokenizer, 1, rewards=False))
    assert found["pairs"] == "4" and found["prompts cut"] == "7"
    assert found["duplicates"].startswith("1 ") and found["contradictions"].startswith("1 ")
    assert found["responses that end with EOS"] == "100.0%"
    assert found["chosen longer than rejected"].startswith("75.0%")
    assert found["tokens of a response"] == "median 2, 95 % up to 3, most 12"


def test_two_preferences_do_not_contradict_each_other(tokenizer):
    """One record whose labels differ: no duplicate, no contradiction; a name by each preference."""
    record = Record("p", ("x", "y"), ((0, 1), (1, 0)), {"dimensions": [0, 1]}, name="a")
    rows = encode_all([record], tokenizer)
    text = audit(rows, Counter(), tokenizer, 1, rewards=True)
    found = figures(text)
    assert found["duplicates"].startswith("0 ") and found["contradictions"].startswith("0 ")
    assert found["prompts cut at their beginning"] == "0"
    assert "response 1, chosen/rejected: 1 scored" in text
    assert "response 2, rejected/chosen: 1 scored" in text


def test_the_responses_of_a_ranked_record_have_their_ranks(tokenizer):
    record = Record("p", ("x", "y", "z"), ((0, 1), (0, 2), (1, 2)), name="a")
    rows = encode_all([record], tokenizer)
    text = audit(rows, Counter(), tokenizer, 1, rewards=True)
    assert [f"response {k}, rank {k}: 1 scored" in text for k in (1, 2, 3)] == [True] * 3
    assert figures(text)["pairs"] == "3"


def test_cut_responses_and_unpaired_responses(tokenizer):
    """Responses cut at their end have no EOS; unpaired responses are no pairs.

    The same response with the other label is a contradiction.
    """
    records = [
        Record("pppp", ("long response", "b"), extra={"desirable": [True]}, name="a"),
        Record("q", ("x",), ((0, 0),), {"desirable": [False]}, name="b"),
    ]
    rows = encode_all(records, tokenizer, 6)
    counts = Counter(note for row in rows for note in row.notes)
    text = audit(rows, counts, tokenizer, 2, rewards=False)
    found = figures(text)
    assert found["responses that end with EOS"] == "66.7%"
    assert (found["pairs"], found["single examples"]) == ("1", "1")
    assert found["contradictions"].startswith("0 ")
    assert found["responses cut at their end (no EOS)"] == "1"
    assert "response 1, rejected: 2 scored" in text.split("example 2")[1]
    wanted = Record("q", ("x",), ((0, 0),), {"desirable": [True]}, name="c")
    rows += encode_all([wanted], tokenizer, 6)
    text = audit(rows, counts, tokenizer, 3, rewards=False)
    assert "response 1, chosen: 2 scored" in text.split("example 3")[1]
    assert figures(text)["contradictions"].startswith("1 ")


def _script(main, argv: list[str]) -> None:
    run(partial(main, argv), report)


@pytest.mark.parametrize("script", [train_dpo, train_rm])
def test_an_audit_stops_before_anything_is_written(script, llama_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    record = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path.write_text("".join(json.dumps(record | {"prompt": f"p{i}"}) + "\n" for i in range(12)))
    argv = ["--model", llama_folder, "--data", path, "--audit", 2, "--out", tmp_path / "out"]
    ranks = 2 if script is train_dpo else 1
    outcome = run_ranks(ranks, _script, script.main, [str(arg) for arg in argv])
    assert outcome.codes == [0] * ranks, outcome.stderr
    assert outcome.stdout.count("example 2: ") == 1 and "example 3" not in outcome.stdout
    assert "all of the training data" in outcome.stdout and not (tmp_path / "out").exists()
