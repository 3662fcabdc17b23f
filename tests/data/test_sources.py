"""python -m pytest tests/data/test_sources.py"""

import gzip
import json
import sys
from pathlib import Path

import pytest
from stores import read, write

from nanoalign.data import sources
from nanoalign.data.sources import check_sources, parse_source
from nanoalign.errors import RunError
from nanoalign.files.text import named
from nanoalign.tiny import world

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


# --- kinds of files


def test_arrays_and_compressed_files_read_the_same(tmp_path):
    records = [PAIR, PAIR | {"chosen": "other, with a \u2028 line separator"}]
    expected = [record.responses for record in read(write(tmp_path / "a.jsonl", *records))]
    assert len(expected) == 2
    array = write(tmp_path / "b.json", text=json.dumps(records, indent=2, ensure_ascii=False))
    line = write(tmp_path / "c.json", text="\n\n" + json.dumps(records))
    named = write(tmp_path / "f.json", text=json.dumps({"data": records}, indent=1))
    on_a_line = write(tmp_path / "g.json", text=json.dumps({"data": records}))
    compressed = tmp_path / "d.jsonl.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    marked = tmp_path / "e.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())  # a byte order mark
    for path in (array, line, named, on_a_line, str(compressed), str(marked)):
        assert [record.responses for record in read(path)] == expected


def test_records_are_named_by_their_lines(tmp_path):
    """Those of a list by their number in it, whether or not they are on one line."""
    text = f"\n{json.dumps(PAIR)}\n\n{json.dumps(PAIR)}\n"
    assert [r.name for r in read(write(tmp_path / "a.jsonl", text=text))] == ["a:2", "a:4"]
    for indent in (None, 1):
        array = write(tmp_path / "b.json", text=json.dumps([PAIR, PAIR, PAIR], indent=indent))
        assert [record.name for record in read(array)] == ["b:1", "b:2", "b:3"]


def test_parquet_reads_the_same(tmp_path):
    reason = "pyarrow is not installed, so .parquet is not read"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)
    parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR]), tmp_path / "a.parquet")
    records = read(str(tmp_path / "a.parquet"))
    assert [(r.name, r.responses) for r in records] == [("a:1", ("c", "r")), ("a:2", ("c", "r"))]


