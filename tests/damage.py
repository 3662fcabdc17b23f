"""Mishaps of storm.py to the files of a run: changed bits and values, links, unequal copies."""

import json
import os
import random
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile import DEEP, VALUES
from processes import run_ranks
from storm_runs import SECONDS, World, bad_ending, ranks_of, script, train
from trainings import losses, metrics_of

from nanoalign.distributed import run
from nanoalign.ranks.report import report
from nanoalign.runs import trackers


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def bit_flips(kind: str, chance: random.Random, folder: Path, world: World) -> str | None:
    """One bit of a file that a run has written: an error, or the result of before."""
    where, _, pattern = kind.partition("/")
    base, out, ranks = world.written[where], folder / "run", ranks_of(chance)
    shutil.copytree(base, folder / where)
    found = sorted(path for path in (folder / where).rglob(pattern) if path.is_file())
    found = [path for path in found if "step_000002" not in str(path)]  # the older checkpoint
    flip(chance.choice(found), chance)
    if where == "cache":
        flags = ["--cache", folder / "cache", "--precompute_reference"]
        outcome = train(world.argv(out, *flags))
    else:
        outcome = train(world.argv(out, "--resume"), ranks)
    if problem := bad_ending(outcome):
        return problem
    if 0 not in outcome.codes:  # one line of error, by bad_ending
        return None
    if where == "cache":  # only the reference is read from there
        found, expected = metrics_of(out), world.whole[1][0]
        return None if losses(found) == pytest.approx(losses(expected), abs=1e-5) else "other loss"
    return world.wrong(out, 1) if ranks == 1 else None


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
    data = train(world.argv(folder / "next", "--data", f"held_out:{out}"))
    sent = run_ranks(1, _track, str(out), timeout=SECONDS)
    problem = problem or bad_ending(data) or bad_ending(sent)
    return f"{kind}: {problem}" if problem else None


def _track(folder: str) -> None:
    trackers.find_spec = lambda name: True
    trackers.open_tracker = lambda *args: (lambda *line: None, lambda: None)
    run(partial(trackers.main, [folder, "--track", "wandb"]), report)


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
    outcome = train(world.argv(out, "--model", model, *chance.choice([[], ["--overwrite"]])))
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
