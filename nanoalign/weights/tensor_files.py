"""The safetensors files of a model folder: what they store, and how they are written.

A model is one file, model.safetensors, or several of which model.safetensors.index.json names the
tensors of each.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line, read_json

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 4 * 2**30  # rank 0 has the tensors of one file in host memory


class Stored(NamedTuple):
    """Where a tensor is stored, and its shape."""

    file: Path
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Maps the name of each tensor of a model folder to where it is stored.

    Files that the index does not name are not read.
    Raises RunError if there is no safetensors file, or if one is missing or damaged.
    """
    stored = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                stored[name] = Stored(path, tuple(file.get_slice(name).get_shape()))
    return stored


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that store the weights of a model folder.

    Raises RunError if there is none, if one is missing, or if the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [folder / SINGLE_FILE]
        raise RunError(
            f"model folder '{folder}' has no weights: neither {SINGLE_FILE} nor {INDEX} (other "
            "formats are not read; convert them with transformers' save_pretrained)"
        )
    names = names_in_index(index)
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunError(f"{index}: names the file {name[:200]}, outside its folder; correct it")
        if not (folder / name).is_file():
            raise RunError(f"{index}: names the file {name}, which is missing; restore it")
    return [folder / name for name in names]


def names_in_index(index: Path) -> list[str]:
    """Returns the names of the files of an index, sorted. Raises RunError if it is damaged."""
    try:
        return sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{index}: not an index of files: {in_a_line(error)}; restore the file"
        ) from error


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """A context with an open file, of which tensors or slices are read.

    Raises RunError if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise RunError(
            f"{path}: not a readable safetensors file: {in_a_line(error)}; restore the file"
        ) from error


def read_tensor(stored: dict[str, Stored], name: str) -> Tensor:
    """Returns a whole tensor from its file. stored: the result of stored_tensors."""
    with open_safetensors(stored[name].file) as file:
        return file.get_tensor(name)


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes tensors, by their names, to a model folder that has its config.json.

    A file has at most MAX_FILE_BYTES, or one tensor that is larger. The tensors of one file are in
    memory at a time. Raises OSError if the disk is full.
    """
    names, total_bytes = [], 0  # names: of the tensors of each file
    for group in groups_of_files(tensors):
        path = folder / f"unnamed-{len(names)}.safetensors"  # until the number of files is known
        save(group, path, folder / "config.json")
        names.append(list(group))
        total_bytes += sum(tensor.nbytes for tensor in group.values())
        group.clear()  # its memory, before the next tensors are gathered
    weight_map = {}
    for i, names_of_file in enumerate(names):
        file_name = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        file_name = file_name if len(names) > 1 else SINGLE_FILE
        (folder / f"unnamed-{i}.safetensors").rename(folder / file_name)
        weight_map |= dict.fromkeys(names_of_file, file_name)
    if len(names) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save(tensors: dict[str, Tensor], path: Path, like: Path) -> None:
    """Writes a safetensors file. like: a file whose permissions it gets. Raises OSError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path.parent}: {error}") from error
    path.chmod(like.stat().st_mode)  # by itself safetensors lets the owner alone read the file


def groups_of_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of each file, by their names, as copies."""
    group, size = {}, 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor.clone(memory_format=torch.contiguous_format)  # no views
        size += tensor.nbytes
    yield group
