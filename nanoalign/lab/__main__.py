"""python -m nanoalign.lab: the list of commands, their help, and which program runs each."""

import runpy
import sys

from nanoalign.errors import RunError
from nanoalign.lab.lab_commands import overview, parse


def main(argv: list[str] | None = None) -> None:
    command = parse(argv).command
    if command is None:
        return print(overview())
    # Two programs, which parse the same flags: `check` needs few of the imports of the rest.
    program = "check" if command == "check" else "execute"
    runpy.run_module(f"nanoalign.lab.{program}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
