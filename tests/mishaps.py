"""More mishaps of storm.py: edited files, tables, links, unequal ranks, locales, model bombs."""

import datetime
import json
import os
import random
import shutil
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
from hostile import VALUES, limit_memory
from huggingface_hub import constants
from processes import run_ranks
from storm_runs import SECONDS, World, bad_ending, script, train

from nanoalign.distributed import run
from nanoalign.ranks.report import report
from nanoalign.runs import trackers

DEEP = "[" * 5000 + "]" * 5000


def edited(chance: random.Random, folder: Path, world: World) -> str | None:
    """A JSON file of a run with another value and a fitting checksum, or another records.npz."""
    out = shutil.copytree(world.written["run"], folder / "run")
    kind = chance.choice(["run.json", "run.json", "args.json", "metrics.jsonl", "records.npz"])
    path = sorted(out.rglob(kind))[-1]
    if kind == "records.npz":
        arrays = dict(np.load(path))
        values = [np.zeros(()), np.array(["x"]), np.zeros((2, 2)), np.array([[{}]]), np.zeros(3)]
        arrays[chance.choice(list(arrays))] = chance.choice(values)
        np.savez(path, **arrays)
    else:
        line = chance.choice(path.read_text().splitlines() if kind == "metrics.jsonl" else [""])
        content = json.loads(line or path.read_text())
        content[chance.choice(list(content))] = chance.choice(VALUES)
        text = chance.choice([json.dumps(content)] * 5 + [DEEP, "3", "{", "\udcff"])
        path.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n")
    if (sums := path.with_name("checksums.json")).exists():
        crc = f"{zlib.crc32(path.read_bytes()):08x}"
        sums.write_text(json.dumps(json.loads(sums.read_text()) | {path.name: crc}))
    problem = bad_ending(train(world.argv(out, "--resume")))
    data = train([*world.argv(folder / "next"), "--data", f"held_out:{out}"])
    sent = run_ranks(1, _track, str(out), timeout=SECONDS)
    problem = problem or bad_ending(data) or bad_ending(sent)
    return f"{kind}: {problem}" if problem else None


def _track(folder: str) -> None:
    trackers.find_spec = lambda name: True
    trackers.open_tracker = lambda *args: (lambda *line: None, lambda: None)
    run(partial(trackers.main, [folder, "--track", "wandb"]), report)


def tables(chance: random.Random, folder: Path, world: World) -> str | None:
    """A .parquet or .arrow file with other columns than text, or with changed bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.array([b"ok\xff"] * 8, pa.binary())
    columns = [
        pa.array([datetime.date(2026, 1, 2)] * 8), pa.array([2**62] * 8, pa.timestamp("ms", "UTC")),
        pa.array([2**62] * 8, pa.duration("s")), pa.array([1] * 8, pa.timestamp("ns")), bad,
        pa.Array.from_buffers(pa.string(), 8, bad.buffers()), pa.nulls(8),
        pa.array([[datetime.date(2026, 1, 2)]] * 8), pa.array([{"role": b"x"}] * 8),
    ]  # fmt: skip
    table = {name: pa.array([f"{name} {n}" for n in range(8)])
             for name in ("prompt", "chosen", "rejected")}  # fmt: skip
    table[chance.choice(["prompt", "chosen", "tools", "margin"])] = chance.choice(columns)
    path, table = folder / chance.choice(["a.parquet", "a.arrow"]), pa.table(table)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        content = bytearray(path.read_bytes())
        for _ in range(chance.choice([0, 1, 4])):  # changed .arrow files end the process yet
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
    else:
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    outcome = train([*world.argv(folder / "out"), "--data", str(path)])
    named = outcome.codes == [0] or path.name in outcome.stderr
    return bad_ending(outcome) or (None if named else f"no file: {outcome.stderr[-200:]}")


def links(chance: random.Random, folder: Path, world: World) -> str | None:
    """A link of a model, or in --out, to a file outside: not read, not written."""
    secret, out = folder / "secret", folder / "out"
    secret.write_text('{"secret": "of the user"}')
    model = shutil.copytree(world.model, folder / "model")
    out.mkdir()
    names = ("chat_template.jinja", "generation_config.json", "notes.txt", "tokenizer.model")
    place = chance.choice([*(model / name for name in names), out / "args.json",
                           out / "metrics.jsonl", out / ".lock", out / "records.npz"])  # fmt: skip
    place.unlink(missing_ok=True)
    place.symlink_to(secret)
    argv = world.argv(out, *chance.choice([[], ["--overwrite"]]))
    outcome = train([*argv, "--model", str(model)])
    if secret.read_text() != '{"secret": "of the user"}':
        return f"{place.name}: the target was changed"
    for path in out.rglob("*"):
        if path.is_file() and not path.is_symlink() and b"of the user" in path.read_bytes():
            return f"{place.name}: its content is in {path.name}"
    return bad_ending(outcome)


def unequal(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two ranks of which one has another flag, model or data: one line on both, no training."""
    model, pairs = shutil.copytree(world.model, folder / "model"), folder / "pairs.jsonl"
    lines = world.pairs.read_text().splitlines()
    pairs.write_text("\n".join(lines[:-1] if chance.random() < 0.5 else lines[::-1]))
    config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (model / "config.json").write_text(json.dumps(config))
    other = chance.choice([["--lr", "2e-2"], ["--steps", "7"], ["--batch_size", "5"], ["--seed", 3],
                           ["--model", model], ["--data", pairs], ["--beta", "1"]])  # fmt: skip
    argv = world.argv(folder / "out", "--timeout", 30)
    outcome = run_ranks(2, _unequal, argv, list(map(str, other)), timeout=SECONDS)
    if "ranks differ" not in outcome.stderr:
        return f"{other[0]}: {outcome.codes} {outcome.stderr[-200:]}"
    return bad_ending(outcome, (1,))


