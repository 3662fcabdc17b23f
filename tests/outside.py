"""Files that are bombs, templates that compute for hours, a Hub that lies: mishaps of storm.py."""

import gzip
import json
import random
import resource
import shutil
import struct
import time
from pathlib import Path

import hub_server
from processes import run_ranks
from storm_runs import SECONDS, World, bad_ending, script

from nanoalign.data.template_limits import memory_in_use
from nanoalign.files import network

GOOD = {"prompt": "Say hi", "chosen": "Hi!", "rejected": "No."}
DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(40) %}{% set n.x = n.x SIGN n.x %}"
DOUBLED += "{% endfor %}"
BIG = "(('f' * 9999 ~ messages | length) | int(base=16))"
# Templates of which one call of C would take minutes, or gigabytes.
HEAVY = {
    "power": "{{ 10 ** (10 ** 8) }}",
    "power in a test": "{% if 3 ** 9999999 > 1 %}a{% endif %}",
    "squares": DOUBLED.replace("START", "3").replace("SIGN", "*"),
    "quotient": f"{{{{ {BIG} // 3 }}}}",
    "remainder": f"{{{{ 3 % {BIG} }}}}",
    "round": "{{ 10 | round(-99999999) }}",
    "text": "{{ (('a' * 10 ** 9) * 3) | length }}",
    "list": "{{ ([0] * 10 ** 9) | length }}",
    "wrapped": "{{ ('a ' * 10 ** 9) | wordwrap(1) | length }}",
    "format": "{{ ('%999999999d' % 1) | length }}",
    "format of braces": "{{ '{:>999999999}'.format(1) | length }}",
    "centered": "{{ ('a' | center(999999999)) | length }}",
    "filled": "{{ 'a'.ljust(999999999) | length }}",
    "replaced": "{{ ('a' * 9999999).replace('a', 'b' * 999) | length }}",
    "joined": "{{ ('b' * 999).join('a' * 9999999) | length }}",
    "indented": "{{ [[1]] | tojson(indent=999999999) | length }}",
    "doubled by +": DOUBLED.replace("START", "'abcdefgh'").replace("SIGN", "+"),
    "doubled by ~": DOUBLED.replace("START", "'abcdefgh'").replace("SIGN", "~"),
    "doubled list": DOUBLED.replace("START", "[1]").replace("SIGN", "+"),
}


def limit_growth(size: int) -> None:
    """Lets the process take `size` more bytes than it has."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_in_use() + size, resource.RLIM_INFINITY))


def training(world: World, folder: Path, **changes: object) -> list[str]:
    flags = {"model": world.model, "data": world.pairs, "out": folder / "out", "steps": 1,
             "batch_size": 4} | changes  # fmt: skip
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def refused(world: World, folder: Path, words: str, *before: tuple, **changes) -> str | None:
    """What is wrong unless a training ends with one line of error that has one of some words."""
    argv = training(world, folder, **changes)
    outcome = run_ranks(1, script, "train_dpo.py", argv, *before, timeout=SECONDS)
    if problem := bad_ending(outcome, (1,)):
        return problem
    has_words = any(word in outcome.stderr for word in words.split("|"))
    return None if has_words else f"another error: {outcome.stderr[-200:]!r}"


# --- files ----------------------------------------------------------------------------------------


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
    words, before = "a record of more than|field larger", (limit_growth, 2**31)
    problem = refused(world, folder, words, before, data=path, template="raw")
    return f"{kind} of {size:,}: {problem}" if problem else None


def damage(chance: random.Random, folder: Path, world: World) -> str | None:
    """Changed words of an .arrow file: one line, or a run on what is there."""
    import pyarrow as pa

    table, path = pa.Table.from_pylist([GOOD] * 40), folder / "data.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        value = chance.choice([0xFFFFFFFF, 0x7FFFFFFF, 0x40000000, 0, 1])
        struct.pack_into("<I", content, chance.randrange(0, len(content) - 4, 4), value)
    path.write_bytes(content)
    argv = training(world, folder, data=path, template="raw")
    return bad_ending(run_ranks(1, script, "train_dpo.py", argv, timeout=SECONDS))


# --- templates ------------------------------------------------------------------------------------


def templates(chance: random.Random, folder: Path, world: World) -> str | None:
    """What a template computes in one call of C: one line, in 10 seconds and 2 GB."""
    model = shutil.copytree(world.model, folder / "model")
    kind = chance.choice(list(HEAVY))
    (model / "chat_template.jinja").write_text(HEAVY[kind])
    chat = folder / "chat.jsonl"
    record = GOOD | {"prompt": [{"role": "user", "content": "Hi"}]}
    chat.write_text("".join(json.dumps(record) + "\n" for _ in range(8)))
    start = time.monotonic()
    problem = refused(world, folder, "MemoryError|an integer of more", (limit_growth, 2**31),
                      model=model, data=chat)  # fmt: skip
    if not problem and time.monotonic() - start > SECONDS / 2:
        problem = "it took half a minute"
    return f"{kind}: {problem}" if problem else None


# --- the Hub --------------------------------------------------------------------------------------

# What of a server -> words of the errors.
SERVERS = {
    "silent": "neither a folder here|can't be fetched",
    "silent files": "neither a folder here|can't be fetched",
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
    places = {"model": "o/m"} if chance.random() < 0.5 else {}
    places |= {"data": "hf://datasets/o/n/large.jsonl"} if not places else {}
    before = (serve, str(world.model), str(world.pairs), str(cache), mishap)
    problem = refused(world, folder, SERVERS[mishap], before, template="raw", **places)
    if not problem and list(folder.rglob("*escaped*")):
        problem = "something was written outside of the cache"
    return f"{mishap} {places}: {problem}" if problem else None