BAD = {
    "broken JSON": (
        json.dumps(PAIR) + '\n{"prompt": \n',
        r"a\.jsonl:2: not valid JSON: .*column 12",
    ),
    "broken array": (f"[\n{json.dumps(PAIR)},\n{{'a': }}\n]", r"a\.jsonl:3: not valid JSON"),
    "two arrays": (f"[{json.dumps(PAIR)}]\n[]", ":2: not valid JSON: Extra data"),
    "many digits": (f"[{'1' * 5000}]", "a.jsonl: not valid JSON: Exceeds the limit"),
    "wrong record": (f"[{json.dumps(PAIR)},\n3]", "a.jsonl:record 2: expected a JSON object"),
    "several lines": (json.dumps(PAIR, indent=1), "a.jsonl: one JSON object over several lines;"),
    "several records": (f"{json.dumps(PAIR, indent=1)}\n" * 2, ":6: not valid JSON: Extra data"),
    "images": (json.dumps(PAIR | {"images": ["a.png"]}), "a.jsonl:1: a record with images, which"),
    "empty array": ("[]", "has no records; expected prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_errors_with_file_and_line(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(RunError, match=message):
        read(write(tmp_path / "a.jsonl", text=content))


def test_files_that_can_not_be_read_are_errors(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "text.tsv").write_text("a,b")
    (tmp_path / "not.json.gz").write_text("plain")
    whole = gzip.compress(json.dumps(PAIR).encode() * 999)
    (tmp_path / "torn.json.gz").write_bytes(whole[:-20])
    (tmp_path / "twice.json.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "empty").mkdir()
    for path, message in {
        "missing.jsonl": "does not exist; give a path, .* tiny:test",
        "latin.jsonl": "not a readable UTF-8",
        "not.json.gz": "not a readable",
        "torn.json.gz": "not a readable",
        "twice.json.gz": "not a readable UTF-8 .*; it is compressed twice",
        "text.tsv": "unknown kind of file; expected one of .jsonl",
        "empty": "the folder has no .jsonl",
    }.items():
        with pytest.raises(RunError, match=message):
            read(str(tmp_path / path))


# --- the grammar


@pytest.mark.parametrize(
    ("spec", "name", "absolute"),
    [
        ("folder/pairs.jsonl.gz", "pairs", "{}/folder/pairs.jsonl.gz"),
        ("mine=folder/pairs.jsonl*0.3", "mine", "{}/folder/pairs.jsonl*0.3"),
        ("folder/", "folder", "{}/folder"),
        ("tiny:test", "tiny:test", "tiny:test"),
        ("b=tiny:tiny-b", "b", "tiny:tiny-b"),
        ("held_out:runs/a=b", "held_out:a=b", "held_out:{}/runs/a=b"),
        ("b=held_out:runs/rm", "b", "held_out:{}/runs/rm"),
        ("hf://datasets/o/n/a.jsonl@v2", "a", "hf://datasets/o/n/a.jsonl@v2"),
    ],
)
def test_names_and_places_that_are_known_in_any_folder(spec, name, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = parse_source(spec)
    assert (source.name, source.absolute) == (name, absolute.format(tmp_path))


@pytest.mark.parametrize(
    ("spec", "name", "parts"),
    [
        ("hf://datasets/o/n/data/a.jsonl", "a", ("o/n", "data/a.jsonl", None, None)),
        ("x=hf://datasets/o/n/a.json@v1.0", "x", ("o/n", "a.json", "v1.0", None)),
        ("hf://datasets/o/n/data:train", "data", ("o/n", "data", None, "train")),
        ("hf://datasets/o/n/data@refs/convert/parquet:test", "data",
         ("o/n", "data", "refs/convert/parquet", "test")),
    ],
)  # fmt: skip
def test_places_on_the_hub(spec, name, parts):
    source = parse_source(spec)
    assert source.name == name
    found = sources.ON_HUB.fullmatch(source.place)
    assert found.group("repo", "path", "revision", "split") == parts
    of_one_file = isinstance(source, sources.FileOnHub)
    assert of_one_file == bool(Path(parts[1]).suffix)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("=a.jsonl", "expected NAME=SOURCE"),
        ("a=", "expected NAME=SOURCE"),
        ("hf://datasets/owner", r"expected hf://datasets/OWNER/NAME\[/PATH\]\[@REVISION\]\[:SPLIT"),
        ("hf://datasets/o/n/data:", "expected hf://datasets/OWNER/NAME"),
        ("held_out:runs/none", "'held_out:runs/none': there is no runs/none/records.npz; give the"),
        ("tiny:tiny-x", "'tiny:tiny-x' does not exist; .* tiny:test:tiny-c"),
    ],
)
def test_other_specifications_are_errors(spec, message):
    with pytest.raises(RunError, match=message):
        check_sources([spec])


def test_names_that_are_no_text_become_text(tmp_path):
    """Names of files are bytes: records are named so that files in UTF-8 can hold it."""
    write(tmp_path / "e.jsonl", PAIR)
    (record,) = read(write(tmp_path / "d\udcff.jsonl", PAIR))
    assert record.name == "d?:1" and record.subset == "d?"
    names = sorted(record.name for record in read(f"all={tmp_path}"))
    assert names == ["all/d?.jsonl:1", "all/e.jsonl:1"]
    assert named(["a.jsonl", "d\udcff.jsonl"]) == r"a.jsonl 'd\udcff.jsonl'"


def test_a_row_of_a_table_keeps_its_format_where_a_column_is_null(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path := tmp_path / "a.parquet")
    first, second = read(str(path), unpaired="sft")
    assert first.extra == second.extra == {"desirable": [True]}
    rows = [PAIR, PAIR | {"rejected": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(RunError, match="a.parquet:2: the response 2 of 2, .* found NoneType"):
        read(str(path))


def test_names_keep_sources_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR)
    named = [f"x={path}", f"y={path}"]
    assert check_sources(named) == [Path(path)] * 2
    assert [(r.name, r.subset) for r in read(*named)] == [("x:1", "x"), ("y:1", "y")]
    with pytest.raises(RunError, match="two data sources are named 'a'; write A=SOURCE B=SOURCE"):
        check_sources([path, path])


def test_the_files_of_a_folder_are_read_in_order(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, prompt in (("b.jsonl", "2"), ("a.jsonl", "1"), ("notes.txt", "")):
        write(folder / name, PAIR | {"prompt": prompt})
    records = read(str(folder))
    assert [(r.prompt, r.name, r.subset) for r in records] == [
        ("1", "pairs/a.jsonl:1", "pairs"), ("2", "pairs/b.jsonl:1", "pairs")]  # fmt: skip
    (folder / "b.jsonl").unlink()
    assert [record.name for record in read(f"x={folder}")] == ["x:1"]


# --- embedded data


def test_embedded_data_of_one_assistant():
    """A pair for every prompt of the split; the files have every third of them."""
    prompts = world.split_prompts()
    in_file = read("tiny:test")
    for i, name in enumerate(sources.SOURCES):
        records = read(f"tiny:test:{name}")
        assert [record.prompt for record in records] == prompts["test"]
        assert [(r.prompt, r.responses) for r in records[i::3]] == [
            (r.prompt, r.responses) for r in in_file[i::3]
        ]
        assert records[0].name == f"tiny:test:{name}:1"
    assert [record.prompt for record in read("tiny:tiny-b")] == prompts["train"]
    assert tuple(world.SOURCES) == sources.SOURCES


def test_embedded_test_data_are_held_out_of_embedded_training_data():
    assert sources.test_of("tiny") == "tiny:test"
    assert sources.test_of("tiny:tiny-b") == "tiny:test:tiny-b"
    assert sources.test_of("tiny:7:tiny-b") == "tiny:test:7:tiny-b"
    for place in ("tiny:test", "tiny:test:7", "tiny:tiny-d", "tiny*0.5", "tiny:7:test", "a.jsonl"):
        assert sources.test_of(place) is None
    assert check_sources(["tiny", "tiny:test"]) == [world.TRAIN, world.TEST]


def test_a_seed_makes_another_world_whose_training_and_test_prompts_differ():
    """The grammar: tiny[:test][:SEED][:ASSISTANT]."""
    train, test = read("tiny:7"), read("tiny:test:7")
    assert [len(train), len(test)] == [3000, 600] and train[0].name == "tiny:7:1"
    of_train, of_test = ({record.prompt for record in records} for records in (train, test))
    assert not of_train & of_test and all(prompt.endswith(" (7)") for prompt in of_train | of_test)
    assert [r.responses for r in read("tiny:test:7:tiny-b")[1::3]] == [
        r.responses for r in test[1::3]
    ]
    assert {record.prompt for record in read("tiny:test:8")}.isdisjoint(of_test)
    with pytest.raises(RunError, match="'tiny:7:test' does not exist; give a path"):
        read("tiny:7:test")


# --- tables


def test_csv_reads_the_same(tmp_path):
    """Cells may have line ends and quotes; what is no text is JSON where it parses."""
    path = tmp_path / "a.csv"
    text = 'prompt,chosen,rejected,margin\np,"two\nlines, ""quoted""",r,2.5\n12,true,[1],1\n'
    path.write_text(text, newline="")
    first, second = read(str(path))
    assert (first.name, first.responses) == ("a:3", ('two\nlines, "quoted"', "r"))
    assert first.extra == {"margins": [2.5]}
    assert (second.prompt, second.responses) == ("12", ("true", "[1]"))
    path.write_text("prompt,completion,label\np,c,True\n")
    (record,) = read(str(path), unpaired="kto")
    assert record.extra == {"desirable": [True]}
    path.write_text("prompt,chosen,rejected\np,c\n")
    with pytest.raises(RunError, match="a.csv:2: expected as many cells as keys: prompt, chosen"):
        read(str(path))


def test_a_folder_that_datasets_saved(tmp_path):
    """Rows in their order, without the keys that null stands for; its files are those of a key."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [PAIR | {"margin": None}, PAIR | {"prompt": "2", "margin": 2.0}]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    first, second = read(str(tmp_path / "one"))
    assert (first.name, first.prompt, first.extra) == ("one:1", "p", {"margins": [1.0]})
    assert (second.name, second.prompt, second.extra) == ("one:2", "2", {"margins": [2.0]})
    files = check_sources([str(tmp_path / "one")])
    assert files == sorted((tmp_path / "one").glob("*.arrow")) and len(files) == 2
    assert [record.name for record in read(str(files[1]))] == ["data-00001-of-00002:1"]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "many")
    with pytest.raises(RunError, match="many' has the splits train, test; give one: .*many:train$"):
        read(str(tmp_path / "many"))
    assert len(read(str(tmp_path / "many/test"))) == len(read(f"{tmp_path}/many:test")) == 2
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(RunError, match="one': not a readable data set of Dataset.save_to_disk"):
        read(str(tmp_path / "one"))


def test_what_the_datasets_library_reads_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.arrow").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for place in (tmp_path / "a.arrow", tmp_path / "saved", "hf://datasets/o/n:train"):
        with pytest.raises(RunError, match=rf"'{place}': .* needs .*; pip install datasets$"):
            read(str(place))


def test_a_split_of_a_folder(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "my_test.jsonl", "latest.jsonl"):
        write(tmp_path / name, PAIR | {"prompt": name})
    assert [r.prompt for r in read(f"{tmp_path}:train")] == ["train-0.jsonl", "train-1.jsonl"]
    assert [r.prompt for r in read(f"x={tmp_path}:test")] == ["my_test.jsonl"]
    with pytest.raises(RunError, match=f"'{tmp_path}:dev': the folder has no files of 'dev'"):
        read(f"{tmp_path}:dev")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_that_is_none_is_one_error(tmp_path, suffix):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / f"a{suffix}"
    path.write_text("no table")
    with pytest.raises(RunError, match=rf"a\{suffix}: not a readable \{suffix} file"):
        read(str(path))


# --- shares


def test_a_share_of_a_source_is_always_the_same_records(tmp_path):
    path = write(tmp_path / "a.jsonl", *(PAIR | {"prompt": str(n)} for n in range(400)))
    chosen = [record.prompt for record in read(f"{path}*0.3")]
    assert 80 <= len(chosen) <= 160  # 120 are expected; the standard deviation is 9.2
    assert chosen == sorted(set(chosen), key=int) == [r.prompt for r in read(f"x={path}*0.3")]
    assert {r.subset for r in read(f"x={path}*0.3", "tiny:test*0.1")} == {"x", "tiny:test"}
    for share in ("0", "1", "2", "x", ""):
        with pytest.raises(RunError, match=r"expected SOURCE\*SHARE, a number such as 0.3"):
            read(f"{path}*{share}")
