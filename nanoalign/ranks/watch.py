"""Ends a run in which a rank hangs, long before --timeout, with a line that names the rank.

A rank that waits in an exchange can't know whether another one is slow or hangs. Once the length of
a step is known, a thread of each rank watches whether steps end.
"""

import os
import statistics
import sys
import threading
import time
from collections import deque

from nanoalign.distributed import World
from nanoalign.files.text import in_short
from nanoalign.ranks.report import REPORTED, store_of_ranks

LEAST, STEPS = 120.0, 20  # a step may take so many seconds, and so many times the median step
KNOWN = 3  # steps after which the median counts
ANSWER_SECONDS = 5.0  # that a rank waits for the others to tell where they are
KEY = "nanoalign/stands/"  # of the store, with the rank: "ALARM PLACE" of that rank
DEBUGGER = ("pdb.py", "bdb.py", "cmd.py")  # a person looks at a rank there


class Watch:
    """Watches the steps of a run on several ranks. Evaluations and checkpoints are not watched.

    `begin` and `end` are called where a step begins and ends, on every rank.
    """

    def __init__(self, world: World):
        self.world, self.began = world, None  # when the step began; None: between two steps
        self.seconds: deque[float] = deque(maxlen=101)  # of the last steps
        # Alarms of this rank, more than one after a stay in a debugger, and what the ranks told in
        # the last one: the store still has it, when a rank no longer answers.
        self.alarms, self.told = 0, {}

    def begin(self) -> None:
        if self.world.size > 1 and not self.seconds:
            threading.Thread(target=self.look, daemon=True).start()
        self.began = time.monotonic()

    def end(self) -> None:
        if self.began is not None:
            self.seconds.append(time.monotonic() - self.began)
        self.began = None

    def limit(self) -> float:
        """Seconds after which a step counts as hanging."""
        if len(self.seconds) < KNOWN:
            return float("inf")
        return max(LEAST, STEPS * statistics.median(self.seconds))

    def look(self) -> None:
        """Runs in a thread until the process ends."""
        while True:
            time.sleep(LEAST / 100)
            began = self.began
            if began is not None and time.monotonic() - began > self.limit():
                self.stop(began)

    def stop(self, began: float) -> None:
        """Ends this process, unless the step has ended since, or a rank is in a debugger.

        The first rank that answers prints where the ranks are.
        """
        places: dict[int, str] = {}
        # In a thread, because the store may be on a host that never answers.
        exchange = threading.Thread(target=self.exchange, args=(began, places), daemon=True)
        exchange.start()
        exchange.join(2 * ANSWER_SECONDS)
        places.setdefault(self.world.rank, place_of_main_thread())
        if not self.hangs(began, places):
            return
        if self.world.rank == min(places):
            line = in_short(self.describe(places, time.monotonic() - began))
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(ANSWER_SECONDS)  # torchrun ends all ranks when the first one exits
        os._exit(1)

    def hangs(self, began: float, places: dict[int, str]) -> bool:
        """Whether the step that began then still runs, and no rank is in a debugger."""
        in_debugger = any(place.startswith(DEBUGGER) for place in places.values())
        return self.began == began and not in_debugger

    def exchange(self, began: float, places: dict[int, str]) -> None:
        """Tells the other ranks where this one is, and adds to `places` where they are.

        If the step hangs, notes in the store that it is reported.
        """
        store, ranks = store_of_ranks(), range(self.world.size)
        self.alarms += 1
        store.set(f"{KEY}{self.world.rank}", f"{self.alarms} {place_of_main_thread()}")
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(places) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if rank not in places and store.check([f"{KEY}{rank}"]):
                    told = store.get(f"{KEY}{rank}").decode()
                    if told != self.told.get(rank):
                        self.told[rank], places[rank] = told, told.partition(" ")[2]
            time.sleep(ANSWER_SECONDS / 100)
        if self.hangs(began, places):
            store.set(REPORTED, "yes")

    def describe(self, places: dict[int, str], seconds: float) -> str:
        """Returns the text of the error. places: by the rank; a rank without one hangs."""
        silent = [rank for rank in range(self.world.size) if rank not in places]
        listed = ", ".join(f"rank {rank} is at {place}" for rank, place in places.items())
        if silent:
            listed = f"rank {' '.join(map(str, silent))} does not answer; {listed}"
        return (
            f"a step has not ended for {seconds:.0f} s, where one takes "
            f"{statistics.median(self.seconds):.3g} s: {listed}. The run continues from its newest "
            "checkpoint with --resume"
        )


def place_of_main_thread() -> str:
    """Returns file, line and function that the main thread is at."""
    frame = sys._current_frames()[threading.main_thread().ident]
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_name})"
