"""The guard of --reference: a policy and its reference have the same tokens."""

from pathlib import Path

from nanoalign.checkpoints.folders import load_tokenizer
from nanoalign.errors import RunError


def check_vocabulary(folder: Path, other: Path) -> None:
    """Raises RunError if two models have different tokens: log-probabilities can't be compared."""
    if other != folder and load_tokenizer(other).get_vocab() != load_tokenizer(folder).get_vocab():
        raise RunError(
            f"--reference {other} has another vocabulary than --model {folder}; their "
            "log-probabilities can't be compared"
        )
