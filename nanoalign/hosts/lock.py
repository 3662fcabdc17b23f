"""One writer of a folder at a time, by a lock that the operating system frees when it ends."""

import fcntl
import os
import socket
from pathlib import Path

NAME = ".lock"
held: dict[Path, int] = {}  # the file of each lock of this process, and its descriptor


def hold(path: Path, what: str) -> None:
    """Locks a file, which is made, until this process ends. Rank 0 alone.

    what: the flag and its value, for errors. Raises RunError if another process has the lock.
    """
    path = Path(os.path.realpath(path))
    if path in held and path.exists():
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        from nanoalign.hosts.locked import not_locked

        return not_locked(file, path, what, error)
    held[path] = file
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
