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
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from damage import bit_flips, edited, links, unequal
from hostile import bombs, data, flags, locales, models, templates
from hostile_sources import requests, sizes, tables
from interruptions import (
    caches,
    full_disks,
    kills,
    power_cuts,
    restarts,
    scores,
    signals,
    writers,
)
from storm_runs import World

Mishap = Callable[[random.Random, Path, World], str | None]  # what went wrong, if anything did

FLIPPED = ("run/*.distcp", "run/.metadata", "run/run.json", "run/checksums.json",
           "run/metrics.jsonl", "run/records.npz", "cache/*.npy", "cache/rows.bin",
           "cache/logps.safetensors")  # fmt: skip
KINDS: dict[str, tuple[Mishap, int]] = {
    "kills": (kills, 20),
    "full_disks": (full_disks, 4),
    "signals": (signals, 3),
    "writers": (writers, 3),
    "scores": (scores, 4),
    "caches": (caches, 2),
    "power_cuts": (power_cuts, 10),
    "restarts": (restarts, 1),
    **{f"flips:{kind}": (partial(bit_flips, kind), 15) for kind in FLIPPED},
    "edited": (edited, 12),
    "links": (links, 8),
    "unequal": (unequal, 4),
    "data": (data, 30),
    "models": (models, 20),
    "bombs": (bombs, 8),
    "templates": (templates, 12),
    "flags": (flags, 8),
    "locales": (locales, 3),
    "tables": (tables, 20),
    "sizes": (sizes, 12),
    "requests": (requests, 20),
}


def one(name: str, number: int, seed: int, world: World) -> str | None:
    folder = world.folder / "mishaps" / f"{re.sub(r'[^a-z]', '_', name)}_{number}"
    folder.mkdir(parents=True)
    try:
        return KINDS[name][0](random.Random(f"{seed} {name} {number}"), folder, world)
    except Exception as error:  # of run_ranks: it took too long; or what should be there is not
        return f"{type(error).__name__}: {str(error)[:300]}"
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
