"""What a run reads and writes of models, and how it is resumed.

folders.py      names of models -> local folders
guards.py       what is refused before training: folders, tokens, settings
slices.py       weight files -> sharded parameters: each rank reads its own slices
convert.py      the same for files with another layout of tensors, by transformers
write.py        sharded parameters -> weight files in Hugging Face format
resume.py       checkpoints of a run: writing them, and continuing from one
curves.py       what a run draws and prints at its end
intervals.py    confidence intervals of shares
"""

import argparse
from argparse import Namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number

    add, count = parser.add_argument_group("checkpoints").add_argument, number(int, 1)
    add("--save_every", type=count, metavar="STEPS",
        help="write a checkpoint every so many steps, and at the end; default: none")  # fmt: skip
    add("--keep", type=count, default=2, help="checkpoints that are kept, the newest ones")
    add("--stop_after", type=count, metavar="STEP",
        help="end the run after this step, with a checkpoint")  # fmt: skip
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """What is wrong with --resume, before anything is loaded; None: nothing."""
    if not args.resume:
        return None
    if args.overwrite:
        return "--resume continues a run and --overwrite replaces it; give one of them"
    from pathlib import Path

    if next((Path(args.out) / "checkpoints").glob("step_*"), None) is None:
        return f"--resume: {args.out} has no checkpoint; --save_every and --stop_after write them"
    return None


def of_run(model, optimizer, objective, rows, args: Namespace, world) -> tuple:
    """(the `save` of loop.train, the step at which the run starts). A collective."""
    if not (args.save_every or args.stop_after or args.resume):
        return (lambda step, last: False), 0
    from nanoalign.checkpoints.resume import Checkpoints

    checkpoints = Checkpoints(model, optimizer, objective, rows, args, world)
    return checkpoints, checkpoints.resume() if args.resume else 0
