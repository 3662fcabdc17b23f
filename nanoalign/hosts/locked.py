"""What a run does that did not get its lock, or ends before it has written anything."""

import errno
import os
from pathlib import Path

from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.hosts.lock import NAME, held

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
