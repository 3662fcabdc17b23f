"""--args FILE: the flags of the run that wrote an args.json."""

import argparse
import json
from pathlib import Path

from nanoalign.checkpoints.runs import versions
from nanoalign.errors import RunError, in_a_line

# Of a new run, or not flags.
OTHERS = {"args", "argv", "out", "overwrite", "ranks", "resume", *versions()}


def expand(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The flags in the file of --args, and behind them the command line, whose flags count more.

    Raises RunError if the file can't be read.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--args")
    path = Path(finder.parse_known_args(argv)[0].args)
    try:
        values = json.loads(path.read_text())
        values = {name: value for name, value in values.items() if name not in OTHERS}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"--args {path}: no args.json of a run: {in_a_line(error)}") from error
    switches = {a.dest for a in parser._actions if isinstance(a, argparse.BooleanOptionalAction)}
    words: list[str] = []
    for name, value in values.items():
        if value is True or (value is False and name in switches):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value not in (None, False, []):
            words.append(f"--{name}={value}")  # which may begin with a minus
    return words + argv
