"""The error that is meant for the user, and the check of what is installed. Imports no package."""

import sys
from importlib.metadata import PackageNotFoundError, version

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


def in_a_line(error: BaseException) -> str:
    """The error of another library in one line: its type, and 300 letters of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


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
