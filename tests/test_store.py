"""python -m pytest tests/test_store.py"""

import gzip
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer
from ranks import run_ranks
from transformers import AutoTokenizer

from nanoalign import cache
from nanoalign.cache import Encoding, encoded
from nanoalign.data import read_sources
from nanoalign.distributed import run, setup
from nanoalign.errors import RunError
from nanoalign.records import by_preference
from nanoalign.rows import REASONS, check_fits, drop_equal, encode_all, lengths_of

PAIR = {"prompt": "Why is the sky blue?", "chosen": "Light scatters.", "rejected": "It is painted."}
RANKED = {"prompt": "Count.", "responses": ["1 2 3", "3 2", "1", "1"], "scores": [3, 1, 2, 2]}
SINGLE = {"prompt": "Say hello.", "completion": "Hello.", "label": True}
PKU = {"prompt": "Sort 3 1 2.", "response_0": "1 2 3", "response_1": "3 1 2",
       "better_response_id": 0, "safer_response_id": 1}  # fmt: skip
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
MESSAGES = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "No."}
# One of each kind of record; some are cut, some have nothing to teach, some are of white space alone.
DATA = {
    "pairs": [PAIR, PAIR | {"rejected": "Light scatters."}, PAIR | {"chosen": " ", "margin": 0.3},
              PAIR | {"prompt": "é" * 60}, PAIR | {"chosen": "long " * 20}],
    "ranked": [RANKED, RANKED | {"scores": [1, 1, 1, 1]}, RANKED | {"scores": [4, 3, 2, 1]}],
    "single": [SINGLE, SINGLE | {"label": False}, SINGLE | {"completion": "Hello there. " * 9}],
    "conditioned": [PKU, PKU | {"prompt": "Sort 9 8."}, PKU | {"response_1": "1 2 3"}],
    "dialogues": [HH] * 2,
    "messages": [MESSAGES] * 3,
}  # fmt: skip