def _unequal(argv: list[str], other: list[str]) -> None:
    script("train_dpo.py", argv + (other if os.environ["RANK"] == "1" else []))


def bombs(chance: random.Random, folder: Path, world: World) -> str | None:
    """A model whose settings, or their files, would take many gigabytes."""
    model = shutil.copytree(world.model, folder / "model")
    name = chance.choice(["config.json", "tokenizer_config.json", "tokenizer.json"])
    content = json.loads((model / name).read_text())
    more = chance.choice([
        {"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}},
        {"extra_ids": 10**9, "tokenizer_class": "T5TokenizerFast"}, {"vocab_size": 10**9},
    ])  # fmt: skip
    (model / name).write_text(json.dumps(content | more))
    if chance.random() < 0.3:
        os.truncate(model / name, 2 * 10**8)
    if chance.random() < 0.2:
        (model / name).write_text(DEEP)
    argv = [*world.argv(folder / "out"), "--model", str(model)]
    return bad_ending(train(argv, 1, (limit_memory,)))


def hubs(chance: random.Random, folder: Path, world: World) -> str | None:
    """A Hub that drops connections, redirects for ever, or sends something else than a Hub does."""
    kind = chance.choice(["drop", "redirect", "deep", "empty", "html", "half"])
    argv = world.argv(folder / "out")
    where = chance.choice([["--model", "a/b"], ["--data", "hf://datasets/a/b/c.jsonl"]])
    outcome = train([*argv, *where], 1, (_ask, kind, str(folder / "cache")))
    problem = bad_ending(outcome, (1,))
    return f"{kind} {where}: {problem}" if problem else None


def _ask(kind: str, cache: str) -> None:
    """Directs this process to a Hub of its own."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            if kind == "drop":
                return self.connection.close()
            body = {"deep": DEEP, "html": "<html>", "half": '{"sha": "0'}.get(kind, "").encode()
            self.send_response(302 if kind == "redirect" else 200)
            self.send_header("Location", f"/{random.random()}")
            self.send_header("Content-Length", str(len(body) + 9 * (kind == "half")))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": place, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": cache,
              "HUGGINGFACE_CO_URL_TEMPLATE": template}  # fmt: skip
    for name, value in values.items():
        setattr(constants, name, value)


def locales(chance: random.Random, folder: Path, world: World) -> str | None:
    """A terminal of ASCII, and names and texts that it does not have."""
    name = chance.choice(["größe", "数", "\u202eabc", "$x$", "<b>&", "[a](b)", "`x`", "\x1b[31m"])
    path = folder / f"{name}.jsonl"
    shutil.copy(world.pairs, path)
    argv = ["rm", "--model", str(world.rm), "--data", str(path), "--out", str(folder / name)]
    outcome = run_ranks(1, script, "evaluate.py", argv, (_ascii,), timeout=SECONDS)
    if outcome.codes != [0]:
        return f"{name!r}: {outcome.stderr[-200:]}"
    cases = (folder / name / "cases.md").read_text(encoding="utf-8")
    live = [mark for mark in ("<b>", "](", "\x1b") if mark in cases]
    return bad_ending(outcome) or (f"{name!r}: {live} in cases.md" if live else None)


def _ascii() -> None:
    import sys

    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
