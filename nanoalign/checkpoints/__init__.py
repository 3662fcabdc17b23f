"""What a run reads and writes of models, and how it is resumed.

folders.py      names of models -> local folders
guards.py       what is refused before training: folders, tokens, settings
slices.py       weight files -> sharded parameters: each rank reads its own slices
write.py        sharded parameters -> weight files in Hugging Face format
resume.py       checkpoints of a run, and the way back
curves.py       what a run draws and prints at its end
intervals.py    confidence intervals of shares
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number

    add, count = parser.add_argument_group("checkpoints").add_argument, number(int, 1)
    add("--save_every", type=count, metavar="STEPS",
        help="write a checkpoint every so many steps, and at the end; default: none")  # fmt: skip
    add("--keep", type=count, default=2, help="checkpoints that are kept, the newest ones")
    add("--stop_after", type=count, metavar="STEP",
        help="end the run after this step, with a checkpoint")  # fmt: skip
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
