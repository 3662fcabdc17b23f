"""records.npz in the folder of a run: which records it was trained on, and which it held out.

Hashes of 8 bytes (split.record_digests), so a million pairs take about 17 MB:

    trained    (N,) uint64   prompts with their responses that the run was trained on, each once
    prompts    (P,) uint64   their prompts, each once
    held_out   (M,) uint64   the held-out records, in their order
    sources    (K, 2) text   name and place of the sources of these
    format     ()            version of this file

A model that is trained further has in the first two also those of the runs before.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanoalign.data.split import Data
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.files.run_folder import RECORDS, RECORDS_FORMAT
from nanoalign.files.text import in_a_line

# Of each array of texts or hashes: the kind of its type, as in numpy, and its dimensions.
ARRAYS = {"trained": ("u", 1), "prompts": ("u", 1), "held_out": ("u", 1), "sources": ("U", 2)}


def recall(folder: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of records.npz in the folder of a run; None if it has no such file.

    Raises RunError for a file that can't be read, or that another version has written.
    """
    if not (path := folder / RECORDS).exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickled objects
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # of zipfile, zlib and numpy, of any kind
        raise RunError(f"{path} can't be read: {in_a_line(error)}; remove it") from error
    if arrays.get("format") != RECORDS_FORMAT:
        raise RunError(
            f"{path} has the format {arrays.get('format', 0)} of another version of nanoalign, not "
            f"{RECORDS_FORMAT}; remove it, which forgets what that run was trained on"
        )
    for name, kind in ARRAYS.items():
        if (array := arrays.get(name)) is None or (array.dtype.kind, array.ndim) != kind:
            raise RunError(
                f"{path} is damaged: it has no array '{name}' as a run writes it; remove it"
            )
    return arrays


def held_out_by(run: Path, place: str) -> dict[str, np.ndarray]:
    """Returns the arrays of records.npz of a run. place: the data source, for errors.

    Raises RunError if the folder is of no run, or the run held nothing out.
    """
    arrays = recall(run)
    if arrays is None:
        raise RunError(
            f"data source '{place}': there is no {run / RECORDS}; give the folder of a run of "
            "train_rm.py or train_dpo.py"
        )
    if arrays["sources"].shape[1:] != (2,):
        raise RunError(f"{run / RECORDS} is damaged: its 'sources' are no pairs; remove it")
    if not len(arrays["held_out"]):
        raise RunError(
            f"data source '{place}': that run held nothing out (--eval_share 0); give other data"
        )
    return arrays


def training_mask(training: np.ndarray, held_out: np.ndarray, leave_out: bool) -> np.ndarray:
    """Returns a mask (N,) of the records to train on: all, or those without a held-out prompt.

    Prints how many records share a prompt with held-out ones, if any do.
    training, held_out: split.record_digests, (N, 3) and (M, 3).
    leave_out: whether those are left out. What held_out:RUN names must stay unseen; other
        --eval_data may be the training data.
    """
    shared = np.isin(training[:, 0], held_out[:, 0])
    if shared.any():
        what = "are left out of --data" if leave_out else "of --data are trained on"
        print0(f"{'shared':<11} {shared.sum():,} records with prompts of --eval_data {what}")
    return ~shared if leave_out else np.ones_like(shared)


def record_arrays(
    data: Data, folder: Path, origins: Sequence[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """Returns the arrays of records.npz (above) for a run.

    folder: of the model that is trained, whose own records.npz, if any, has earlier records.
    origins: (name, absolute place) of the sources of what is held out.
    """
    trained, held_out = data.digests
    before = recall(folder) or {}
    return {
        "trained": np.union1d(trained[:, 1], before.get("trained", trained[:0, 1])),
        "prompts": np.union1d(trained[:, 0], before.get("prompts", trained[:0, 0])),
        "held_out": held_out[:, 2],
        "sources": np.array(origins),
        "format": np.array(RECORDS_FORMAT),
    }
