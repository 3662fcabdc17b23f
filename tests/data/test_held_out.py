"""python -m pytest tests/data/test_held_out.py

What a run remembers of its records, and held_out:RUN. No model is loaded for it.
"""

import gzip
import json
import re
from itertools import compress
from pathlib import Path

import numpy as np
import pytest
from stores import read, write

import train_dpo
import train_rm
from nanoalign.data.encoding import DataSettings
from nanoalign.data.held_out import recall
from nanoalign.data.prompts import read_prompts
from nanoalign.data.rows import load_rows
from nanoalign.data.sources import check_sources
from nanoalign.data.split import hold_out, record_digests
from nanoalign.errors import RunError
from nanoalign.files.run_folder import RECORDS
from nanoalign.records import Record
from nanoalign.runs.log import open_run
from nanoalign.weights.folders import load_tokenizer

SHARE = 0.4


def pair(n: int) -> dict:
    return {"prompt": f"p{n // 2}", "chosen": f"c{n}", "rejected": f"r{n}"}


def labelled(n: int) -> dict:
    return {"prompt": f"p{n // 2}", "response_0": f"a{n}", "response_1": f"b{n}",
            "better_response_id": n % 2, "safer_response_id": n % 3 % 2}  # fmt: skip


def ranked(n: int) -> dict:
    return {"prompt": f"p{n // 2}", "responses": ["a", "b", f"c{n}"], "scores": [n % 3, 1, 0]}


def unpaired(n: int) -> dict:
    return {"prompt": f"p{n // 2}", "completion": f"c{n}", "label": bool(n % 3)}


