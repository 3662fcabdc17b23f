"""--save_dtype bf16: the files of a result in half the size, and what that rounds away."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoalign.errors import RunError

WEIGHTS = "model*.safetensors"


def round_result(out: Path, start: Path) -> str:
    """Rounds the float32 weights in `out` to bfloat16, in place, and returns what that lost.

    start: the folder of the model that training began with. Raises RunError if the disk is full.
    """
    before = {name: path for path in start.glob(WEIGHTS) for name in names_of(path)}
    changed = kept = 0
    for path in sorted(out.glob(WEIGHTS)):
        rounded = {}
        for name, tensor in tensors_of(path):
            rounded[name] = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            if name in before and (old := tensor_of(before[name], name)).shape == tensor.shape:
                changed += int((tensor != old.to(tensor.dtype)).sum())
                kept += int((rounded[name] != old.bfloat16()).sum())
        write(rounded, path)
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    index = out / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text())
        total = sum(t.nbytes for path in out.glob(WEIGHTS) for _, t in tensors_of(path))
        values["metadata"]["total_size"] = total
        index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    share = f"{kept / changed:.1%}" if changed else "none"
    return (
        f"bfloat16: {share} of the {changed:,} weights that training changed differ from the start "
        "after rounding; --save_dtype fp32 keeps all"
    )


def names_of(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            yield name, file.get_tensor(name)


def tensor_of(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Replaces a file when the new one is complete."""
    partly, mode = path.with_name(f".{path.name}.partial"), path.stat().st_mode
    try:
        save_file(tensors, partly, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        partly.unlink(missing_ok=True)
        raise RunError(f"'{path}' could not be rounded to bfloat16: {error}") from error
    partly.chmod(mode)
    os.replace(partly, path)
