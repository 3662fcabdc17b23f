"""Training records whose prompts are also among the held-out ones."""

from collections.abc import Sequence

import numpy as np

from nanoalign.distributed import print0
from nanoalign.formats.sources import HELD_OUT


def training_mask(training: np.ndarray, held_out: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """A mask (N,) of the records to train on; prints how many share a prompt with held-out ones.

    training, held_out: rows.record_digests, (N, 3) and (M, 3). sources: those of --eval_data.
    Records of held_out:RUN must not be trained on, so those that share a prompt with them are left
    out. Other sources may be the training data themselves, so all of them stay.
    """
    shared = np.isin(training[:, 0], held_out[:, 0])
    left_out = any(HELD_OUT in source for source in sources)
    if shared.any():
        what = "are left out of --data" if left_out else "of --data are trained on"
        print0(f"{'shared':<11} {shared.sum():,} records with prompts of --eval_data {what}")
    return ~shared if left_out else np.ones_like(shared)
