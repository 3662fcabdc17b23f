"""python -m pytest tests/data/test_disk.py rows on disk are those in memory"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, tiny_llama
from stores import PAIR, all_rows, assert_same_rows, opened, settings, write
from transformers import AutoTokenizer

from nanoalign.batch import lengths_of
from nanoalign.data import rows, store
from nanoalign.data.encoding import DataSettings
from nanoalign.data.rows import load_rows
from nanoalign.data.split import Data, fingerprint
from nanoalign.data.store import Store, StoredRows
from nanoalign.distributed import setup
from nanoalign.errors import RunError
from nanoalign.model import Policy
from nanoalign.packing.self_check import check_fits

RANKED = {"prompt": "Count.", "responses": ["1 2 3", "3 2", "1", "1"], "scores": [3, 1, 2, 2]}
SINGLE = {"prompt": "Say hello.", "completion": "Hello.", "label": True}
PKU = {"prompt": "Sort 3 1 2.", "response_0": "1 2 3", "response_1": "3 1 2",
       "better_response_id": 0, "safer_response_id": 1}  # fmt: skip
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
MESSAGES = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "No."}
# One of each kind of record; some are cut, some have equal responses, some are white space alone.
DATA = {
    "pairs": [PAIR, PAIR | {"rejected": "Light scatters."}, PAIR | {"chosen": " ", "margin": 0.3},
              PAIR | {"prompt": "é" * 60}, PAIR | {"chosen": "long " * 20}],
    "ranked": [RANKED, RANKED | {"prompt": "x", "scores": [1, 1, 1, 1]},
               RANKED | {"prompt": "y", "scores": [4, 3, 2, 1]}],
    "single": [SINGLE, SINGLE | {"label": False}, SINGLE | {"completion": "Hello there. " * 9}],
    "several": [PKU, PKU | {"prompt": "Sort 9 8."}, PKU | {"response_1": "1 2 3"}],
    "conditioned": [PKU, PKU | {"prompt": "Sort 9 8."}, PKU | {"response_1": "1 2 3"}],
    "dialogues": [HH] * 2,
    "messages": [MESSAGES] * 3,
}  # fmt: skip
BOTH = ("better", "safer")
SETTINGS = {
    "single": {"single": "kto"},
    "several": {"preferences": BOTH},
    "conditioned": {"preferences": BOTH, "condition": True},
}


@pytest.fixture
def model(tmp_path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(given: DataSettings, model: Path) -> Data:
    return load_rows(given, AutoTokenizer.from_pretrained(model), model, setup())


def both(given: DataSettings, model: Path, cache: Path, capsys) -> tuple[Data, Data]:
    """The data of a run in memory and from a store, whose printed counts are the same."""
    memory = load(given, model)
    printed = capsys.readouterr().out
    stored = load(replace(given, cache=cache), model)
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("rows  ")) == printed
    return memory, stored


@pytest.mark.parametrize("name", DATA)
def test_data_are_those_of_memory(tmp_path, model, name, capsys, monkeypatch):
    """Rows, counts, what is printed, template, fingerprint, lengths; in chunks of two records."""
    monkeypatch.setattr(store, "CHUNK", 2)
    path = write(tmp_path / f"{name}.jsonl", *DATA[name])
    given = settings(path, **SETTINGS.get(name, {}))
    memory, stored = both(given, model, tmp_path / "cache", capsys)
    assert type(memory.rows) is list
    assert isinstance(stored.rows, StoredRows) and stored.template == memory.template
    assert list(stored.counts.items()) == list(memory.counts.items())
    assert_same_rows(stored.rows, memory.rows)
    assert fingerprint(stored.rows) == fingerprint(memory.rows)
    assert lengths_of(stored.rows).tolist() == lengths_of(memory.rows).tolist()
    assert stored.rows.responses.tolist() == [len(row.responses) for row in memory.rows]
    largest, longest = stored.rows.limits
    assert largest == max(int(part.max()) for row in memory.rows for part in row.responses)
    assert longest == max(row.longest for row in memory.rows)


@pytest.mark.parametrize("name", ["pairs", "conditioned"])
def test_held_out_prompts_are_those_of_memory(tmp_path, model, name, capsys, monkeypatch):
    """Prompts that occur twice; cut responses, of which each side has other counts."""
    monkeypatch.setattr(store, "CHUNK", 7)
    pairs = [{**DATA[name][i % 3], "prompt": f"{i // 2}" * (i % 5 + 1)} for i in range(60)]
    path = write(tmp_path / "a.jsonl", *pairs)
    given = settings(path, eval_share=0.3, max_length=20, seed=3, **SETTINGS.get(name, {}))
    memory, stored = both(given, model, tmp_path / "cache", capsys)
    assert_same_rows(stored.held_out, memory.held_out)
    assert_same_rows(stored.rows, memory.rows)
    assert stored.counts == memory.counts and min(len(memory.rows), len(memory.held_out)) > 5
    assert fingerprint(stored.held_out) == fingerprint(memory.held_out)


def test_templates_of_both_sets_decide_over_the_runs_template(tmp_path, model, capsys):
    first, second = write(tmp_path / "a.jsonl", HH), write(tmp_path / "b.jsonl", PAIR)
    for given in (settings(first, second), settings(first, eval_data=[second])):
        memory, stored = both(given, model, tmp_path / "cache", capsys)
        assert memory.template == stored.template == "auto"
        assert_same_rows(stored.held_out, memory.held_out)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # of both; of each, with --eval_data


def test_data_without_a_pair_are_an_error(tmp_path, model):
    path = write(tmp_path / "a.jsonl", PAIR | {"rejected": PAIR["chosen"]})
    with pytest.raises(RunError, match="--data .*a.jsonl: no pairs are left to train on"):
        load(settings(path, cache=tmp_path / "cache"), model)


def test_slices_read_no_rows_and_are_of_their_rows_alone(tmp_path, model, monkeypatch):
    """Another file with the same pairs has the same hash, unless their order differs."""
    monkeypatch.setattr(store, "CHUNK", 2)
    records = [PAIR | {"prompt": str(i)} for i in range(6)]

    def rows_of(name: str, records: list) -> StoredRows:
        path = write(tmp_path / name, *records)
        return all_rows(opened(model, [path], tmp_path / "cache"))

    rows = rows_of("a.jsonl", records)
    tail = rows[-2:]
    assert [row.name for row in tail] == ["a:5", "a:6"] and tail[-1].name == "a:6"
    assert len(rows[:4]) == 4 and rows[1:4].lengths.tolist() == rows.lengths[1:4].tolist()
    assert tail.fingerprint() == rows_of("b.jsonl", records[-2:]).fingerprint()
    assert tail.fingerprint() != rows_of("c.jsonl", records[:-3:-1]).fingerprint()
    assert tail.fingerprint() != rows.fingerprint()
    monkeypatch.setattr(Store, "row", None)
    rows[2:4].lengths, rows[2:4].responses, rows[2:4].fingerprint()


def test_the_first_row_that_a_model_can_not_take_is_named(tmp_path, model):
    records = [PAIR, PAIR | {"prompt": "longer " * 3}, PAIR | {"prompt": "the longest " * 3}]
    path = write(tmp_path / "a.jsonl", *records)
    rows = all_rows(opened(model, [path], tmp_path / "cache"))

    def check(rows, ids: int, positions: int) -> None:
        policy = Policy(tiny_llama(vocab_size=ids, max_position_embeddings=positions,
                                   bos_token_id=0, eos_token_id=0, pad_token_id=0))  # fmt: skip
        check_fits(policy, rows, "--model M")

    longest = [row.longest for row in rows]
    check(rows, 259, max(longest))
    for part in (rows, list(rows)):  # rows in memory have no limits
        with pytest.raises(RunError, match="a:1: has the token id 258, but --model M knows 258 "):
            check(part, 258, 64)
        name = f"a:{1 + int(np.argmax(longest))}: has {max(longest)} tokens"
        with pytest.raises(RunError, match=f"{name}.*--max_length {max(longest) - 1} or less"):
            check(part, 259, max(longest) - 1)
    check(rows[:1], 259, longest[0])  # the others do not count


def test_small_data_stay_in_memory_and_large_ones_do_not(tmp_path, model, monkeypatch):
    path = write(tmp_path / "a.jsonl", *[PAIR | {"prompt": f"{i}"} for i in range(9)])
    size = Path(path).stat().st_size
    for changes, large, kind in (
        ({}, size + 1, list),
        ({}, size, StoredRows),  # in NANOALIGN_CACHE
        ({"cache": tmp_path / "cache"}, size + 1, StoredRows),
        ({"eval_data": [write(tmp_path / "b.jsonl", PAIR)]}, size + 1, StoredRows),
    ):
        monkeypatch.setattr(rows, "LARGE", large)
        data = load(settings(path, **changes), model)
        assert type(data.rows) is kind and len(data.rows) == 9