@pytest.fixture
def begin(llama_folder, tmp_path, world, monkeypatch):
    """Begins a run as a script does, in tmp_path/here; then the folder is another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    def begin(*flags: str, script=train_dpo, out: str = "run", model: Path = llama_folder) -> Path:
        monkeypatch.chdir(tmp_path / "here")
        argv = ["--model", str(model), "--out", out, "--template", "raw", *flags]
        args = script.parse_args(argv if "--eval_share" in argv else [*argv, "--eval_share", "0.4"])
        tokenizer = load_tokenizer(llama_folder)
        data = load_rows(DataSettings.of(args), tokenizer, llama_folder, world)
        with open_run(args, world, data, model, 0, meter=None):
            pass
        monkeypatch.chdir(tmp_path / "there")
        return tmp_path / "here" / out

    return begin


BOTH = ("better", "safer")
KINDS = {
    "pairs": (pair, "", {}),
    "ranked": (ranked, "", {}),
    "kto": (unpaired, "--loss kto", {"unpaired": "kto"}),
    "safer": (labelled, "--preference safer", {"preference": "safer"}),
    "conditioned": (labelled, "--preference better safer --condition", {"preference": BOTH}),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_held_out_is_read_again(begin, tmp_path, name):
    """In memory and on disk; with a record that has no row, and one that is there three times."""
    record, flags, options = KINDS[name]
    records = [record(n) for n in range(20)]
    records += [records[19], records[19]]
    same = {"chosen": "s", "rejected": "s", "response_0": "s", "response_1": "s"}
    records = [r | {k: v for k, v in same.items() if k in r} if n % 7 == 1 else r
               for n, r in enumerate(records)]  # fmt: skip
    source = write(tmp_path / "here" / "a.jsonl", *records)
    known = read(source, **options)
    held = hold_out(record_digests(known)[:, 0], SHARE, 0)
    expected = list(compress(known, held))
    assert 6 < len(expected) < 12
    script, found = train_rm if "--condition" in flags else train_dpo, []
    for out, more in (("run", []), ("stored/run", ["--cache", "cache"])):
        argv = ["--data", "a.jsonl", *flags.split(), *more]
        run = begin(*argv, script=script, out=out)
        again = read(f"held_out:{run}", **options)
        assert [each.name for each in again] == [f"held_out:run:{each.name}" for each in expected]
        assert [each.responses for each in again] == [each.responses for each in expected]
        found.append(recall(run))
    for key in found[0]:
        assert np.array_equal(found[0][key], found[1][key]), key
    assert len(read_prompts([f"held_out:{run}"])) == len(expected)


def test_labels_are_those_that_are_read_now(begin, tmp_path):
    write(tmp_path / "here" / "a.jsonl", *map(labelled, range(20)))
    run = begin("--data", "a.jsonl", "--preference", "safer")
    better, safer = (read(f"held_out:{run}", preference=name) for name in BOTH)
    assert [r.name for r in better] == [r.name for r in safer]
    swapped = [b.responses == s.responses[::-1] for b, s in zip(better, safer, strict=True)]
    assert 0 < sum(swapped) < len(swapped)


def test_sources_are_found_from_another_folder(begin, tmp_path):
    """Relative paths, names, an equals sign, two formats, a folder, gzip, the embedded data."""
    here = tmp_path / "here"
    write(here / "a=b.jsonl", *map(pair, range(10)))
    (here / "folder").mkdir()
    write(here / "folder" / "one.jsonl", *map(ranked, range(10, 20)))
    write(here / "folder" / "two.jsonl", *map(labelled, range(20, 30)))
    (here / "c.jsonl.gz").write_bytes(gzip.compress((here / "a=b.jsonl").read_bytes()))
    run = begin("--data", "a=b.jsonl", "x=folder/one.jsonl", "folder", "c.jsonl.gz", "tiny:test")
    found = read(f"mine=held_out:{run}")
    assert {r.subset for r in found} == {"mine"}
    sources = {re.match(r"mine:(.*):\d+$", r.name)[1] for r in found}
    assert sources == {"a=b", "x", "folder/one.jsonl", "folder/two.jsonl", "c", "tiny:test"}
    files = check_sources([f"held_out:{run}"])
    assert run / RECORDS in files and here / "a=b.jsonl" in files


@pytest.mark.parametrize("cache", [False, True])
def test_what_another_run_held_out_is_not_trained_on(begin, tmp_path, capsys, cache):
    """6 pairs, 2 a prompt: one prompt is held out. Other data of --eval_data may be trained on."""
    write(tmp_path / "here" / "a.jsonl", *map(pair, range(6)))
    begin("--data", "a.jsonl")
    first = recall(tmp_path / "here" / "run")
    store = ("--cache", str(tmp_path / "cache")) if cache else ()
    flags = ("--data", "a.jsonl", *store, "--overwrite")
    for source, left_out in (("held_out:run", True), ("a.jsonl", False)):
        capsys.readouterr()
        begin(*flags, "--eval_data", source, out="other")
        count = len(first["held_out"]) if left_out else 6
        what = "are left out of --data" if left_out else "of --data are trained on"
        said = f"shared      {count} records with prompts of --eval_data {what}"
        assert said in capsys.readouterr().out
        found = recall(tmp_path / "here" / "other")
        assert len(found["trained"]) == (len(first["trained"]) if left_out else 6)
        assert np.isin(found["held_out"], first["held_out"]).all() == left_out


def test_a_run_may_hold_out_what_another_one_did(begin, tmp_path):
    """Also after that one was replaced by a run that holds out the same; or its own records."""
    write(tmp_path / "here" / "a.jsonl", *map(pair, range(6)))
    write(tmp_path / "here" / "b.jsonl", *map(pair, range(6, 9)))
    begin("--data", "a.jsonl", "--eval_data", "b.jsonl")
    for out, of in (("second", "held_out:run"), ("run", "x=held_out:second"),
                    ("run", "held_out:run")):  # fmt: skip
        run = begin("--data", "a.jsonl", "--eval_data", of, "--overwrite", out=out)
        found = read(f"held_out:{run}")
        assert [r.responses for r in found] == [(f"c{n}", f"r{n}") for n in (6, 7, 8)]
    names = [f"held_out:run:held_out:run:x:held_out:run:b:{n}" for n in (1, 2, 3)]
    assert [r.name for r in found] == names


# --- data that have changed, runs that have none


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, run: Path, **changes: str) -> None:
    """Changes a record that was held out."""
    lines = lines_of(path)
    _, at = read(f"held_out:{run}")[1].name.rsplit(":", 1)
    lines[int(at) - 1] |= changes
    write(path, *lines)


CHANGES = {
    "another answer": lambda path, run: change(path, run, rejected="other"),
    "a margin": lambda path, run: change(path, run, margin=2),
    "records removed": lambda path, run: write(path, *lines_of(path)[:-9]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_data_that_have_changed_are_one_error(begin, tmp_path, name):
    write(path := tmp_path / "here" / "a.jsonl", *map(pair, range(20)))
    run = begin("--data", "a.jsonl")
    CHANGES[name](path, run)
    with pytest.raises(RunError) as error:
        read(f"held_out:{run}")
    missing = r"\d+" if name == "records removed" else "1"
    assert re.fullmatch(
        rf"data source 'held_out:{run}': {missing} of the 8 records that the run held out are not "
        rf"in {path} any more; restore these data",
        str(error.value),
    )


def test_more_and_reordered_data_change_nothing(begin, tmp_path):
    """A new record of a held-out prompt was not held out; nor was a second copy of one."""
    write(path := tmp_path / "here" / "a.jsonl", *map(pair, range(20)))
    run = begin("--data", "a.jsonl")
    before = sorted(r.responses for r in read(f"held_out:{run}"))
    lines = lines_of(path)
    more = [line | {"chosen": "new"} for line in lines]
    write(path, *lines[::-1], *more, *lines)
    assert sorted(r.responses for r in read(f"held_out:{run}")) == before


def damaged(change):
    def spoil(run: Path) -> None:
        with np.load(run / RECORDS) as file:
            arrays = dict(file)
        np.savez(run / RECORDS, **change(arrays))

    return spoil


FAULTS = {
    "no file": (lambda run: (run / RECORDS).unlink(), "there is no .*records.npz; give the folder"),
    "torn": (lambda run: (run / RECORDS).write_bytes(b"PK"), "records.npz can't be read: "),
    "pickled": (damaged(lambda arrays: arrays | {"sources": np.array([{}], dtype=object)}),
                "can't be read: ValueError: Object arrays cannot be loaded"),
    "another version": (damaged(lambda arrays: arrays | {"format": 2}),
                        "has the format 2 of another version of nanoalign, not 1"),
    "no source": (lambda run: (run.parent / "a.jsonl").unlink(), "a.jsonl' does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_can_not_be_read_is_one_error(begin, tmp_path, name):
    write(tmp_path / "here" / "a.jsonl", *map(pair, range(6)))
    run = begin("--data", "a.jsonl")
    spoil, message = FAULTS[name]
    spoil(run)
    with pytest.raises(RunError, match=message):
        check_sources([f"held_out:{run}"])


def test_a_run_that_held_nothing_out_is_an_error(begin, tmp_path):
    write(tmp_path / "here" / "a.jsonl", *map(pair, range(6)))
    run = begin("--data", "a.jsonl", "--eval_share", "0")
    with pytest.raises(RunError, match=r"that run held nothing out \(--eval_share 0\); give other"):
        check_sources([f"held_out:{run}"])


# --- what was trained on


def test_hashes_tell_records_apart():
    """The prompt; the responses in any order; all, with labels. Names do not count."""
    first = Record("p", ("a", "b"), name="x:1", extra={"margins": [1.0]})
    changes = {
        "none": Record("p", ("a", "b"), name="y:9", extra={"margins": [1.0]}),
        "order": Record("p", ("b", "a"), extra={"margins": [1.0]}),
        "label": Record("p", ("a", "b"), ((1, 0),), extra={"margins": [1.0]}),
        "margin": Record("p", ("a", "b"), extra={"margins": [2.0]}),
        "response": Record("p", ("a", "c"), extra={"margins": [1.0]}),
        "joined": Record("p", ("a\nb",), extra={"margins": [1.0]}),
        "prompt": Record("q", ("a", "b"), extra={"margins": [1.0]}),
    }
    digests = record_digests([first, *changes.values()])
    same = (digests == digests[0])[1:].tolist()
    assert dict(zip(changes, same, strict=True)) == {
        "none": [True, True, True],
        "order": [True, True, False],
        "label": [True, True, False],
        "margin": [True, True, False],
        "response": [True, False, False],
        "joined": [True, False, False],
        "prompt": [False, False, False],
    }


def test_a_run_remembers_what_it_was_trained_on(begin, tmp_path):
    """Not the record that has no row; and what its model was trained on before."""
    a = write(tmp_path / "here" / "a.jsonl", *map(pair, range(12)), pair(12) | {"rejected": "c12"})
    b = write(tmp_path / "here" / "b.jsonl", *map(pair, range(10, 20)))
    first = begin("--data", "a.jsonl", "--eval_share", "0", out="first")
    second = begin("--data", "b.jsonl", "--eval_share", "0", out="second", model=first)
    trained = read(a)[:-1]
    for run, found in ((first, trained), (second, [*trained, *read(b)])):
        digests = record_digests(found)
        assert recall(run)["trained"].tolist() == sorted(set(digests[:, 1].tolist()))
        assert recall(run)["prompts"].tolist() == sorted(set(digests[:, 0].tolist()))
