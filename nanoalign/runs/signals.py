"""Signals end a run after its step: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C. guards.py is the end."""

import os
import signal
import threading
import time

import torch
from torch.distributed import ReduceOp

from nanoalign.distributed import sum_over_ranks

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ONE_EVENT = 1.0  # seconds in which signals are of one event: that torchrun dies, for example


class Received:
    """The signal that has arrived inside of `with`, or 0. If it comes again, the process ends."""

    def __enter__(self) -> None:
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            self.before = {number: signal.signal(number, self.handle) for number in NUMBERS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if number == self.number and time.monotonic() > self.since + ONE_EVENT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.number:  # torchrun sends SIGTERM after Ctrl-C
            self.number, self.since = number, time.monotonic()

    def of_any_rank(self) -> int:
        """The signal of this or another rank. A collective."""
        return int(sum_over_ranks(torch.tensor(self.number), ReduceOp.MAX))


received = Received()
