"""Checks before a run. Importing this ends a script whose Python or packages are not enough.

first_step.py   scores of a batch are those of the model's own forward; losses at the start are ln 2
refusals.py     their errors
"""

import sys
from importlib.metadata import PackageNotFoundError, version

PYTHON = (3, 11)
# The lower ends of requirements.txt, of the packages of which a run needs what older ones lack.
PACKAGES = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 8), "numpy": (2, 1),
            "tqdm": (4, 67), "matplotlib": (3, 9)}  # fmt: skip


def missing() -> str:
    """What a run lacks, and what to do; empty if it lacks nothing. Imports none of the packages."""
    if sys.version_info < PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        return f"this is Python {found}, and nanoalign needs 3.11 or newer"
    if sys.platform == "win32":
        return "nanoalign runs on Linux and macOS; on Windows, in WSL"
    lacking = []
    for name, lowest in PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name} is not installed")
            continue
        if tuple(map(int, found.split("+")[0].split(".")[:2])) < lowest:
            lacking.append(f"{name} {found} is older than {'.'.join(map(str, lowest))}")
    return f"{', '.join(lacking)}: pip install -r requirements.txt" if lacking else ""


def interrupted(kind: type, error: BaseException, trace: object) -> None:
    """sys.excepthook: Ctrl-C while packages are imported, which takes seconds, is one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = interrupted if sys.excepthook is sys.__excepthook__ else sys.excepthook
if problem := missing():
    sys.exit(f"error: {problem}")
