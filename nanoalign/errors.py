"""The error that is meant for the user."""


class RunError(ValueError):
    """A mistake that the user can mend: an input, a flag, a folder.

    The message says what is wrong, the value that was found, and what to do. Scripts print the
    message alone, once, and exit with code 1; any other exception is a defect and keeps its
    traceback.
    """


def in_a_line(error: BaseException) -> str:
    """The error of another library in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
