"""Runs the commands of an experiment, one on each core, and keeps their results.

The name of a result has a hash of the command and of the code, data and weights that it may use, so
that a command that was run before, by any experiment, is not run again.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from threading import Lock, Semaphore

import torch

from nanoalign.errors import RunError
from nanoalign.files.writing import write_text

ROOT = Path(__file__).parents[2]
# Imported once by the server from which the processes of commands are forked.
PRELOADED = ["train_dpo", "train_rm", "evaluate", "transformers.models.llama.modeling_llama"]


class Runs:
    """Commands, each in a process of its own on one thread."""

    def __init__(self, made: Path):
        """made: the folder of results."""
        self.made = made
        self.made.mkdir(parents=True, exist_ok=True)
        # CPU seconds of commands, as one would type them, in the order in which they ended; a
        # command that had run before has the seconds that it took then
        self.commands: dict[str, float] = {}
        self.fresh = 0  # how many of them were not done before
        self._free = Semaphore(len(os.sched_getaffinity(0)))
        self._locks: dict[str, Lock] = defaultdict(Lock)
        self._error: RunError | None = None  # of the first command that failed
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, *words: object, suffix: str = "") -> Path:
        """Runs a script, or `-m MODULE`, and returns its --out, which is appended to the words.

        suffix: of an --out that is a file. "{out}" in a word is replaced by --out without suffix.
        Raises RunError if the command fails, or if another one has failed: then none is started.
        """
        texts = list(map(str, words))
        digest = hashlib.sha256(json.dumps([code_digest(texts), texts]).encode()).hexdigest()[:10]
        kind = texts[1] if texts[0] in ("-m", "evaluate.py") else texts[0].removesuffix(".py")
        stem = self.made / f"{kind.rpartition('.')[2]}-{digest}"
        out = Path(f"{stem}{suffix}")
        texts = [text.replace("{out}", str(stem)) for text in texts] + ["--out", str(out)]
        with self._locks[digest]:
            if not done(stem).exists():
                self._start(stem, texts)
            self.commands[shlex.join(["python", *texts])] = float(done(stem).read_text())
        return out

    def _start(self, stem: Path, texts: list[str]) -> None:
        with self._free:
            if self._error:
                raise self._error
            begin = time.monotonic()
            process = self._context.Process(target=_work, args=(texts, stem, os.getcwd()))
            process.start()
            process.join()
        if not done(stem).exists():
            self._error = RunError(f"{texts[0]} has failed; the end of {stem}.log has its error")
            raise self._error
        self.fresh += 1
        print(f"{time.monotonic() - begin:5.0f} s  {shlex.join(texts)}", flush=True)

    def write(self, name: str, records: list[dict]) -> Path:
        """Writes records as JSON lines, and returns the path, which has a hash of them."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        path = self.made / f"{name}-{digest}.jsonl"
        if not path.exists():
            # Another thread may write the same: a rename is whole for both.
            new = path.with_suffix(f".{time.monotonic_ns()}")
            new.write_text(text, encoding="ascii")
            new.rename(path)
        return path


def code_digest(texts: list[str]) -> str:
    """A hash of the code, data and weights that a command may use: of lab/ its own module alone."""
    own = ROOT / f"{texts[1].replace('.', '/')}.py" if texts[0] == "-m" else None
    return outside_lab() + (hashlib.sha256(own.read_bytes()).hexdigest() if own else "")


@cache
def outside_lab() -> str:
    """A hash of the scripts and of all files of nanoalign/ but for lab/."""
    package = (ROOT / "nanoalign").rglob("*")
    files = [path for path in (*ROOT.glob("*.py"), *package) if path.is_file()]
    hashed = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(ROOT)
        if not {"lab", "__pycache__"} & set(name.parts):
            hashed.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return hashed.hexdigest()


def flag_words(**values: object) -> list[object]:
    """The words --name value of each flag."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def done(stem: Path) -> Path:
    """The file that says that a command has ended well. It has the CPU seconds of the command."""
    return Path(f"{stem}.done")


def _work(texts: list[str], stem: Path, folder: str) -> None:
    """Runs `python TEXTS` in this process, which ends with it; its output goes to a log."""
    os.chdir(folder)
    with Path(f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of an experiment that was killed goes on
        if done(stem).exists():
            return
        for path in stem.parent.glob(f"{stem.name}*"):  # of a command that was interrupted
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".lock":
                path.unlink()
        file = os.open(f"{stem}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
        torch.set_num_threads(1)
        if texts[0] == "-m":
            sys.argv = texts[1:]
            runpy.run_module(texts[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = texts
            runpy.run_path(str(ROOT / texts[0]), run_name="__main__")
        write_text(done(stem), f"{time.process_time():.1f}")
