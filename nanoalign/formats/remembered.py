"""records.npz in the folder of a run: which records it was trained on, and which it held out.

Hashes of 8 bytes (rows.record_digests), so a million pairs take about 17 MB:

    trained    (N,) uint64   prompts with their responses that the run was trained on, each once
    prompts    (P,) uint64   their prompts, each once
    held_out   (M,) uint64   the held-out records, in their order
    sources    (K, 2) text   name and place of the sources of these
    format     ()            version of this file

A model that is trained further has in the first two also those of the runs before.
"""

import zipfile
from pathlib import Path

import numpy as np

from nanoalign.checkpoints.runs import RECORDS, RECORDS_FORMAT
from nanoalign.errors import RunError, in_a_line


def recall(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of the file; None for a model of another program, which has no such file."""
    if not (path := folder / RECORDS).exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickled objects
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} can't be read: {in_a_line(error)}; remove it") from error
    if found.get("format") != RECORDS_FORMAT:
        raise RunError(
            f"{path} has the format {found.get('format', 0)} of another version of nanoalign, not "
            f"{RECORDS_FORMAT}; remove it, which forgets what that run was trained on"
        )
    return found
