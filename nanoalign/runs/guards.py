"""What guards a run: room on the disk, checkpoints, signals, and a result that can't be written."""

import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch

from nanoalign.batch import Row
from nanoalign.distributed import World
from nanoalign.errors import RunError
from nanoalign.files.run_folder import complete_checkpoints, resuming
from nanoalign.flags import Parser, number
from nanoalign.loop import Objective, Settings, check_parameters
from nanoalign.model import Scorer
from nanoalign.ranks.collectives import on_main
from nanoalign.ranks.report import Stopped
from nanoalign.runs.best import Best, keeps_best
from nanoalign.runs.checkpoints import Checkpoints, refusal_of_resume
from nanoalign.runs.folder import with_flags_of_file
from nanoalign.runs.signals import received


def add_arguments(parser: Parser) -> None:
    add, count = parser.add_argument_group("checkpoints").add_argument, number(int, 1)
    add("--save_every", type=count, metavar="STEPS",
        help="write a checkpoint every so many steps and after the last; default: none is "
        "written")  # fmt: skip
    add("--keep", type=count, default=2, metavar="COUNT", help="how many checkpoints are kept")
    add("--stop_after", type=count, metavar="STEP",
        help="write a checkpoint after this step, and end; default: the last step")  # fmt: skip
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--keep_best", action="store_true",
        help="the weights with the lowest held-out loss become the result, not the last")  # fmt: skip
    add("--patience", type=count, metavar="COUNT",
        help="end the run after so many evaluations without a lower held-out loss, and keep the "
        "best weights; default: it goes on")  # fmt: skip
    add("--args", metavar="FILE",
        help="repeat the run of this args.json; flags beside it count more; default: "
        "none")  # fmt: skip
    add("--save_dtype", choices=("fp32", "bf16"), default="fp32",
        help="type of the weights in --out; rounding to bf16 undoes small changes of weights, and "
        "the run prints how many")  # fmt: skip
    parser.rewrites.append(partial(with_flags_of_file, parser))
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Why --resume or --keep_best is refused, or None. It is called before anything is loaded."""
    if keeps_best(args) and not (args.eval_data or args.eval_share):
        return "--keep_best and --patience need held-out pairs; give --eval_data or --eval_share"
    return refusal_of_resume(args) if args.resume else None


class Guard:
    """Saves a run while it trains, ends it in order, and keeps what was trained if writing fails.

    start: the step from which the run continues. stopped: whether it ended before its last step.
    """

    def __init__(
        self, model: Scorer, optimizer: torch.optim.Optimizer, objective: Objective,
        rows: Sequence[Row], args: Namespace, world: World, folders: dict[str, Path],
    ):  # fmt: skip
        """A collective. folders: of the models that are read, by the flag that names each.

        Raises RunError if the disk has less room than the result needs, and where --resume can't
        continue.
        """
        self.model, self.optimizer, self.objective, self.rows = model, optimizer, objective, rows
        self.args, self.world, self.folders = args, world, folders
        self.total, self.start, self.stopped = Settings.of(args).total(len(rows)), 0, False
        # First, because its copy of the weights is part of a checkpoint.
        self.best = Best(model, objective, args.patience) if keeps_best(args) else None
        on_main(world, self.check_room)
        if args.resume:
            self.start = self.checkpoints.resume()
        if self.best:
            self.start = self.best.resume(self.start, self.total)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Made when it is first needed, since it reads the files of the models. A collective."""
        return Checkpoints(
            self.model,
            self.optimizer,
            self.objective,
            self.rows,
            self.args,
            self.world,
            self.folders,
        )

    def check_room(self) -> None:
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
        """The `save` of loop.train: a checkpoint, if one is due, and whether the run ends here.

        Raises Stopped after a signal to any rank.
        """
        args, is_over = self.args, False
        if self.best:
            self.best.note(step, metrics)
            is_over = self.best.is_over()
        ends = step == args.stop_after
        if ends or (args.save_every and (last or is_over or step % args.save_every == 0)):
            check_parameters(self.model, step)
            self.checkpoints.write(step)
        if self.best and (last or is_over):
            self.best.restore()
        self.stopped = ends and not last
        number = received.of_any_rank()
        if number and not (last or ends or is_over):
            self.keep(step)
            raise Stopped(
                f"{signal.Signals(number).name}: stopped after step {step}; continue it: "
                f"{resuming(sys.argv, self.world.size)}",
                number,
            )
        return ends or is_over

    def keep(self, step: int) -> Path:
        """Writes a checkpoint of a step, unless the step has one; returns its folder."""
        path = self.checkpoints.out / "checkpoints" / f"step_{step:06d}"
        if path not in complete_checkpoints(self.checkpoints.out):
            self.checkpoints.write(step)
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside it the result is written. If that fails, a checkpoint keeps what was trained.

        The error, which is of all ranks, says how to finish. A signal waits until the end.
        """
        try:
            with received:
                yield
        except (OSError, RunError) as error:
            try:
                path = self.keep(self.total)
            except (RunError, OSError) as other:
                raise RunError(
                    f"{error}; no checkpoint could be written either: {other}"
                ) from error
            raise RunError(
                f"{error}; {path} has what was trained. Make room, and finish: "
                f"{resuming(sys.argv, self.world.size)}"
            ) from error
