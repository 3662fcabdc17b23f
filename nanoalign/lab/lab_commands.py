"""The commands of `python -m nanoalign.lab` and their flags.

This file imports neither torch nor numpy, so that the list and each --help take no second.
"""

import argparse
import ast
import math
from pathlib import Path

from nanoalign.errors import RunError, check_words

DOC = "The lab: one pair from text to gradient, exercises, and experiments on the embedded data."
EXERCISES = 24
# Experiments whose files can't have the names of their commands.
ALIASES = {"conflicts": "several", "other_losses": "losses"}


def question_of(path: Path) -> str:
    """The QUESTION of an experiment, from its text: to import it takes seconds."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "QUESTION":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no QUESTION")


# Command -> question; perform.py has the modules.
EXPERIMENTS = {
    ALIASES.get(path.stem, path.stem): question_of(path)
    for path in sorted(Path(__file__).with_name("experiments").glob("*.py"))
    if path.stem != "__init__"
}
COMMANDS = {
    "walk": "One pair from text to gradient, with the file and line of each step.",
    "check": "Checks solutions of the exercises of docs/exercises.md.",
    "grade": "The mean true reward of a policy's answers to held-out prompts.",
    "world": "The facts and the rule of the world tiny:SEED, which its labels were drawn by.",
    "golden": "Inputs, values and gradients of all losses as JSON, for tests of other frameworks.",
    "speedrun": "The true reward of a policy after 60 CPU seconds of training by an entry.",
    "homework": "A reward model, DPO and their evaluation as one page, with questions.",
} | EXPERIMENTS


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help and without abbreviations; an error is a RunError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> None:
        raise RunError(f"{message} (see {self.prog} --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command; args.command is None without one. Raises RunError."""
    check_words(argv)
    parser = Parser(prog="python -m nanoalign.lab", description=DOC)
    commands = parser.add_subparsers(dest="command", metavar="command")
    adds = {
        name: commands.add_parser(name, description=text, help=text).add_argument
        for name, text in COMMANDS.items()
    }

    add = adds["walk"]
    add("--record", type=int, default=3, help="which record of the embedded data, from 1")
    add("--rm", action="store_true", help="walk through a reward model in place of a policy")
    add("--beta", type=positive, default=0.1, help="beta of the DPO loss")
    add("--lr", type=positive, default=5e-4, help="learning rate of the one step of AdamW")
    add("--stop", type=int, metavar="N", help="open the debugger before place N")

    add = adds["check"]
    add("numbers", type=exercise, metavar="NUMBER", help="of the exercise, or all")
    add("file", nargs="?", type=Path, help="the Python file with the function, or a folder of them")
    add("--hint", action="store_true", help="print a hint, and check nothing")
    add("--stop", action="store_true", help="debug the function on the first input that fails")
    add("--seed", default="0", metavar="STUDENT", help="any text: other inputs for each student")
    add("--json", action="store_true", help="print the scores as Gradescope reads them")

    add = adds["grade"]
    add("policy", help="a folder, for example runs/dpo, OWNER/NAME on the Hub, or 'tiny'")
    add("--world", type=int, metavar="SEED", help="the world tiny:SEED of the policy's data")
    add("--seed", type=int, default=0, help="random seed for sampling")
    adds["world"]("world", type=int, metavar="SEED", help="a number")
    add = adds["golden"]
    add("--out", default="runs/golden.json", metavar="FILE", help="a .json file, which is replaced")

    add = adds["speedrun"]
    add("entry", type=Path, help="a Python file with FLAGS: docs/speedrun.md")
    add("--against", type=Path, metavar="ENTRY", help="print the difference from this one, too")
    add = adds["homework"]
    add("--data", default="tiny", metavar="SOURCE", help="preference pairs")
    add("--model", default="tiny", help="the base: a folder, OWNER/NAME, or 'tiny'")
    add("--out", type=Path, default=Path("runs/homework"), metavar="FOLDER", help="for all files")

    for name in EXPERIMENTS:
        add = adds[name]
        add("--quick", action="store_true", help="one seed and less data")
        add("--seeds", type=int, nargs="+", help="of all trainings; default: 0 1 2, with --quick 0")
        text = (
            f"the page in it, {name}/index.html, is replaced (with --quick or --seeds the folder's"
        )
        text += " name says so); results of commands are kept in made/"
        add("--out", default="runs/lab", metavar="FOLDER", help=text)
    return parser.parse_args(argv)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def exercise(text: str) -> list[int]:
    """The numbers of the exercises that a word names: its own, or "all"."""
    numbers = range(1, EXERCISES + 1)
    if text == "all":
        return [*numbers]
    if not text.isdecimal() or int(text) not in numbers:
        raise argparse.ArgumentTypeError(f"expected a number of 1 to {EXERCISES}, or all: '{text}'")
    return [int(text)]


def overview() -> str:
    """The commands, a line each, the experiments last."""
    lines = [f"    {name:<13}{text}" for name, text in COMMANDS.items()]
    return "\n".join([DOC, "", *lines, "", "python -m nanoalign.lab COMMAND --help"])
