"""Sharded parameters -> a model folder in Hugging Face format, float32."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanoalign.checkpoints.settings import write_settings
from nanoalign.checkpoints.slices import places_of, tensors_of
from nanoalign.distributed import World
from nanoalign.errors import RunError
from nanoalign.model import RewardModel, Scorer

MAX_FILE_BYTES = 4 * 2**30  # rank 0 has the tensors of one file in host memory

# Name in the files -> a function that returns the tensor, which may be sharded.
Tensors = dict[str, Callable[[], Tensor]]


def write_model(
    scorer: Scorer, tokenizer, folder: Path, world: World | None = None,
    tensors: Tensors | None = None,
) -> None:  # fmt: skip
    """Writes a model and its tokenizer to a folder. A collective: tensors are gathered one by one.

    tensors: to write in place of those of the model (merged adapters).
    The files are written to a hidden folder in `folder` and moved when all are complete, so that a
    failure leaves the files that were there. Raises RunError if the disk is full.
    """
    is_main = world is None or world.is_main
    temporary = folder / ".model.partial"
    if world is not None and world.size > 1:
        scorer.reshard()  # a forward without a backward pass leaves parameters gathered
    if tensors is None:
        named = tensors_of(places_of(scorer.model))
        tensors = {names[0]: lambda tensor=tensor: tensor for names, tensor in named.items()}
    if isinstance(scorer, RewardModel):
        from nanoalign.rewards.rule import set_pad_token

        set_pad_token(scorer.model, tokenizer)
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_settings(scorer.model, tokenizer, temporary)
        files = FileWriter(temporary)
        for name, tensor in converted_for_files(scorer.model, tensors, is_main):
            if is_main:
                files.add(name, tensor)
        if is_main:
            files.close()
            move_into_place(temporary, folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise RunError(f"the model could not be written to '{folder}': {error}") from error


def converted_for_files(
    model: "transformers.PreTrainedModel", tensors: Tensors, is_main: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name in the files, full float32 tensor), gathered one at a time where that is possible."""
    from transformers.core_model_loading import revert_weight_conversion

    on_meta = {name: torch.empty(get().shape, device="meta") for name, get in tensors.items()}
    tensors_in_turn = ((name, gather_tensor(get())) for name, get in tensors.items())
    if revert_weight_conversion(model, on_meta).keys() == on_meta.keys():
        yield from tensors_in_turn
    else:  # the files join or split tensors (mixture-of-experts), so rank 0 needs them all
        on_rank_0 = {name: tensor for name, tensor in tensors_in_turn if is_main}
        if is_main:
            yield from revert_weight_conversion(model, on_rank_0).items()


def gather_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, in float32 if it has a floating-point type. A collective."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype)


def move_into_place(temporary: Path, folder: Path) -> None:
    """Moves all files to `folder`, and removes the files of tensors of an older model there."""
    names = {path.name for path in temporary.iterdir()}
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for old in folder.glob(pattern):  # of a model with another number of files
            if old.name not in names:
                old.unlink()
    for name in sorted(names):
        os.replace(temporary / name, folder / name)
    temporary.rmdir()


class FileWriter:
    """Writes tensors to files of at most MAX_FILE_BYTES, or of one larger tensor, and an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.names: list[list[str]] = []  # the tensors of each file

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.bytes + tensor.nbytes > MAX_FILE_BYTES:
            self.flush()
        self.tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # no views
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        path = self.folder / f"unnamed-{len(self.names)}.safetensors"  # until their number is known
        save_file(self.tensors, path, metadata={"format": "pt"})
        # safetensors creates files that their owner alone can read.
        path.chmod((self.folder / "config.json").stat().st_mode)
        self.names.append(list(self.tensors))
        self.tensors, self.bytes = {}, 0

    def close(self) -> None:
        self.flush()
        count, weight_map = len(self.names), {}
        for n, names in enumerate(self.names):
            name = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
            name = "model.safetensors" if count == 1 else name
            (self.folder / f"unnamed-{n}.safetensors").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text)
