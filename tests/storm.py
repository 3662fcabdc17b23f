"""A storm of mishaps: what is killed, full, damaged, interrupted or hostile, and what is left then.

    python tests/storm.py                       each kind once or a few times, about a minute
    python tests/storm.py --times 10            about 200 of each kind, half an hour on two cores
    python tests/storm.py kills models --seed 7

Each mishap is a process, or several ranks, forked from a server that has imported everything. It
has survived if the run ends as it should: with the files of an undisturbed run, bit for bit, after
a resume; or with one line that is an error, without a traceback, controls or more than 2,000
characters, within a minute. The table counts what was tried and what has failed, and each failure
is printed with its number, which --only repeats.
"""

import argparse
import functools
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import data, flags, models
from mishaps import bombs, edited, hubs, links, locales, tables, unequal
from outside import damage, requests, sizes, templates
from processes import Outcome
from storm_runs import (
    World,
    bad_ending,
    kill_at,
    limit_files,
    ranks_of,
    signal_after,
    train,
)
from trainings import losses, metrics_of

Mishap = Callable[[random.Random, Path, World], str | None]  # what went wrong, if anything did


# --- kills, full disks, signals, two writers ------------------------------------------------------


def kills(chance: random.Random, folder: Path, world: World) -> str | None:
    """kill -9 at a file operation or a moment; in a quarter of the cases again while resuming."""
    out, ranks = folder / "run", ranks_of(chance)
    for more in ([], ["--resume"]) if chance.random() < 0.25 else ([],):
        if more and not list((out / "checkpoints").glob("step_*")):
            break
        at = (kill_at, chance.randint(1, 90), str(out), chance.randrange(ranks))
        if chance.random() < 0.3:
            at = (signal_after, chance.uniform(0, 0.8), signal.SIGKILL, chance.randrange(ranks))
        # A rank waits for one that was killed before their group existed: torchrun, which would end
        # it, is not here.
        outcome = train(world.argv(out, *more, "--timeout", 30), ranks, at)
        if "Traceback" in outcome.stderr:
            return f"traceback: {outcome.stderr.strip().splitlines()[-1][:200]}"
    return world.finish(out, ranks)


def full_disks(chance: random.Random, folder: Path, world: World) -> str | None:
    """Files of bounded size: one line, and a run that goes on when there is room."""
    out, ranks = folder / "run", ranks_of(chance)
    size = int(10 ** chance.uniform(2.5, 6))
    flags = [] if chance.random() < 0.5 else ["--save_every", 100]
    outcome = train(world.argv(out, *flags), ranks, (limit_files, size))
    return bad_ending(outcome) or world.finish(out, ranks)


def signals(chance: random.Random, folder: Path, world: World) -> str | None:
    """A signal at a moment: 128 + n and one line, or a run that had ended, or not begun."""
    out, ranks = folder / "run", ranks_of(chance)
    number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
    at = (signal_after, chance.uniform(0, 1), number, chance.randrange(ranks))
    # As in `kills`, a rank may wait for one that ended before their group existed.
    outcome = train(world.argv(out, "--timeout", 30), ranks, at)
    allowed = (0, 1, 128 + number, -number)  # the last: before training, by default
    return bad_ending(outcome, allowed) or world.finish(out, ranks)


def writers(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two runs into one folder, one of which may resume: one result, and one line of the other."""
    out = folder / "run"
    if flags := chance.choice([[], ["--resume"], ["--overwrite"]]):
        train(world.argv(out, "--stop_after", 4))
    delay = chance.uniform(0, 0.6)

    def late() -> Outcome:
        time.sleep(delay)
        return train(world.argv(out, *flags))

    with ThreadPoolExecutor() as pool:
        both = [pool.submit(train, world.argv(out, *flags)), pool.submit(late)]
    outcomes = [each.result() for each in both]
    for outcome in outcomes:
        if problem := bad_ending(outcome):
            return problem
    if all(outcome.codes != [0] for outcome in outcomes):
        return f"none has ended: {[outcome.stderr[-200:] for outcome in outcomes]}"
    return world.wrong(out, 1)


# --- damage ---------------------------------------------------------------------------------------


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
    if set(outcome.codes) == {1}:
        return None
    if where == "cache":  # only the reference is read from there
        found, expected = metrics_of(out), world.whole[1][0]
        return None if losses(found) == pytest.approx(losses(expected), abs=1e-5) else "other loss"
    return world.wrong(out, 1) if ranks == 1 else None


# --- all of it ------------------------------------------------------------------------------------

FLIPPED = ("run/*.distcp", "run/.metadata", "run/run.json", "run/checksums.json",
           "run/metrics.jsonl", "run/records.npz", "cache/*.npy", "cache/rows.bin",
           "cache/logps.safetensors")  # fmt: skip
KINDS: dict[str, tuple[Mishap, int]] = {
    "kills": (kills, 20),
    "full_disks": (full_disks, 4),
    "signals": (signals, 3),
    "writers": (writers, 3),
    **{f"flips:{kind}": (functools.partial(bit_flips, kind), 15) for kind in FLIPPED},
    "data": (data, 30),
    "models": (models, 20),
    "flags": (flags, 8),
    "edited": (edited, 12),
    "tables": (tables, 12),
    "links": (links, 8),
    "unequal": (unequal, 4),
    "bombs": (bombs, 8),
    "locales": (locales, 3),
    "hubs": (hubs, 8),
    "sizes": (sizes, 12),
    "damage": (damage, 8),
    "templates": (templates, 12),
    "requests": (requests, 12),
}


def one(name: str, number: int, seed: int, world: World) -> str | None:
    folder = world.folder / "mishaps" / f"{re.sub(r'[^a-z]', '_', name)}_{number}"
    folder.mkdir(parents=True)
    try:
        return KINDS[name][0](random.Random(f"{seed} {name} {number}"), folder, world)
    except AssertionError as error:  # of run_ranks: it took too long
        return str(error)[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--times", type=float, default=0.1, help="1: the counts of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mishap of each kind")
    args = parser.parse_args()
    start, failures, tried = time.monotonic(), [], Counter()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:
        world = World(Path(parent) / "world")
        names = [k for k in KINDS if not args.kinds or k in args.kinds
                 or k.partition(":")[0] in args.kinds]  # fmt: skip
        jobs = []
        for name in names:
            count = max(1, round(KINDS[name][1] * args.times))
            numbers = range(count) if args.only is None else [args.only]
            jobs += [(name, n, pool.submit(one, name, n, args.seed, world)) for n in numbers]
        for name, number, job in jobs:
            tried[name] += 1
            if problem := job.result():
                failures.append(name)
                print(f"{name} {number}: {problem}", flush=True)
    print("\n| mishap | tried | failed |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {tried[name]} | {failures.count(name)} |")
    print(f"\n{sum(tried.values())} in {time.monotonic() - start:.0f} s, seed {args.seed}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
