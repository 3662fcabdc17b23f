"""Ranks end when their torchrun does, also when that is killed and can't tell them."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


def end_with_parent() -> None:
    """Lets the kernel send SIGTERM when torchrun ends: a training run then writes a checkpoint."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
