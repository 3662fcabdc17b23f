"""One writer of a folder at a time, by a lock that the operating system frees when it ends."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from nanoalign.distributed import print0
from nanoalign.errors import RunError

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
        return not_locked(file, path, what, error)
    held[path] = file
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


# How file systems say that they have no locks.
WITHOUT = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF}


def not_locked(file: int, path: Path, what: str, error: OSError) -> None:
    """Raises RunError if another process has the lock; prints that a file system has no locks.

    file: the descriptor, which is closed. path: of the file. what: the flag and its value.
    """
    holder = " ".join(os.read(file, 200).decode(errors="replace").split())
    os.close(file)
    if isinstance(error, BlockingIOError):
        raise RunError(
            f"{what} is being written by {holder or 'another process'}; wait until it has ended, "
            "or give another --out"
        )
    if error.errno not in WITHOUT:
        raise error
    print0(f"{'lock':<11} none: {path.parent} has no file locks; let one run at a time write there")


def let_go(path: Path) -> None:
    """Removes a lock of this process, if it has it: another one may make the file anew."""
    if path in held:
        path.unlink(missing_ok=True)
        os.close(held.pop(path))


def leave_nothing() -> None:
    """Removes a lock beside a folder, and a folder that has nothing else in it than its lock."""
    for path in filter(Path.exists, held):
        if path.name != NAME:
            path.unlink()
        elif [path] == list(path.parent.iterdir()):
            path.unlink()
            path.parent.rmdir()
