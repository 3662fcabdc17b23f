"""What protects a run: room on the disk, checkpoints, signals, a result that can't be written."""

import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ReduceOp

from nanoalign.distributed import sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.files.run_folder import checkpoint_of, complete_checkpoints, resuming
from nanoalign.flags import Parser, number
from nanoalign.loop import Settings
from nanoalign.ranks.collectives import on_main
from nanoalign.ranks.report import Stopped
from nanoalign.ranks.watch import Watch
from nanoalign.runs.best import Best, keeps_best
from nanoalign.runs.checkpoints import Checkpoints, refusal_of_resume

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ONE_EVENT = 1.0  # seconds: within them a repeated signal is of one event, such as torchrun's death


def add_arguments(parser: Parser) -> None:
    add, count = parser.add_argument_group("checkpoints").add_argument, number(int, 1)
    text = "write a checkpoint after every STEPS steps and after the last one; default: never"
    add("--save_every", type=count, metavar="STEPS", help=text)
    add("--keep", type=count, default=2, metavar="COUNT", help="number of checkpoints to keep")
    text = "write a checkpoint after this step and end the run there; default: run to the end"
    add("--stop_after", type=count, metavar="STEP", help=text)
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    text = "save the weights with the lowest held-out loss in place of those of the last step"
    add("--keep_best", action="store_true", help=text)
    text = (
        "end the run after this many evaluations in a row without a lower held-out loss (implies "
        "--keep_best); default: run to the end"
    )
    add("--patience", type=count, metavar="COUNT", help=text)
    text = (
        "type of the saved weights; rounding to bf16 loses small weight changes, and the run "
        "prints the share of changes that remain"
    )
    add("--save_dtype", choices=("fp32", "bf16"), default="fp32", help=text)
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Returns why --resume, --keep_best or --patience is refused, or None."""
    if keeps_best(args) and not (args.eval_data or args.eval_share):
        return "--keep_best and --patience need held-out pairs; give --eval_data or --eval_share"
    if keeps_best(args) and args.fold:
        return "--fold holds out pairs whose labels are doubted; --keep_best would choose by them"
    return refusal_of_resume(args) if args.resume else None


class Signals:
    """A context in which one of SIGNALS is noted and does not end the process.

    If the same one comes again after ONE_EVENT, it ends the process.
    number: of the first signal that came; 0 if none did.
    """

    number, since = 0, 0.0

    def __enter__(self) -> None:
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others can't have handlers
            self.before = {one: signal.signal(one, self.handle) for one in SIGNALS}

    def __exit__(self, *error: object) -> None:
        for signal_number, handler in self.before.items():
            signal.signal(signal_number, handler)

    def handle(self, number: int, frame: object) -> None:
        if number == self.number and time.monotonic() > self.since + ONE_EVENT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.number:  # torchrun sends SIGTERM after Ctrl-C
            self.number, self.since = number, time.monotonic()

    def of_any_rank(self) -> int:
        """The largest number of a signal to any rank; 0 if there was none. A collective."""
        return int(sum_over_ranks(torch.tensor(self.number), ReduceOp.MAX))


@dataclass(eq=False)
class Guard(Checkpoints):
    """Saves a run while it trains, ends it in order, and keeps what was trained if writing fails.

    start: the step from which the run continues. stopped: whether it ended before its last step.
    Making one is a collective. It raises RunError if the disk has less room than the result needs,
    and where --resume can't continue.
    """

    def __post_init__(self):
        args = self.args
        self.start, self.stopped, self.signals = 0, False, Signals()
        self.total = Settings.of(args).total(len(self.rows))
        # First, because its copy of the weights is part of a checkpoint.
        self.best = Best(self.model, self.objective, args.patience) if keeps_best(args) else None
        on_main(self.world, self.check_room)
        if args.save_every or args.stop_after or args.resume:
            self.read_inputs()
        if args.resume:
            self.start = self.resume()
        if self.best and (self.start >= self.total or self.best.is_over()):
            self.best.restore()  # nothing is left to train
            self.start = self.total
        self.watch, after_step = Watch(self.world), self.objective.after_step

        def step_ends(step: int, metrics: dict[str, float]) -> None:
            after_step(step, metrics)
            self.watch.end()

        self.objective.after_step = step_ends

    def check_room(self) -> None:
        """Raises RunError if the disk has less room than the result, and a checkpoint, need."""
        args = self.args
        size = self.model.count_parameters() * (2 if args.save_dtype == "bf16" else 4)
        if args.save_every or args.stop_after:  # a parameter and the two moments of AdamW
            size += 12 * self.model.count_parameters(trainable=True)
        free = shutil.disk_usage(args.out).free
        if free < size:
            raise RunError(
                f"--out {args.out}: the result needs {size / 1e9:.3g} GB, and the disk has "
                f"{free / 1e9:.3g} GB left; make room, or give another --out"
            )

    def save(self, step: int, last: bool, metrics: dict[str, float]) -> bool:
        """The `save` of loop.train: writes a checkpoint if one is due. Returns whether to end.

        At the last step the model gets its best weights, if they are kept. Raises Stopped after a
        signal to any rank, and RunError if a checkpoint can't be written.
        """
        args, out_of_patience = self.args, False
        if self.best:
            self.best.note(step, metrics)
            out_of_patience = self.best.is_over()
        ends = step == args.stop_after
        is_last = last or out_of_patience
        if ends or (args.save_every and (is_last or step % args.save_every == 0)):
            self.write_checkpoint(step)
        if self.best and is_last:
            self.best.restore()
        self.stopped = ends and not last
        number = self.signals.of_any_rank()
        if number and not (is_last or ends):
            self.keep(step)
            command = resuming(sys.argv, self.world.size)
            name = signal.Signals(number).name
            raise Stopped(f"{name}: stopped after step {step}; continue it: {command}", number)
        if not (ends or is_last):
            self.watch.begin()
        return ends or out_of_patience

    def keep(self, step: int) -> Path:
        """Writes a checkpoint of a step, unless the step has one; returns its folder.

        Raises RunError if it can't be written.
        """
        path = checkpoint_of(Path(self.args.out), step)
        if path not in complete_checkpoints(Path(self.args.out)):
            self.write_checkpoint(step)
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which the result is written. If that fails, writes a checkpoint.

        Then raises RunError on all ranks, which says how to finish. A signal waits until the end.
        """
        try:
            with self.signals:
                yield
        except (OSError, RunError) as error:
            try:
                path = self.keep(self.total)
            except (RunError, OSError) as second:
                message = f"{error}; no checkpoint could be written either: {second}"
                raise RunError(message) from error
            command = resuming(sys.argv, self.world.size)
            raise RunError(
                f"{error}; {path} has what was trained. Make room, and finish: {command}"
            ) from error
