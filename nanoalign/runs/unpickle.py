"""Reads the files of torch.distributed.checkpoint, which are pickles, without running their code.

A pickle names the functions that build its values. torch calls all of them, for .metadata and for
the objects of a checkpoint (learning rates), so a folder from elsewhere could run anything. The
classes here refuse all names but those of a list.
"""

import io
import pickle
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from nanoalign.files.text import in_a_line

CHECKPOINT = "torch.distributed.checkpoint"
# All that .metadata of a checkpoint names beside dtypes. None of these does more than hold values.
NAMED = {
    f"{CHECKPOINT}.metadata.BytesStorageMetadata",
    f"{CHECKPOINT}.metadata.ChunkStorageMetadata",
    f"{CHECKPOINT}.metadata.Metadata",
    f"{CHECKPOINT}.metadata.MetadataIndex",
    f"{CHECKPOINT}.metadata.StorageMeta",
    f"{CHECKPOINT}.metadata.TensorProperties",
    f"{CHECKPOINT}.metadata.TensorStorageMetadata",
    f"{CHECKPOINT}.metadata._MEM_FORMAT_ENCODING",
    f"{CHECKPOINT}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # as Python 3.13 writes it
}
REFUSED = "which is not part of a checkpoint and was not run"


class Unpickler(pickle.Unpickler):
    """pickle.Unpickler that finds dtypes and NAMED; other names raise UnpicklingError."""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" not in NAMED:
            raise UnpicklingError(f"its .metadata names {module}.{name}, {REFUSED}")
        return Path if name == "PosixPath" else super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """A storage_reader of dcp.load that raises UnpicklingError where files name more than data."""

    def read_metadata(self) -> Metadata:
        """Returns the content of .metadata.

        Raises OSError if the file is missing, EOFError or UnpicklingError if it is damaged, and
        UnpicklingError if it names anything but data.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata = Unpickler(file).load()
            except (EOFError, UnpicklingError):
                raise
            except Exception as error:  # of pickle, of any kind
                raise UnpicklingError(f"its .metadata is damaged: {in_a_line(error)}") from error
        if not isinstance(metadata, Metadata):
            raise UnpicklingError(f"its .metadata holds a {type(metadata).__name__}")
        return metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        try:
            return super().read_data(plan, planner)
        except UnpicklingError as error:  # torch's message advises to load the file all the same
            named = re.search(r"GLOBAL (\S+)", str(error))
            problem = f"names {named[1]}, {REFUSED}" if named else "is damaged"
            raise UnpicklingError(f"one of its .distcp files {problem}") from error


class Planner(dcp.DefaultLoadPlanner):
    """DefaultLoadPlanner whose objects hold numbers, text, tensors, lists and dicts alone."""

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()  # written here, because the planner of torch unpickles all of it
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
