"""Files that hold a tied tensor under several names."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nanoalign.errors import RunError


def check_tied(
    names: Iterable[tuple[str, ...]], read: dict[str, Callable[[], Tensor]], folder: Path
) -> None:
    """Raises RunError where two names of one tensor have other values: one would be ignored.

    names: of each tensor, all that the model gives it. read: returns the tensor of a name that the
        files have. Ranks that read the same files raise together.
    """
    for first, *others in ([name for name in each if name in read] for each in names):
        for other in others:
            if not torch.equal(read[first](), read[other]()):
                raise RunError(
                    f"model folder '{folder}': {first} and {other} are one tensor of the model, by "
                    'config.json, but differ in the files; write "tie_word_embeddings": false '
                    "into config.json, or remove the wrong one"
                )


def read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
