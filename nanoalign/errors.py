"""The error that is meant for the user."""


class RunError(ValueError):
    """A mistake that the user can mend: its message names what is wrong, the value, what to do.

    Scripts print the message alone and exit with code 1. Other exceptions keep their traceback.
    """


def in_a_line(error: BaseException) -> str:
    """The error of another library in one line: its type, 300 characters of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
