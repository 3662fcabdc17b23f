"""python -m pytest tests/data/test_store.py how a store is made"""

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from processes import run_ranks
from stores import (
    PAIR,
    all_rows,
    assert_same_rows,
    encoding,
    opened,
    settings,
    write,
)

from nanoalign.data import cache, store
from nanoalign.data.cache import cache_folder
from nanoalign.data.rows import load_rows
from nanoalign.data.store import Store
from nanoalign.distributed import run, setup
from nanoalign.errors import RunError
from nanoalign.ranks.report import report


@pytest.fixture
def model(tmp_path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def encode_anywhere(model: str, folder: str, chunk: int, *sources: str) -> None:
    store.CHUNK = chunk
    opened(Path(model), list(sources), Path(folder))


def test_the_rows_are_the_same_by_any_number_of_ranks_and_chunks(tmp_path, model):
    """And the files, to the byte; a chunk has records of two sources."""
    records = [PAIR | {"prompt": f"{i} " * (i % 7 + 1), "chosen": f"{i}"} for i in range(40)]
    sources = write(tmp_path / "a.jsonl", *records[:25]), write(tmp_path / "b.jsonl", *records[25:])
    found = []
    for ranks, chunk in ((1, 2048), (1, 3), (2, 3), (3, 3)):
        folder = tmp_path / f"cache_{ranks}_{chunk}"
        outcome = run_ranks(ranks, encode_anywhere, str(model), str(folder), chunk, *sources)
        assert outcome.codes == [0] * ranks, outcome.stderr
        assert f" s on {ranks} rank" in outcome.stdout
        (path,) = folder.iterdir()  # and nothing unfinished
        found.append((path.name, {file.name: file.read_bytes() for file in path.iterdir()}))
    assert found[0] == found[1] == found[2] == found[3]
    rows = all_rows(Store(path))
    assert [row.name for row in rows] == [*(f"a:{n}" for n in range(1, 26)),
                                          *(f"b:{n}" for n in range(1, 16))]  # fmt: skip


def test_a_second_run_reads_what_the_first_one_encoded(tmp_path, model, monkeypatch, capsys):
    sources = [write(tmp_path / "a.jsonl", *[PAIR] * 5)]
    first = opened(model, sources, tmp_path / "cache")
    assert "rows        encoded in " in capsys.readouterr().out
    monkeypatch.setattr(store, "write_chunks", None)
    second = opened(model, sources, tmp_path / "cache")
    assert "rows        read from " in capsys.readouterr().out
    assert_same_rows(all_rows(first), all_rows(second))


def test_all_that_decides_is_in_the_key(tmp_path, model, monkeypatch):
    path = write(tmp_path / "a.jsonl", *[PAIR] * 3)

    def key(*sources: str, **changes) -> str:
        return store.key(encoding(model, **changes), model, sources or [path])

    keys = [key()]
    shutil.copy(path, tmp_path / "elsewhere.jsonl")
    assert key() == keys[0]
    both = ("better", "safer")
    keys += [key(max_length=63), key(template="raw"), key(single="kto"), key(preferences=both),
             key(preferences=both, condition=True), key(keys=("prompt=question",))]  # fmt: skip
    other = str(tmp_path / "elsewhere.jsonl")
    keys += [key(path, other), key(other, path), key(f"named={path}")]  # names begin with it
    keys += [key(name) for name in ("tiny", "tiny:test", "tiny:tiny-a", "x=tiny:tiny-a")]
    keys.append(key("x=tiny:tiny-b"))
    (tmp_path / "folder").mkdir()
    for name in ("1.jsonl", "2.jsonl", "3.jsonl"):
        shutil.copy(path, tmp_path / "folder" / name)
        keys.append(key(f"a={tmp_path / 'folder'}"))
    for name in ("tokenizers.__version__", "transformers.__version__", "FORMAT"):
        with monkeypatch.context() as patched:
            patched.setattr(f"nanoalign.data.store.{name}", "0")
            keys.append(key())
    write(tmp_path / "a.jsonl", PAIR, PAIR, PAIR | {"chosen": "other"})
    keys.append(key())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<bos>"}))
    keys.append(key())
    (model / "chat_template.jinja").write_text("{{ messages }}")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_code_that_encodes_is_in_the_key(tmp_path, model, monkeypatch):
    folder = Path(store.nanoalign.__file__).parent
    code = [path.relative_to(folder) for each in store.CODE for path in folder.glob(each)]
    assert all(any(folder.glob(each)) for each in store.CODE) and len(code) >= 20
    shutil.copytree(folder, tmp_path / "nanoalign", ignore=shutil.ignore_patterns("__pycache__"))
    path = write(tmp_path / "a.jsonl", PAIR)
    keys = [store.key(encoding(model), model, [path])]
    monkeypatch.setattr(store.nanoalign, "__file__", str(tmp_path / "nanoalign" / "__init__.py"))
    assert store.key(encoding(model), model, [path]) == keys[0]
    for name in code:
        with (tmp_path / "nanoalign" / name).open("a") as file:
            file.write("# changed\n")
        keys.append(store.key(encoding(model), model, [path]))
    assert len(set(keys)) == len(keys)


def killed(model: str, folder: str, source: str) -> None:
    store.CHUNK = 3
    store.join = lambda folder: os._exit(9)
    opened(Path(model), [source], Path(folder))


def test_what_a_killed_run_leaves_is_never_read_and_removed_in_time(tmp_path, model):
    path, folder = write(tmp_path / "a.jsonl", *[PAIR] * 10), tmp_path / "cache"
    assert run_ranks(1, killed, str(model), str(folder), path).codes == [9]
    (left,) = folder.iterdir()
    assert len(list(left.glob("*.npz"))) == 4
    found = opened(model, [path], folder)
    assert len(all_rows(found)) == 10 and left.exists()  # it might still be at work
    os.utime(left, (0, time.time() - cache.STALE - 1))
    opened(model, [path], folder, max_length=50)
    assert not left.exists() and len(list(folder.iterdir())) == 2


def test_of_two_that_encode_the_same_the_first_to_end_is_taken(tmp_path, model, monkeypatch):
    sources, folder = [write(tmp_path / "a.jsonl", *[PAIR] * 4)], tmp_path / "cache"
    inner, join = [], store.join

    def overtaken(unfinished: Path) -> None:
        monkeypatch.setattr(store, "join", join)
        inner.append(opened(model, sources, folder))
        join(unfinished)

    monkeypatch.setattr(store, "join", overtaken)
    found = opened(model, sources, folder)
    assert len(all_rows(found)) == 4 and len(inner) == 1
    assert len(list(folder.iterdir())) == 1


# --- errors


def main_with(model: str, folder: str, source: str) -> None:
    run(lambda: encode_anywhere(model, folder, 3, source), report)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "a.jsonl:5: the prompt is empty"),
        ([{"role": "cat", "content": "x"}], "a:5: --template"),
    ],
)
def test_a_bad_record_ends_all_ranks_with_one_error(tmp_path, model, prompt, message):
    """One that no rank can read, and one that the second rank alone tries to encode."""
    records = [PAIR] * 30
    records[4] = PAIR | {"prompt": prompt}
    source = write(tmp_path / "a.jsonl", *records)
    outcome = run_ranks(2, main_with, str(model), str(tmp_path / "cache"), source)
    assert outcome.codes == [1, 1]
    errors = [text for text in outcome.stderr.splitlines() if text.startswith("error")]
    assert len(errors) == 1 and message in errors[0], outcome.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_can_not_be_written_is_an_error(tmp_path, model):
    (tmp_path / "file").write_text("")
    sources = [write(tmp_path / "a.jsonl", PAIR)]
    with pytest.raises(RunError, match="file' can't be written: .*; give another --cache"):
        opened(model, sources, tmp_path / "file")


