"""The one error that is meant for the person at the keyboard."""


class RunError(ValueError):
    """Something that the person who started the run can mend: an input, a flag, a folder.

    Its message says what was wrong, the value that was found, and what to do. Scripts print that
    message alone, once, and exit with code 1; any other exception is a defect and keeps its
    traceback.
    """


def in_a_line(error: BaseException) -> str:
    """Another library's error in one line of ours: its kind, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
