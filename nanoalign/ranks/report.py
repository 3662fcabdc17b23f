"""Prints an error of many ranks once, and one line per host when a rank is lost."""

import os
import re
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from nanoalign.distributed import environment_ranks
from nanoalign.errors import RunError
from nanoalign.files.lock import remove_empty_folders
from nanoalign.files.text import in_a_line, in_short

RANK_0_SECONDS = 10.0  # that the other ranks wait for rank 0 to report an error
STORE_SECONDS = 2.0  # that a rank waits for the store to tell whether an error was reported
STAGGER_SECONDS = 0.5  # between the ranks of a host that would report the same lost rank
REPORTED = "nanoalign/error"  # the key of the store that is set when an error was reported
# How the messages of gloo, nccl and the store describe that another process has ended.
LOST_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out"
    r"|remote ?(process|error)|no route to host|network is unreachable|communicator was aborted",
    re.IGNORECASE,
)


class Stopped(RunError):
    """Raised where a signal ends a run. code: the exit code of the process, 128 + the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


def report(error: BaseException) -> int:
    """Prints an expected error as one line, and returns the exit code.

    Returns 0 for a defect, of which nothing is printed: the caller raises it with its traceback. If
    the run has written nothing to its folder, the folder is removed.

    Most errors are raised by all ranks together. Rank 0 prints for them, and the others wait until
    it has: when one rank exits, torchrun ends the rest at once. An error of one rank alone is
    printed by that rank. If a collective fails because another rank has ended, or did not answer in
    time, one rank of each host prints one line.
    """
    rank, size, local_rank = environment_ranks()
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full, and the end of the process would flush it again
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if _is_out_of_memory(error):
        what, _, _ = in_a_line(error).partition(" GPU ")  # all numbers of that GPU follow
        error = RunError(
            f"not enough memory: {what} Lower --micro_batch_tokens; when training, "
            "--activation_checkpointing needs less too (docs/models.md has more)"
        ).with_traceback(error.__traceback__)
    if isinstance(error, RunError | OSError):
        # Deletes a progress bar of the loop, which ends its line on standard error.
        traceback.clear_frames(error.__traceback__)
        if rank == 0 or not _was_reported(RANK_0_SECONDS, if_store_ended=True):
            kind = "" if isinstance(error, Stopped) else "error: "
            print(f"{kind}{in_short(str(error))}", file=sys.stderr, flush=True)
            remove_empty_folders()
            if size > 1:
                store_of_ranks().set(REPORTED, "yes")
        return error.code if isinstance(error, Stopped) else 1
    if isinstance(error, KeyboardInterrupt):  # outside of training
        traceback.clear_frames(error.__traceback__)
        if rank == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    if not isinstance(error, RuntimeError) or size == 1:
        return 0
    # Another rank may have reported why it ended; then nothing is left to report.
    if _was_reported(STORE_SECONDS, if_store_ended=False):
        return 1
    if not _is_lost_connection(error):
        return 0
    traceback.clear_frames(error.__traceback__)
    time.sleep(local_rank * STAGGER_SECONDS)  # torchrun ends the others when the first one exits
    problem = in_short(in_a_line(error))
    print(
        f"error: rank {rank} has lost contact with another rank, or got no answer in time; see "
        "the last output of that rank, if its host still answers. A training run continues from "
        f"its newest checkpoint with --resume, on any number of ranks ({problem})",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or the host, has too little memory; on a CPU torch has no class for it."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't alloc" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective, or the store, failed because another rank has ended."""
    if isinstance(error, dist.DistNetworkError):
        return True
    of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    return of_collective and LOST_CONNECTION.search(str(error)) is not None


def store_of_ranks() -> dist.Store | None:
    """Returns the key-value store of the ranks; None for one process.

    Before they have met (groups.meet) it is a part of torchrun's, by its count of restarts.
    """
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if environment_ranks()[1] == 1:
        return None
    store, *_ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)


def _was_reported(seconds: float, if_store_ended: bool) -> bool:
    """Whether a rank has reported an error, or does so in the next `seconds`.

    if_store_ended: the result if the store has ended, as it does with rank 0 where that runs it.
    """
    found = False

    def look() -> None:
        nonlocal found
        deadline = time.monotonic() + seconds
        try:
            store = store_of_ranks()
            while not found and time.monotonic() < deadline:
                found = store.check([REPORTED])
                time.sleep(0.05)
        except dist.DistNetworkError:
            found = if_store_ended

    # In a thread, because a host that is switched off never answers.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return found
