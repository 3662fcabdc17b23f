"""The lab: one pair from text to gradient, exercises, and experiments on the embedded data."""

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
COMMANDS = {
    "walk": "One pair from text to gradient, with the file and line of each step.",
    "golden": "Inputs, values and gradients of all losses as JSON, for tests of other frameworks.",
    "check": "Checks a solution of an exercise of docs/exercises.md.",
    "pipeline": "From the pretrained base to a policy: demonstrations, pairs, own answers.",
} | {name: experiment.QUESTION for name, experiment in EXPERIMENTS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="command")

    def parser_of(name: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, doc=COMMANDS[name], help=COMMANDS[name])

    add = parser_of("walk").add_argument
    add("--record", type=number(int, 1), default=1, help="which record of the embedded data")
    add("--beta", type=positive, default=0.1, help="beta of the DPO loss")
    add("--lr", type=positive, default=5e-4, help="learning rate of the one step of AdamW")
    add(
        "--stop",
        type=number(int, 1, PLACES + 1),
        metavar="N",
        help=f"open the debugger before place N, of 1 to {PLACES}",
    )

    add = parser_of("golden").add_argument
    add("--out", default="runs/golden.json", metavar="FILE", help="a .json file, which is replaced")

    add = parser_of("check").add_argument
    add("number", type=number(int, 1, 11), help="number of the exercise")
    add("file", help="the Python file with the function")
    add("--stop", action="store_true", help="open the debugger at the first input that fails")

    add = parser_of("pipeline").add_argument
    add("--out", default="runs/lab/pipeline", metavar="FOLDER", help="a new folder")
    add("--quick", action="store_true", help="8 steps of each training, and 100 prompts")
    add("--seed", type=number(int, 0), default=0, help="random seed for sampling")

    for name in EXPERIMENTS:
        add = parser_of(name).add_argument
        add("--quick", action="store_true", help="one seed and less data")
        add(
            "--out",
            default="runs/lab",
            metavar="FOLDER",
            help=f"the page in it, {name}/index.html or {name}-quick/index.html, is replaced; "
            "results of commands are kept in made/",
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
    """The commands, a line each, the experiments last."""
    lines = [f"    {name:<13}{doc}" for name, doc in COMMANDS.items()]
    return "\n".join([__doc__, "", *lines, "", "python -m nanoalign.lab COMMAND --help"])


if __name__ == "__main__":
    run(main, report.report)
