"""Mishaps of storm.py with what is read: damaged tables, records of gigabytes, a false Hub."""

import datetime
import gzip
import json
import random
import struct
import time
from pathlib import Path

import hub_server
from storm_runs import World, bad_ending, limit_memory, not_refused, train

from nanoalign.files import network

GOOD = {"prompt": "Say hi", "chosen": "Hi!", "rejected": "No."}


def tables(chance: random.Random, folder: Path, world: World) -> str | None:
    """A .parquet or .arrow file with columns of another type, changed bytes, or both."""
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.array([b"ok\xff"] * 8, pa.binary())
    columns = [
        pa.array([datetime.date(2026, 1, 2)] * 8), pa.array([2**62] * 8, pa.timestamp("ms", "UTC")),
        pa.array([2**62] * 8, pa.duration("s")), pa.array([1] * 8, pa.timestamp("ns")), bad,
        pa.Array.from_buffers(pa.string(), 8, bad.buffers()), pa.nulls(8),
        pa.array([[datetime.date(2026, 1, 2)]] * 8), pa.array([{"role": b"x"}] * 8),
    ]  # fmt: skip
    table = {name: pa.array([f"{name} {n}" for n in range(8)]) for name in GOOD}
    if chance.random() < 0.7:
        name = chance.choice(["prompt", "chosen", "tools", "margin"])
        table[name] = chance.choice(columns)
    path, table = folder / chance.choice(["a.parquet", "a.arrow"]), pa.table(table)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([0, 1, 4])):
        if chance.random() < 0.5:
            content[chance.randrange(len(content))] = chance.randrange(256)
        else:  # an offset or a length
            value = chance.choice([0xFFFFFFFF, 0x7FFFFFFF, 0x40000000, 0, 1])
            struct.pack_into("<I", content, chance.randrange(0, len(content) - 4, 4), value)
    path.write_bytes(content)
    outcome = train(world.argv(folder / "out", "--data", path, "--steps", 1))
    named = outcome.codes == [0] or path.name in outcome.stderr
    return bad_ending(outcome) or (None if named else f"no file: {outcome.stderr[-200:]}")


def sizes(chance: random.Random, folder: Path, world: World) -> str | None:
    """A record of 40 to 200 MB in a small file, behind some good ones: one line, 2 GB at most."""
    size = int(10 ** chance.uniform(7.6, 8.3))
    good, large = json.dumps(GOOD).encode() + b"\n", json.dumps(GOOD | {"chosen": "X"}).encode()
    large = large.replace(b"X", b"x" * size)
    line = good * chance.randint(0, 5) + chance.choice([large, large[:-9]]) + b"\n"
    kind = chance.choice(["jsonl", "jsonl.gz", "json", "csv", "dictionary", "zstd"])
    if kind in ("dictionary", "zstd"):
        import pyarrow as pa
        from pyarrow import parquet

        path, count = folder / "data.parquet", chance.randint(2, 40)
        text = "x" * (size if kind == "dictionary" else size // count + 2**24)
        table = pa.table({name: [text if name == "chosen" else "a"] * count for name in GOOD})
        options = {"use_dictionary": kind == "dictionary", "compression": "zstd"}
        parquet.write_table(table, path, **options)
    else:
        path = folder / f"data.{kind}"
        cells = b"prompt,chosen,rejected\na,b,c\n" + b'a,"' + b"x\n" * (size // 2) + b'",c\n'
        contents = {"jsonl": line, "json": b"[" + large + b"]", "csv": cells}
        path.write_bytes(contents[kind] if kind in contents else gzip.compress(line, 1))
    argv = world.argv(folder / "out", "--data", path)
    outcome = train(argv, 1, (limit_memory, 2**31))
    problem = not_refused(outcome, "a record of more than|field larger")
    return f"{kind} of {size:,}: {problem}" if problem else None


# What of a server -> words of the errors.
SERVERS = {
    **dict.fromkeys(hub_server.MISHAPS, "neither a folder here|can't be fetched"),
    "drip": "the Hub sent ",
    "zeros": "its SHA-256 differs",
    "etag": "which is a path",
    "commit": "which is a path",
}


def serve(model: str, data: str, cache: str, mishap: str) -> None:
    """Serves a model and data to this process, which waits for seconds in place of a minute."""
    files = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    repositories = {"models/o/m": files, "datasets/o/n": {"large.jsonl": Path(data).read_bytes()}}
    options = {"commit": "../../../escaped"} if mishap == "commit" else {"mishap": mishap}
    network.SECONDS = 2.0
    hub_server.constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.5
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.1))  # between the library's retries
    serve.hub = hub_server.serving(repositories, Path(cache), **options)
    serve.hub.__enter__()


def requests(chance: random.Random, folder: Path, world: World) -> str | None:
    """A Hub that is silent, slow, damaged, or no Hub: one line, and nothing outside its cache."""
    mishap, cache = chance.choice(list(SERVERS)), folder / "a" / "b" / "c" / "cache"
    place = chance.choice([("--model", "o/m"), ("--data", "hf://datasets/o/n/large.jsonl")])
    before = (serve, str(world.model), str(world.pairs), str(cache), mishap)
    problem = not_refused(train(world.argv(folder / "out", *place), 1, before), SERVERS[mishap])
    if not problem and list(folder.rglob("*escaped*")):
        problem = "something was written outside of the cache"
    return f"{mishap} {place}: {problem}" if problem else None
