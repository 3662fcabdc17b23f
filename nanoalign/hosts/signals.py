"""Signals end a run after its step: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C. stopped.py is the end."""

import os
import signal
import threading
from collections.abc import Callable

import torch
from torch.distributed import ReduceOp

from nanoalign.distributed import World, sum_over_ranks

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
Save = Callable[[int, bool, dict[str, float]], bool | None]


class Received:
    """The signal that has arrived inside of `with`, or 0. The same one again ends the process."""

    def __enter__(self) -> None:
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            self.before = {number: signal.signal(number, self.handle) for number in NUMBERS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if number == self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = self.number or number  # torchrun sends SIGTERM after Ctrl-C

    def of_any_rank(self, world: World) -> int:
        """The signal of this or another rank. A collective."""
        if world.size == 1:
            return self.number
        return int(sum_over_ranks(torch.tensor(self.number), ReduceOp.MAX))


received = Received()


def stopping(save: Save, stop: Callable[[int, int], Exception], world: World) -> Save:
    """The `save` of loop.train that also raises what `stop` returns for a step and a signal."""

    def save_or_stop(step: int, last: bool, metrics: dict[str, float]) -> bool | None:
        complete, number = save(step, last, metrics), received.of_any_rank(world)
        if number and not last and complete is None:
            raise stop(step, number)
        return complete

    return save_or_stop
