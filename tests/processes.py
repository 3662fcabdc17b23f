"""Runs a function on several ranks of one host: processes with torchrun's environment variables.

The processes are forked from a server that has imported torch and transformers once, which is much
faster than torchrun; tests/core/test_scripts.py runs torchrun itself.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
# One thread a process: the models of the tests are far too small for more.
os.environ["OMP_NUM_THREADS"] = "1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["train_dpo", "train_rm", "evaluate", "nanoalign.runs.checkpoints",
     "transformers.models.llama.modeling_llama"]
)  # fmt: skip


@dataclass
class Outcome:
    """What the ranks returned (None: the rank failed), their exit codes, and what they printed."""

    results: list[object]
    codes: list[int]
    stdout: str
    stderr: str


def run_ranks(ranks: int, function: Callable, *args, timeout: float = 120) -> Outcome:
    """Calls function(*args) on every rank. A rank that runs longer than timeout fails the test."""
    # As under torchrun, the store belongs to the launcher and outlives the ranks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, ranks, store.port, folder, function, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [process.pid for process in processes if process.is_alive()]
        for process in processes:
            process.kill()
        stdout, stderr = (
            "".join((Path(folder) / f"{rank}.{stream}").read_text() for rank in range(ranks))
            for stream in ("stdout", "stderr")
        )
        assert not late, f"ranks still ran after {timeout} s: {stderr}"
        files = [Path(folder) / f"{rank}.result" for rank in range(ranks)]
        results = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
        return Outcome(results, [process.exitcode for process in processes], stdout, stderr)


def torchrun(hosts: int, argv: list[str], folder: Path, timeout: float = 300) -> Outcome:
    """Runs a script on two ranks, under one torchrun, or under two as on two hosts, in a folder.

    Ranks are started again after a failure. The codes are those of torchrun.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", hosts, "--nproc_per_node", 2 // hosts, "--max-restarts", 5, "--rdzv_id",
             "a", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words), *argv]
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, **options, **pipes) for _ in range(hosts)]
    with ThreadPoolExecutor() as pool:  # or a full pipe of one would let the others wait
        texts = list(pool.map(lambda each: each.communicate(timeout=timeout), started))
    out, err = map("".join, zip(*texts, strict=True))
    return Outcome([], [each.returncode for each in started], out, err)


def _rank(rank: int, ranks: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    """The body of one process: redirects its output to files, and writes the result to one."""
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder) / f"{rank}.{stream}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port),
                       "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    try:
        result = function(*args)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as distributed.run ends a rank: without waiting for threads of gloo