@pytest.fixture
def model(tmp_path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def encoding(model: Path, *sources: str, **settings) -> Encoding:
    default = {"preferences": ("better",), "unpaired": False, "conditions": (), "template": "auto",
               "max_length": 64, "tokenizer": AutoTokenizer.from_pretrained(model)}  # fmt: skip
    return Encoding(sources=list(sources), model=model, **default | settings)


def same_row(a, b) -> bool:
    parts = [(a.prompt, *a.responses), (b.prompt, *b.responses)]
    return (
        (a.pair_id, a.pairs, len(parts[0])) == (b.pair_id, b.pairs, len(parts[1]))
        and all(map(np.array_equal, *parts))
        and all(part.dtype == np.int32 for part in parts[0])
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is stored


@pytest.mark.parametrize("name", DATA)
def test_stored_rows_and_counts_are_those_of_encode_all(tmp_path, model, name):
    path = write(tmp_path / f"{name}.jsonl", DATA[name])
    names = ("better", "safer") if name == "conditioned" else ("better",)
    conditions = names if name == "conditioned" else ()
    how = encoding(model, path, preferences=names, conditions=conditions, unpaired=True)
    store = encoded(how, str(tmp_path / "cache"), setup())
    examples = read_sources([path], names, unpaired=True)
    if conditions:
        examples = [part for each in examples for part in by_preference(each, conditions)]
    rows, counts = encode_all(examples, how.tokenizer, "auto", 64)
    rows = drop_equal(rows, counts)
    stored = store.rows(store.everything)
    assert len(stored) == len(rows) and all(map(same_row, stored, rows))
    records, pairs, its_counts = store.counts(store.everything)
    assert (records, pairs) == (len(examples), sum(len(e.pairs) for e in examples))
    assert +its_counts == +counts and list(its_counts) == list(REASONS)
    assert stored.lengths.tolist() == lengths_of(rows).tolist() == [len(row) for row in stored]
    sides = [
        [0 if side is None else len(row.responses[side]) for side in pair[:2]]
        for row in rows
        for pair in row.pairs
    ]
    assert stored.pair_lengths().tolist() == sides
    backwards = type(stored)(store, stored.indices[::-1]).pair_lengths().tolist()
    assert Counter(map(tuple, backwards)) == Counter(map(tuple, sides))
    assert store.about["templates"] == ["raw" if name == "dialogues" else "pku"]


def test_nothing_may_be_left_of_the_data(tmp_path, model):
    path = write(tmp_path / "a.jsonl", [PAIR | {"rejected": PAIR["chosen"]}])
    store = encoded(encoding(model, path), str(tmp_path / "cache"), setup())
    assert not store.rows(store.everything)
    assert store.counts(store.everything)[2]["pairs dropped: both responses equal"] == 1


def test_slices_and_fingerprints_are_of_the_rows_alone(tmp_path, model):
    """Another file with the same pairs in the same order has the same hash, another order has not."""
    records = [PAIR | {"prompt": str(i)} for i in range(6)]
    cache_ = str(tmp_path / "cache")

    def rows_of(name: str, records: list):
        store = encoded(encoding(model, write(tmp_path / name, records)), cache_, setup())
        return store.rows(store.everything)

    rows = rows_of("a.jsonl", records)
    tail = rows[-2:]
    assert [row.pair_id for row in tail] == ["a:5", "a:6"] and len(rows[:4]) == 4
    assert tail.fingerprint() == rows_of("b.jsonl", records[-2:]).fingerprint()
    assert tail.fingerprint() != rows_of("c.jsonl", records[:-3:-1]).fingerprint()
    assert tail.fingerprint() != rows.fingerprint()


def test_the_first_row_that_a_model_can_not_take_is_named(tmp_path, model):
    records = [PAIR, PAIR | {"prompt": "longer " * 3}, PAIR | {"prompt": "the longest " * 3}]
    store = encoded(
        encoding(model, write(tmp_path / "a.jsonl", records)), str(tmp_path / "cache"), setup()
    )
    rows = store.rows(store.everything)
    check_fits(rows, 259, 64)
    with pytest.raises(RunError, match="a:1: holds the token id 258"):
        check_fits(rows, 258, 64)
    longest = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    with pytest.raises(RunError, match=f"a:{1 + int(np.argmax(longest))}: has {max(longest)} "):
        check_fits(rows, 259, max(longest) - 1)
    check_fits(rows[:1], 259, longest[0])  # the others do not count


# --- what is held out


def mixed(value: int, seed: int) -> int:
    """SplitMix64, in Python's integers."""
    value = (value + seed * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_held_out_prompts_are_those_of_the_oracle(tmp_path, model, seed):
    """A loop over dictionaries; and: disjoint, whole, a partition, whatever the order of the examples."""
    records = [PAIR | {"prompt": f"{i // 2}", "chosen": f"{i}!"} for i in range(400)]
    cache_ = str(tmp_path / "cache")
    store = encoded(encoding(model, write(tmp_path / "a.jsonl", records)), cache_, setup())
    held = store.hold_out(0.1, seed)
    by_prompt = dict(zip(store.arrays["prompts"].tolist(), records, strict=True))
    first = sorted(by_prompt, key=lambda prompt: mixed(prompt, seed))[:20]
    assert held.tolist() == [prompt in first for prompt in store.arrays["prompts"].tolist()]
    ids = [row.pair_id for mask in (held, ~held) for row in store.rows(mask)]
    assert len(ids) == 400 and set(ids) == {f"a:{n}" for n in range(1, 401)}
    backwards = encoded(
        encoding(model, write(tmp_path / "a.jsonl", records[::-1])), cache_, setup()
    )
    assert backwards.hold_out(0.1, seed).tolist() == held.tolist()[::-1]
    assert store.hold_out(0.1, seed + 1).tolist() != held.tolist()
    assert not store.hold_out(0.0, seed).any()
    assert store.hold_out(0.001, seed).sum() == 2  # one prompt, which has two pairs
    assert store.hold_out(0.9999, seed).sum() == 398  # one prompt stays


# --- the cache


def encode_anywhere(model: str, folder: str, chunk: int, *sources: str) -> None:
    cache.CHUNK = chunk
    encoded(encoding(Path(model), *sources), folder, setup())


def test_the_store_is_the_same_by_any_number_of_ranks_and_chunks(tmp_path, model):
    """To the byte; two sources, of which a gzipped one, meet within a chunk."""
    records = [PAIR | {"prompt": f"{i} " * (i % 7 + 1), "chosen": f"{i}"} for i in range(40)]
    first = write(tmp_path / "a.jsonl", records[:25])
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(gzip.compress(Path(write(tmp_path / "c.jsonl", records[25:])).read_bytes()))
    stores = []
    for ranks, chunk in ((1, 2048), (2, 3), (1, 3), (3, 16)):
        folder = tmp_path / f"cache_{ranks}_{chunk}"
        outcome = run_ranks(
            ranks, encode_anywhere, str(model), str(folder), chunk, first, str(second)
        )
        assert outcome.codes == [0] * ranks, outcome.stderr
        (store,) = folder.iterdir()  # and nothing unfinished
        assert f"s on {ranks} rank" in outcome.stdout
        stores.append((store.name, contents(store)))
    assert all(store == stores[0] for store in stores)


def test_a_second_run_reads_what_the_first_one_encoded(tmp_path, model, monkeypatch, capsys):
    how = encoding(model, write(tmp_path / "a.jsonl", [PAIR] * 5))
    first = encoded(how, str(tmp_path / "cache"), setup())
    assert "rows        encoded in " in capsys.readouterr().out
    monkeypatch.setattr(cache, "encode_part", None)
    monkeypatch.setattr(cache, "stream_examples", None)
    second = encoded(how, str(tmp_path / "cache"), setup())
    assert "rows        read from " in capsys.readouterr().out
    rows = [store.rows(store.everything) for store in (first, second)]
    assert all(map(same_row, *rows))


def test_all_that_decides_is_in_the_key(tmp_path, model, monkeypatch):
    path = write(tmp_path / "a.jsonl", [PAIR] * 3)
    keys = [encoding(model, path).key()[0]]
    shutil.copy(path, tmp_path / "elsewhere.jsonl")
    assert encoding(model, f"a={tmp_path / 'elsewhere.jsonl'}").key()[0] == keys[0]
    for change in (
        {"max_length": 63},
        {"template": "raw"},
        {"preferences": ("safer",)},
        {"unpaired": True},
        {"conditions": ("better",)},
    ):
        keys.append(encoding(model, path, **change).key()[0])
    keys.append(encoding(model, path, path.replace("a.jsonl", "elsewhere.jsonl")).key()[0])
    keys.append(encoding(model, f"named={path}").key()[0])  # pair_ids begin with the name
    keys += [encoding(model, name).key()[0] for name in ("tiny", "tiny:tiny-a", "tiny:tiny-b")]
    with monkeypatch.context() as patched:
        patched.setattr(cache.tokenizers, "__version__", "0")
        keys.append(encoding(model, path).key()[0])
    write(tmp_path / "a.jsonl", [PAIR] * 2 + [PAIR | {"chosen": "other"}])
    keys.append(encoding(model, path).key()[0])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<bos>"}))
    keys.append(encoding(model, path).key()[0])
    (model / "chat_template.jinja").write_text("{{ messages }}")
    keys.append(encoding(model, path).key()[0])
    assert len(set(keys)) == len(keys)


def killed(model: str, folder: str, source: str) -> None:
    cache.CHUNK = 3
    cache.join = lambda *_: os._exit(9)
    encoded(encoding(Path(model), source), folder, setup())


def test_what_a_killed_encoding_leaves_is_never_read_and_removed_in_time(tmp_path, model):
    path, folder = write(tmp_path / "a.jsonl", [PAIR] * 10), tmp_path / "cache"
    assert run_ranks(1, killed, str(model), str(folder), path).codes == [9]
    (left,) = folder.iterdir()
    assert len(list(left.glob("*.npz"))) == 4
    store = encoded(encoding(model, path), str(folder), setup())
    assert len(store.rows(store.everything)) == 10 and left.exists()  # it might still be at work
    os.utime(left, (0, time.time() - cache.STALE - 1))
    encoded(encoding(model, path, max_length=50), str(folder), setup())
    assert not left.exists()


def test_of_two_that_encode_the_same_the_first_to_end_is_taken(tmp_path, model, monkeypatch):
    how = encoding(model, write(tmp_path / "a.jsonl", [PAIR] * 4))
    inner, join = [], cache.join

    def overtaken(*args):
        join(*args)
        monkeypatch.setattr(cache, "join", join)
        inner.append(encoded(how, str(tmp_path / "cache"), setup()))

    monkeypatch.setattr(cache, "join", overtaken)
    store = encoded(how, str(tmp_path / "cache"), setup())
    assert len(store.rows(store.everything)) == 4 and len(inner) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def main_with(model: str, folder: str, source: str) -> None:
    run(lambda: encode_anywhere(model, folder, 3, source))


@pytest.mark.parametrize("line", [2, 5, 29])
def test_a_bad_line_ends_all_ranks_with_one_error(tmp_path, model, line):
    """Whichever rank meets it: records 4 to 6 are the second rank's."""
    lines = [json.dumps(PAIR)] * 30
    lines[line - 1] = '{"prompt": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    start = time.monotonic()
    outcome = run_ranks(
        2, main_with, str(model), str(tmp_path / "cache"), str(tmp_path / "a.jsonl")
    )
    assert time.monotonic() - start < 30
    assert outcome.codes == [1, 1]
    said = [text for text in outcome.stderr.splitlines() if text.startswith("error")]
    assert len(said) == 1 and f"a.jsonl:{line}: not valid JSON" in said[0], outcome.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_can_not_be_written_says_what_to_give(tmp_path, model):
    (tmp_path / "file").write_text("")
    how = encoding(model, write(tmp_path / "a.jsonl", [PAIR]))
    with pytest.raises(RunError, match="can't be written: .*; give another with --cache"):
        encoded(how, str(tmp_path / "file"), setup())


def test_a_damaged_store_is_an_error_that_names_it(tmp_path, model):
    how = encoding(model, write(tmp_path / "a.jsonl", [PAIR] * 9))
    encoded(how, str(tmp_path / "cache"), setup())
    (store,) = (tmp_path / "cache").iterdir()
    (store / "tokens.npy").write_bytes((store / "tokens.npy").read_bytes()[:-8])
    with pytest.raises(RunError, match=f"{store.name}: the encoded data can't be read: .*remove"):
        encoded(how, str(tmp_path / "cache"), setup())


def test_the_cache_is_where_flag_or_environment_say(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("NANOALIGN_CACHE", "/own")
    assert cache.cache_folder("flag") == Path("flag")
    assert cache.cache_folder(None) == Path("/own")
    monkeypatch.delenv("NANOALIGN_CACHE")
    assert cache.cache_folder(None) == Path("/xdg/nanoalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder(None) == Path.home() / ".cache" / "nanoalign"


# --- memory


def growth(model: str, folder: str, source: str, whole: bool) -> int:
    """By how many bytes a process grows at most that encodes a source, chunk by chunk or as a whole."""
    how, world = encoding(Path(model), source), setup()
    cache.CHUNK = 256

    def status(name: str) -> int:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    if whole:
        rows, counts = encode_all(read_sources([source]), how.tokenizer)
        rows = drop_equal(rows, counts)
    else:
        store = encoded(how, folder, world)
        rows = store.rows(store.everything)
    assert len(rows) == 10_000
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_encoding_takes_far_less_memory_than_all_rows(tmp_path, model):
    records = [PAIR | {"prompt": f"{i} why?", "chosen": f"{i}"} for i in range(10_000)]
    where = str(model), str(tmp_path / "cache"), write(tmp_path / "a.jsonl", records)
    outcomes = [run_ranks(1, growth, *where, whole) for whole in (False, True)]
    chunked, whole = (outcome.results[0] for outcome in outcomes)
    assert chunked < whole / 3, (chunked, whole)