@pytest.mark.parametrize("name", ["rows.bin", "kept.npy", "checksums.json"])
def test_a_damaged_store_is_an_error_of_one_line_that_names_it(tmp_path, model, name):
    sources = [write(tmp_path / "a.jsonl", *[PAIR] * 9)]
    opened(model, sources, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    for damage, problem in (
        (lambda path: path.write_bytes(content[:-8]), "is (not as it was written|damaged)"),
        (lambda path: path.unlink(), "is missing"),
    ):
        damage(folder / name)
        message = rf"^the encoded data in {folder} are damaged: {name} {problem}.*; remove this f"
        with pytest.raises(RunError, match=message):
            opened(model, sources, tmp_path / "cache")


# --- memory


def growth(model: str, folder: str, source: str, whole: bool) -> int:
    """By how many bytes a process grows at most that encodes a source, in chunks or as a whole."""
    store.CHUNK = 256
    how, world = encoding(Path(model)), setup()

    def status(name: str) -> int:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    given = settings(source, cache=None if whole else folder)
    data = load_rows(given, how.tokenizer, Path(model), world)
    assert len(data.rows) == 10_000
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux")
def test_encoding_takes_far_less_memory_than_all_rows(tmp_path, model):
    records = [PAIR | {"prompt": f"{i} why?", "chosen": f"{i}"} for i in range(10_000)]
    where = str(model), str(tmp_path / "cache"), write(tmp_path / "a.jsonl", *records)
    outcomes = [run_ranks(1, growth, *where, whole) for whole in (False, True)]
    assert [outcome.codes for outcome in outcomes] == [[0], [0]], outcomes
    chunked, whole = (outcome.results[0] for outcome in outcomes)
    assert chunked < whole / 3, (chunked, whole)


# --- where data are kept, and who can read them ---------------------------------------------------


def modes(folder: Path) -> dict[str, str]:
    """The permissions of all folders below one, by their relative paths."""
    found = sorted(path for path in folder.rglob("*") if path.is_dir())
    return {str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode)) for path in found}


@pytest.fixture
def usual(tmp_path):
    """The usual umask, 022, and a folder that was there before."""
    before = os.umask(0o022)
    (tmp_path / "there").mkdir()
    yield tmp_path / "there"
    os.umask(before)


def test_encoded_data_are_their_owner_s_alone(usual, llama_folder, tmp_path):
    path = write(tmp_path / "pairs.jsonl", *[PAIR | {"prompt": f"{n}?"} for n in range(4)])
    opened(llama_folder, [path], usual / "a" / "cache")
    (store,) = (usual / "a" / "cache").iterdir()
    assert [*modes(usual)] == ["a", "a/cache", f"a/cache/{store.name}"]
    assert set(modes(usual).values()) == {"0o700"}
    assert modes(tmp_path)["there"] == "0o755"  # as it was


def test_the_cache_is_where_flag_or_environment_put_it(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("NANOALIGN_CACHE", "/own")
    assert cache_folder("flag") == Path("flag")
    assert cache_folder(None) == Path("/own")
    monkeypatch.delenv("NANOALIGN_CACHE")
    assert cache_folder(None) == Path("/xdg/nanoalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "nanoalign"
