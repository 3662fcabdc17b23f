"""Who prints an error among many ranks, and what is printed when a rank is lost."""

import re
import sys
import threading
import time

import torch.distributed as dist

from nanoalign.distributed import place
from nanoalign.errors import RunError, in_a_line

RANK_0_WITHIN = 10.0  # seconds that the other ranks give rank 0 to report an error
STORE_WITHIN = 2.0  # seconds in which the store must answer whether an error was reported
BETWEEN_RANKS = 0.5  # seconds between the ranks of a host that would report the same loss
REPORTED = "nanoalign/error"  # the key of the store that is set when an error was reported
# How gloo, nccl and the store name the loss of another process in a RuntimeError.
LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out"
    r"|remote ?(process|error)|no route to host|network is unreachable|communicator was aborted",
    re.IGNORECASE,
)


def report(error: BaseException) -> bool:
    """Prints an error that a user can mend as one line; False: it is a defect, with a traceback.

    All ranks find most errors together. Rank 0 prints for them, and the others wait until it has:
    when one rank exits, torchrun ends the rest at once. An error of one rank alone is printed by
    that rank. A collective that failed because another rank has ended, or did not answer in time,
    is one line from one rank of each host.
    """
    rank, size, local_rank = place()
    if isinstance(error, RunError | OSError):
        if rank == 0 or not _was_reported(RANK_0_WITHIN, if_store_ended=True):
            print(f"error: {error}", file=sys.stderr, flush=True)
            if size > 1:
                _store().set(REPORTED, "yes")
        return True
    if not isinstance(error, RuntimeError) or size == 1:
        return False
    # Another rank may have reported why it ended. If not, and the store ended with it: lost.
    if _was_reported(STORE_WITHIN, if_store_ended=False):
        return True
    if not _is_loss(error):
        return False
    time.sleep(local_rank * BETWEEN_RANKS)  # torchrun ends the others when the first one exits
    print(
        f"error: rank {rank} has lost contact with another rank, or waited for it in vain; see the "
        "last output of that rank, if its host still answers. A training run continues from its "
        f"newest checkpoint with --resume, on any number of ranks ({in_a_line(error)})",
        file=sys.stderr,
        flush=True,
    )
    return True


def _is_loss(error: RuntimeError) -> bool:
    """Whether a collective, or the store, failed because another rank is gone."""
    if isinstance(error, dist.DistNetworkError):
        return True
    of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    return of_collective and LOST.search(str(error)) is not None


def _store() -> dist.Store:
    """The key-value store by which the ranks find each other."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    return next(dist.rendezvous("env://"))[0]


def _was_reported(within: float, if_store_ended: bool) -> bool:
    """Whether a rank has reported an error, or does so within some seconds.

    if_store_ended: the result where the store has ended; rank 0 may have kept it.
    """
    found = False

    def look() -> None:
        nonlocal found
        deadline = time.monotonic() + within
        try:
            store = _store()
            while not found and time.monotonic() < deadline:
                found = store.check([REPORTED])
                time.sleep(0.05)
        except dist.DistNetworkError:
            found = if_store_ended

    # In a thread, because a host that has vanished never answers.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(within)
    return found
