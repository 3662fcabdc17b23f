"""Alignment, looked at closely: `python -m nanoalign.lab`.

attack.py       searches for text with a high reward, by the gradient of the reward
walk.py         one pair from text to gradient, through the functions of the scripts
golden.py       inputs, losses and gradients of every loss, for the tests of other frameworks
pipeline.py     from the pretrained base to a policy: demonstrations, pairs, own answers
exercises.py    what the exercises of docs/exercises.md expect

experiments     the questions of alignment, a file each, which says what varies
lab.py          functions that experiments consist of: trainings, evaluations, their grid
figures.py      what the scripts wrote, as arrays
runs.py         runs the scripts, and keeps what they make
estimates.py    intervals over seeds and prompts, and what they say of a guess
findings.py, pictures.py, page.py       what an experiment has found, and its page
"""

import argparse
from pathlib import Path

from nanoalign.distributed import run
from nanoalign.flags import Parser, number, positive
from nanoalign.lab.exercises import EXERCISES, check
from nanoalign.lab.golden import write
from nanoalign.lab.perform import EXPERIMENTS, perform
from nanoalign.lab.pipeline import pipeline
from nanoalign.lab.walk import walk
from nanoalign.ranks import report

PLACES = 13  # of the walk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="command")
    doc = "One pair from text to gradient, with the file and line of each step."
    add = commands.add_parser("walk", doc=doc, help=doc).add_argument
    add("--record", type=number(int, 1), default=1, help="which record of the embedded data")
    add("--beta", type=positive, default=0.1, help="of DPO")
    add("--lr", type=positive, default=5e-4, help="of the one step of AdamW")
    add(
        "--stop",
        type=number(int, 1, PLACES + 1),
        metavar="N",
        help=f"open the debugger before place N, of 1 to {PLACES}",
    )

    doc = "Inputs, losses and gradients of every loss as JSON, for the tests of other frameworks."
    add = commands.add_parser("golden", doc=doc, help=doc).add_argument
    add("--out", default="runs/golden.json", metavar="FILE", help="a .json file, which is replaced")

    doc = "Whether a solution of an exercise of docs/exercises.md is right."
    add = commands.add_parser("check", doc=doc, help=doc).add_argument
    add("number", type=number(int, 1, 11), help="of the exercise")
    add("file", help="the Python file with the function")
    add("--stop", action="store_true", help="open the debugger at the first case that is wrong")

    doc = "From the pretrained base to a policy: demonstrations, pairs, own answers."
    add = commands.add_parser("pipeline", doc=doc, help=doc).add_argument
    add("--out", default="runs/lab/pipeline", metavar="FOLDER", help="which must be new")
    add("--quick", action="store_true", help="8 steps of each training, 100 prompts: some minutes")
    add("--seed", type=number(int, 0), default=0, help="of the answers that are graded")

    for name in EXPERIMENTS:
        doc = EXPERIMENTS[name].QUESTION
        add = commands.add_parser(name, doc=doc, help=doc).add_argument
        add("--quick", action="store_true", help="one seed and less data")
        add(
            "--out",
            default="runs/lab",
            metavar="FOLDER",
            help=f"the page is {name}/index.html in it, or {name}-quick/, and is replaced; what "
            "commands make stays in made",
        )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.lab")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.command is None:
        return print(overview())
    if args.command in EXPERIMENTS:
        return perform(args.command, Path(args.out), args.quick)
    if args.command == "golden":
        return write(args.out)
    if args.command == "check":
        done = check(args.number, Path(args.file), args.stop)
        return print(f"right: {EXERCISES[args.number].name} of {args.file}, on {done} cases")
    if args.command == "pipeline":
        steps, prompts = (8, 100) if args.quick else (None, 600)
        return pipeline(Path(args.out), steps, prompts, args.seed)

    walk(args.record, args.beta, args.lr, args.stop)


def overview() -> str:
    lines = [f"    {name:<13}{EXPERIMENTS[name].QUESTION}" for name in EXPERIMENTS]
    return f"{__doc__}\nexperiments\n{chr(10).join(lines)}"


if __name__ == "__main__":
    run(main, report.report)
