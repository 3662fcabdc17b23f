"""Mishaps of storm.py that interrupt a run: kills, full disks, signals, power cuts, two writers."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

from processes import Outcome, torchrun
from storm_runs import (
    ROOT,
    World,
    bad_ending,
    kill_at,
    limit_files,
    no_pictures,
    ranks_of,
    signal_after,
    start,
    train,
)


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


# --- two writers ----------------------------------------------------------------------------------


def both(chance: random.Random, first: Callable[[], Outcome], second: Callable[[], Outcome],
         may_refuse: bool = True) -> str | None:  # fmt: skip
    """Runs two commands that meet; what is wrong with their ends. One of them, at least, succeeds.

    may_refuse: whether the other one may end with an error.
    """
    delay = chance.uniform(0, 0.6)

    def late() -> Outcome:
        time.sleep(delay)
        return second()

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(first), pool.submit(late)]
    outcomes = [job.result() for job in jobs]
    problems = [bad_ending(outcome, (0, 1) if may_refuse else (0,)) for outcome in outcomes]
    if all(outcome.codes != [0] for outcome in outcomes):
        problems.append(f"none has ended: {[outcome.stderr[-200:] for outcome in outcomes]}")
    return next(filter(None, problems), None)


def writers(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two runs into one folder, one of which may resume: one result, and one line of the other."""
    out = folder / "run"
    if flags := chance.choice([[], ["--resume"], ["--overwrite"]]):
        train(world.argv(out, "--stop_after", 4))

    def run() -> Outcome:
        return train(world.argv(out, *flags))

    return both(chance, run, run) or world.wrong(out, 1)


def scores(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two `score` into one file, two `rm` into one folder, or a kill: a whole result, or none."""
    out, kind = folder / "made" / "out.jsonl", chance.choice(["score", "score", "rm", "kill"])
    argv = world.scoring(out)
    if kind == "rm":
        out = folder / "made" / "eval" / "scores.jsonl"
        argv = ["rm", "--model", world.rm, "--data", world.pairs, "--out", out.parent]

    def run(*before: tuple) -> Outcome:
        return start("evaluate.py", argv, (no_pictures,), *before)

    if kind == "kill":
        run((kill_at, chance.randint(1, 12), str(out.parent), 0))
        if not out.exists() and (problem := bad_ending(run(), (0,))):
            return f"after a kill: {problem}"
    elif problem := both(chance, run, run):
        return f"{kind}: {problem}"
    if kind == "rm":
        return None if len(out.read_text().splitlines()) == 50 else "half of the scores"
    return None if out.read_bytes() == world.scores.read_bytes() else f"{kind}: other scores"


def caches(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two runs that fill one --cache at the same time: both end as without it."""
    flags = ["--cache", folder / "cache", *chance.choice([[], ["--precompute_reference"]])]
    outs = folder / "a", folder / "b"
    runs = [partial(train, world.argv(out, *flags)) for out in outs]
    if problem := both(chance, *runs, may_refuse=False):
        return problem
    if world.files(outs[0]) != world.files(outs[1]):
        return "two results"
    return None if flags[2:] else world.wrong(outs[0], 1)  # kept log-probabilities are rounded


# --- restarts in the job --------------------------------------------------------------------------

# A rank as torchrun starts it, which is killed some seconds after its imports; each kill once.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import storm_runs
for seconds, rank in {kills}:
    if rank == int(os.environ["RANK"]) and not os.path.exists(f"killed {{seconds}}"):
        open(f"killed {{seconds}}", "w").close()
        storm_runs.signal_after(seconds, signal.SIGKILL, rank)
        break
storm_runs.script("train_dpo.py", sys.argv[1:])
"""


def restarts(chance: random.Random, folder: Path, world: World) -> str | None:
    """kill -9 of ranks under torchrun --max-restarts, or under two: the undisturbed result."""
    out, hosts = folder / "run", chance.choice([1, 2])
    kills = [(chance.uniform(0, 1.5), chance.randrange(2)) for _ in range(chance.choice([1, 1, 2]))]
    (folder / "killed.py").write_text(KILLED.format(tests=str(ROOT / "tests"), kills=kills))
    train(world.argv(out, "--stop_after", 2), 2)
    outcome = torchrun(hosts, ["killed.py", *world.argv(out, "--resume")], folder)
    if outcome.codes != [0] * hosts:
        return f"{hosts} hosts, kills {kills}: {outcome.stderr[-300:]!r}"
    return world.wrong(out, 2)


# --- power cuts -----------------------------------------------------------------------------------


class Disk:
    """What a disk has after a power cut: files and names of folders as they were last synced.

    A file or folder that was never synced is empty. A name is there if its folder was synced with
    it.
    """

    def __init__(self, root: Path):
        self.root, self.contents, self.names = root, {}, {}

    def fsync(self, descriptor: int) -> None:
        path, inode = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_ino
        # Stays open, so that no other file gets the inode of one that was removed.
        os.dup(descriptor)
        if path.is_dir():
            self.sync_names(path)
        else:
            self.contents[inode] = path.read_bytes()

    def sync_names(self, folder: Path) -> None:
        # By inode: a renamed folder keeps what was synced in it.
        self.names[folder.stat().st_ino] = {
            each.name: each.stat().st_ino for each in folder.iterdir()
        }
        for each in filter(Path.is_dir, folder.iterdir()):
            self.names.setdefault(each.stat().st_ino, {})

    def after_a_cut(self, folder: Path, all_names: bool = False) -> Path:
        """Writes what the disk has of `root` to a folder.

        all_names: of all files there is the name, as on a disk that writes folders first.
        """
        if all_names:
            for each in (self.root, *filter(Path.is_dir, self.root.rglob("*"))):
                self.sync_names(each)

        def write(inode: int, target: Path) -> None:
            if inode in self.names:
                target.mkdir()
                for name, part in self.names[inode].items():
                    write(part, target / name)
            else:
                target.write_bytes(self.contents.get(inode, b""))

        self.names.setdefault(self.root.stat().st_ino, {})
        write(self.root.stat().st_ino, folder)
        return folder


def cut_power(count: int, out: str, left: str, all_names: bool) -> None:
    """Ends the process at its `count`-th fsync or at its end; `left` is what the disk has then."""
    disk, real, seen = Disk(Path(out)), os._exit, 0

    def end(code: int) -> None:
        disk.after_a_cut(Path(left), all_names)
        real(code)

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            end(0)
        disk.fsync(descriptor)

    patch.multiple(os, fsync=fsync, _exit=end).start()


def power_cuts(chance: random.Random, folder: Path, world: World) -> str | None:
    """The disk keeps what was synced until a moment: the run continues, or starts again."""
    out, left = folder / "run", folder / "left"
    out.mkdir()
    cut = (cut_power, chance.randint(1, 80), str(out), str(left), chance.random() < 0.5)
    if problem := bad_ending(train(world.argv(out), 1, cut), (0,)):
        return problem
    shutil.rmtree(out)
    left.rename(out)
    return world.finish(out, 1)
