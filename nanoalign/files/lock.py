"""One process at a time writes to a folder: a lock that the operating system frees when it ends."""

import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.files.writing import check_no_link

NAME = ".lock"  # of the file that is locked, in the folder
locks: dict[Path, FileLock] = {}  # the locks of this process, by the path of their file
# The errors by which file systems say that they have no locks.
WITHOUT_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
WITHOUT_LOCKS |= {errno.EINVAL, errno.EBADF}


def hold(path: Path, flag: str) -> None:
    """Creates a file and locks it until this process ends. Rank 0 alone calls it.

    Does nothing if this process has the lock. On a file system without locks a line is printed
    instead. flag: the flag that names the folder, and its value, for errors.
    Raises RunError if another process has the lock, or the file is a link.
    """
    check_no_link(path)
    path = Path(os.path.realpath(path))
    if path in locks:
        if path.exists():
            return
        locks.pop(path).release()  # somebody has removed the file, and may have made a new one
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = " ".join(path.read_text(errors="replace")[:200].split())
        raise RunError(
            f"{flag} is being written by {holder or 'another process'}; wait until it has ended, "
            "or give another --out"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        folder = path.parent
        return print0(
            f"{'lock':<11} none: {folder} has no file locks; let one run at a time write there"
        )
    locks[path] = lock
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def release(path: Path) -> None:
    """Removes a locked file, if this process has its lock: another process may create it anew."""
    if path in locks:
        path.unlink(missing_ok=True)
        locks.pop(path).release()


def remove_empty_folders() -> None:
    """Removes each locked file of this process that is alone in its folder, and the folder.

    A locked file that lies beside a folder of results, as that of an evaluation, is removed alone.
    """
    for path in filter(Path.exists, locks):
        if path.name != NAME:
            path.unlink()
        elif [path] == list(path.parent.iterdir()):
            path.unlink()
            path.parent.rmdir()
