"""The error that is meant for the user, and checks before a run. Imports no package."""

import sys
from importlib.metadata import PackageNotFoundError, version

CONTROLS = {chr(n) for n in (*range(9), *range(11, 32), *range(127, 160))}  # but tab and newline
PYTHON = (3, 11)  # the oldest version that runs this
# The lower ends of requirements.txt, of the packages of which a run needs what older ones lack.
PACKAGES = {
    "torch": (2, 11),
    "transformers": (5, 17),
    "safetensors": (0, 8),
    "numpy": (2, 1),
    "tqdm": (4, 67),
    "matplotlib": (3, 9),
    "jinja2": (3, 1),
    "filelock": (3, 31),
}


class RunError(ValueError):
    """A mistake that the user can mend: its message names what is wrong, the value, what to do.

    Scripts print the message alone and exit with code 1. Other exceptions keep their traceback. An
    error in data begins with file and line:

        pairs.jsonl:3: the prompt is empty; correct or remove the record
    """


def check_words(argv: list[str] | None) -> None:
    """Raises RunError for control characters in the words of a command line; None: of this one.

    They would reach the terminal with the names of files and models, which are printed.
    """
    for word in sys.argv[1:] if argv is None else argv:
        if CONTROLS & {*word}:
            raise RunError(f"{word!r} has control characters; give or rename it without them")


def check_versions() -> None:
    """Raises RunError for a Python, a system or packages on which a run can't work.

    It reads the versions of the installed packages and imports none of them.
    """
    if sys.version_info < PYTHON:
        raise RunError(f"nanoalign needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    if sys.platform == "win32":
        raise RunError("nanoalign runs on Linux and macOS; on Windows, in WSL")
    lacking = []
    for name, lowest in PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name} is not installed")
            continue
        if tuple(map(int, found.split("+")[0].split(".")[:2])) < lowest:
            lacking.append(f"{name} {found} is older than {'.'.join(map(str, lowest))}")
    if lacking:
        raise RunError(f"{', '.join(lacking)}: pip install -r requirements.txt")
