"""python -m pytest tests/data/test_sizes.py

Files that are small, or look so, and records that are not.
"""

import gzip
import json
import random
import struct
import tracemalloc

import pytest
from stores import PAIR, read

from nanoalign.data import readers
from nanoalign.data import table_files as tables
from nanoalign.errors import RunError

LARGEST = 2**16  # of a record, in these tests
LONG = "x" * (LARGEST + 1)
TOO_LARGE = "a record of more than 65,536 characters; shorten or remove it"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (tables, readers):
        monkeypatch.setattr(module, "LARGEST", LARGEST)
    monkeypatch.setattr(readers, "LARGEST_LIST", 8 * LARGEST)
    monkeypatch.setattr(tables, "BATCH_BYTES", 16 * LARGEST)


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def refused(path, content: bytes) -> str:
    """The error of a file, which takes at most 4 MB of Python's memory to find."""
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(RunError) as caught:
        read(str(path))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**22, most
    return str(caught.value).removeprefix(str(path.parent))


TORN = b'{"prompt": "' + b"x" * 2**24  # a line that never ends


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", lines(PAIR, PAIR | {"chosen": LONG}), "/a.jsonl:2"),
        ("a.jsonl", lines(PAIR) + TORN, "/a.jsonl:2"),
        ("a.jsonl.gz", gzip.compress(lines(PAIR, PAIR) + TORN), "/a.jsonl.gz:3"),
        ("a.json", json.dumps([PAIR, PAIR | {"chosen": LONG}]).encode(), "/a.json:record 2"),
        ("a.csv", b"prompt,chosen,rejected\np,c,r\np,c," + b"x" * 2**24 + b"\n", "/a.csv:3"),
        ("a.csv", b"prompt,chosen,rejected\n" + b",".join([b"x" * 30_000] * 3), "/a.csv:2"),
    ],
)
def test_a_record_that_is_too_large(tmp_path, name, content, place):
    assert refused(tmp_path / name, content) == f"{place}: {TOO_LARGE}"


def test_a_cell_of_many_lines(tmp_path):
    cell = b'"' + b"x\n" * LARGEST + b'"'
    error = refused(tmp_path / "a.csv", b"prompt,chosen,rejected\np,c,r\np,c," + cell)
    assert error.startswith(
        "/a.csv: not a readable .csv file in UTF-8, behind line 2: Error: field"
    )


def test_a_list_that_is_too_long(tmp_path):
    content = gzip.compress(b"[" + b" " * 2**23 + b"]")
    assert refused(tmp_path / "a.json.gz", content).startswith(
        "/a.json.gz: a list of more than 524,288 characters; write each record on a line of its own"
    )


def test_what_is_not_too_large_is_read(tmp_path):
    """Long lines, lists in one line and long lists are read whole."""
    long = PAIR | {"chosen": "x" * (LARGEST - 200)}
    (tmp_path / "a.jsonl").write_bytes(lines(*[long] * 9))
    (tmp_path / "b.json").write_text(json.dumps([long] * 7))
    (tmp_path / "c.json").write_text("\n" * 3000 + json.dumps({"data": [PAIR]}, indent=1))
    found = [len(read(str(path))) for path in sorted(tmp_path.iterdir())]
    assert found == [9, 7, 1]
    assert read(str(tmp_path / "a.jsonl"))[8].responses[0] == long["chosen"]


# --- tables


def write_parquet(path, rows: list[dict], **options) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def test_a_table_whose_rows_are_too_large_on_average(tmp_path):
    """It is known before anything is expanded: 16 MB from a file of 2 kB."""
    rows = [PAIR | {"chosen": "x" * 2**20} for _ in range(16)]
    write_parquet(tmp_path / "a.parquet", rows, compression="zstd", use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    assert len(content) < 2**14
    assert refused(tmp_path / "a.parquet", content) == f"/a.parquet:1: {TOO_LARGE}"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_that_is_too_large(tmp_path, suffix):
    """Other rows are so small that the average is not: the row is found where it is."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [PAIR] * 40 + [PAIR | {"chosen": LONG}] + [PAIR] * 40
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(path, rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
        (tmp_path / "data-00000-of-00001.arrow").rename(path)
    with pytest.raises(RunError) as caught:
        read(str(path))
    assert str(caught.value) == f"{path}:41: {TOO_LARGE}"


@pytest.mark.parametrize("nested", [False, True])
def test_rows_that_name_one_text_of_a_dictionary_are_decoded_in_small_batches(tmp_path, nested):
    """3,000 rows of 60,000 letters take 180 MB when expanded, and a file of some kB."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    text = "x" * 60_000
    rows = [PAIR | {"chosen": [{"role": "assistant", "content": text}] if nested else text}] * 3000
    write_parquet(tmp_path / "a.parquet", rows)
    assert (tmp_path / "a.parquet").stat().st_size < 2**18
    pool, sizes, most = pyarrow.default_memory_pool(), [], 0
    start = pool.bytes_allocated()
    for _, _, record in tables.parquet_of(tmp_path / "a.parquet"):
        most = max(most, pool.bytes_allocated() - start)
        sizes.append(len(str(record)))
    assert len(sizes) == 3000 and min(sizes) > 60_000 and most < 40 * LARGEST


def test_sizes_of_dictionaries_are_those_of_their_texts(tmp_path):
    """A dictionary of n texts of 100 letters has n (100 + 4) bytes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"a": f"{n % 300:0100d}"} for n in range(1000)]
    for codec in ("none", "snappy", "zstd"):
        path = write_parquet(tmp_path / "a.parquet", rows, compression=codec)
        chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
        with open(path, "rb") as file:
            assert tables.dictionary_bytes(file, chunk) == 300 * 104
    path = write_parquet(tmp_path / "a.parquet", rows, use_dictionary=False)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    with open(path, "rb") as file:
        assert tables.dictionary_bytes(file, chunk) == 0


def test_damaged_arrow_files_are_one_error_or_their_records(tmp_path):
    """One of four bytes each; without a check 1 in 12 of these ended the process by a signal."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [PAIR | {"margin": n, "subset": ["a"] * (n % 3)} for n in range(60)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    path, chance, ends = tmp_path / "data-00000-of-00001.arrow", random.Random(0), []
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        value = chance.choice([0xFFFFFFFF, 0x7FFFFFFF, 0x40000000, 0, 1])
        struct.pack_into("<I", damaged, chance.randrange(0, len(whole) - 4, 4), value)
        path.write_bytes(damaged)
        try:
            tables.check_arrow(path)
            ends.append("whole")
        except RunError as error:
            assert str(error).startswith(f"{path}") and "\n" not in str(error)
            ends.append("error")
    assert set(ends) == {"whole", "error"}
