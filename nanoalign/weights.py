"""Weights: from safetensors files into sharded parameters, and back.

A model is built with its parameters on the meta device (no memory), sharded, given memory for the
shards alone, and then each rank reads its own slices of the files. Where the files' layout is not
the model's own (mixture-of-experts), rank 0 holds the whole model while it is converted.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from nanoalign import lora, tiny
from nanoalign.distributed import World, on_main
from nanoalign.errors import RunError, in_a_line

MAX_SHARD_BYTES = 4 * 2**30  # of a file that is written; rank 0 holds one in host memory
# What transformers raises at a folder it can't make sense of.
FOREIGN_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError,
                  AssertionError, RuntimeError, StrictDataclassError)  # fmt: skip

# --- finding --------------------------------------------------------------------------------------


def resolve_model(path: str | Path) -> Path:
    """The folder of a model: a local one, "tiny", or a download of OWNER/NAME from the Hub."""
    if str(path) == "tiny":
        return tiny.MODEL
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise RunError(f"model '{path}' is a file; give the folder that holds it")
    if len(folder.parts) != 2 or folder.is_absolute():  # not OWNER/NAME
        raise RunError(f"model folder '{path}' does not exist; give a folder, 'tiny' or OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        # Ranks of one host may all ask: the cache is locked while one of them downloads.
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError) as error:  # not found, no network, not a valid name
        raise RunError(
            f"no folder '{path}' here, and the Hub does not give it: {in_a_line(error)}"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise RunError(f"model folder '{folder}' has no config.json; is it a Hugging Face model?")
    try:
        config = AutoConfig.from_pretrained(folder)
    except FOREIGN_ERRORS as error:
        raise RunError(f"{folder / 'config.json'}: {in_a_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise RunError(f"model folder '{folder}' is quantized; training needs its full weights")
    return config


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (the safetensors file that holds it, its shape)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{index}: not an index of safetensors files: {in_a_line(error)}"
            ) from error
    elif single.is_file():
        names = [single.name]
    else:
        raise RunError(
            f"model folder '{folder}' has no weights: neither {single.name} nor {index.name} "
            "(other formats are not read; convert them with transformers' save_pretrained)"
        )
    stored = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise RunError(f"{index}: names the file {name}, which is missing")
        with _open(path) as file:
            stored |= {key: (path, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return stored


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise RunError(f"{path}: not a readable safetensors file: {in_a_line(error)}") from error


# --- building -------------------------------------------------------------------------------------


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers in memory.

    Buffers that no file holds (rotary tables) are computed while a module is built; on the meta
    device they would be lost.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build(
    auto: type, config: PretrainedConfig, dtype: torch.dtype, path: str | Path
) -> PreTrainedModel:
    """A model of this config, by one of transformers' Auto classes; `path` names it in errors."""
    try:
        model = auto.from_config(config, dtype=dtype)
    except FOREIGN_ERRORS as error:  # no such model of this architecture, odd settings
        raise RunError(f"model '{path}' can't be built: {in_a_line(error)}") from error
    if model.base_model is model:
        raise RunError(f"model '{path}': {type(model).__name__} has no body apart from its head")
    return model


def materialise(module: nn.Module, device: torch.device) -> None:
    """Memory on the device for everything that is on meta; the rest is moved there."""
    # What Module.to_empty does, but for buffers, whose values are kept.
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


# --- reading --------------------------------------------------------------------------------------


def load(model: PreTrainedModel, folder: Path, world: World | None) -> None:
    """Fills a model's parameters and persistent buffers from the folder's safetensors files.

    Where the files hold exactly the model's tensors, each rank reads its slices. Where they do not,
    transformers may know a conversion (mixture-of-experts weights are fused, old names have
    changed): its own loader then runs on rank 0, whose tensors are sent around one by one. What it
    can't place either is an error.

    A parameter that is on the meta device is not wanted, and passed over.
    """
    tensors = _named_tensors(model)
    stored = _stored_tensors(folder)
    known = {name for names in tensors for name in names}
    plain = stored.keys() <= known and all(
        any(stored.get(name, (None, None))[1] == tuple(tensor.shape) for name in names)
        for names, tensor in tensors.items()
    )
    if not plain:
        _load_by_transformers(model, tensors, folder, world)
        return
    by_file: dict[Path, dict[str, Tensor]] = {}
    for names, tensor in tensors.items():
        name = next(name for name in names if name in stored)
        by_file.setdefault(stored[name][0], {})[name] = tensor
    with torch.no_grad():
        for path, wanted in by_file.items():
            with _open(path) as file:
                for name, tensor in wanted.items():
                    _read_slice(file, name, tensor)


def _named_tensors(model: PreTrainedModel) -> dict[tuple[str, ...], Tensor]:
    """Every parameter and persistent buffer, under all its names (tied weights have several).

    Adapters are left out, and the names are those of a model without them.
    """
    named = {
        lora.plain_name(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not lora.is_adapter(name)
    }
    persistent = model.state_dict().keys()
    named |= {lora.plain_name(name): t for name, t in model.named_buffers() if name in persistent}
    names_of: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names_of.setdefault(id(tensor), []).append(name)
    return {tuple(names): named[names[0]] for names in names_of.values()}


def _read_slice(file: safe_open, name: str, tensor: Tensor) -> None:
    """Copies this rank's part of a stored tensor into place."""
    if tensor.is_meta:
        return
    stored = file.get_slice(name)
    if isinstance(tensor, DTensor):
        rows = _local_rows(tensor)
        if rows:
            tensor.to_local().copy_(stored[rows.start : rows.stop])
    else:
        tensor.copy_(stored[...])


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Copies this rank's part of a tensor that all ranks hold into place."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    rows = _local_rows(tensor) if isinstance(tensor, DTensor) else range(len(full))
    local.copy_(full[rows.start : rows.stop])


def _local_rows(tensor: DTensor) -> range:
    """The rows of dimension 0 that this rank holds: FSDP2 cuts them as torch.chunk does."""
    mesh = tensor.device_mesh  # where it has two dimensions, the first one's ranks hold copies
    size = tensor.shape[0]
    chunk = math.ceil(size / mesh.shape[-1])
    start = min(mesh.get_coordinate()[-1] * chunk, size)
    rows = range(start, min(start + chunk, size))
    assert len(rows) == tensor.to_local().shape[0], "FSDP2 shards as torch.chunk does"
    return rows


def _load_by_transformers(
    model: PreTrainedModel,
    tensors: dict[tuple[str, ...], Tensor],
    folder: Path,
    world: World | None,
) -> None:
    read = partial(_from_pretrained, model, folder)
    loaded = read() if world is None else on_main(world, read)
    for names, tensor in tensors.items():
        if tensor.is_meta:
            continue
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if loaded is not None:
            full.copy_(loaded[names[0]])
        if world is not None and world.size > 1:
            dist.broadcast(full, src=0)
        fill(tensor, full)


def _from_pretrained(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The tensors by name, as transformers' own loader has them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of names; ours is the error below
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = type(model).from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except FOREIGN_ERRORS as error:
        raise RunError(f"model folder '{folder}' can't be loaded: {in_a_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(found[:3])}{more}")
    if problems:
        raise RunError(
            f"model folder '{folder}': its weights are not those of the {type(loaded).__name__} that "
            f"config.json describes; {'; '.join(problems)}"
        )
    return loaded.state_dict()


# --- writing --------------------------------------------------------------------------------------


def save(model: PreTrainedModel, tokenizer, folder: Path, world: World | None = None) -> None:
    """Writes a model and its tokenizer in Hugging Face format, in float32. Every rank must call it.

    Adapters are merged into the weights that are written, and stay as they are in the model.
    Parameters are gathered one at a time. The files are written to a folder beside their place and
    moved when all are whole, so that a failure while writing leaves what was there.
    """
    is_main = world is None or world.is_main
    temporary = folder / ".model.partial"
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            config = copy.deepcopy(model.config)
            config.dtype, config.architectures = torch.float32, [type(model).__name__]
            # Not save_pretrained, which refuses settings (a temperature without sampling) that it
            # has read without complaint: a trained model must not be lost over them.
            config.to_json_file(temporary / "config.json")
            if model.can_generate():
                model.generation_config.to_json_file(temporary / "generation_config.json")
            tokenizer.save_pretrained(temporary)
        _write_tensors(model, temporary, is_main)
        if is_main:
            _move_into_place(temporary, folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise RunError(f"the model could not be written to '{folder}': {error}") from error


def _move_into_place(temporary: Path, folder: Path) -> None:
    new = {path.name for path in temporary.iterdir()}
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for old in folder.glob(pattern):  # of a model with another number of files
            if old.name not in new:
                old.unlink()
    for name in sorted(new):
        os.replace(temporary / name, folder / name)
    temporary.rmdir()


def _write_tensors(model: PreTrainedModel, folder: Path, is_main: bool) -> None:
    writer = _ShardWriter(folder)
    for name, tensor in _tensors_to_save(model, is_main):
        if is_main:
            writer.add(name, tensor)
    if is_main:
        writer.close()


def _tensors_to_save(model: PreTrainedModel, is_main: bool) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, full float32 tensor); a collective, one parameter at a time."""
    tensors = {names[0]: tensor for names, tensor in _named_tensors(model).items()}
    on_meta = {name: torch.empty(t.shape, device="meta") for name, t in tensors.items()}
    adapted = lora.adapted(model)
    gathered = (
        (name, _full(lora.merged(adapted[name]) if name in adapted else tensor))
        for name, tensor in tensors.items()
    )
    if revert_weight_conversion(model, on_meta).keys() == on_meta.keys():
        yield from gathered
    else:  # the file's layout joins or splits tensors (mixture-of-experts), so rank 0 needs them all
        full = {name: tensor for name, tensor in gathered if is_main}
        if is_main:
            yield from revert_weight_conversion(model, full).items()


def _full(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32 if full.is_floating_point() else full.dtype)


class _ShardWriter:
    """Collects tensors into files of at most MAX_SHARD_BYTES, and writes the index over several."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.bytes = 0
        self.total = 0
        self.names: list[list[str]] = []  # the tensors of each file

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self.tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # no views
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        path = self._path(len(self.names))
        save_file(self.tensors, path, metadata={"format": "pt"})
        path.chmod(
            (self.folder / "config.json").stat().st_mode
        )  # safetensors lets its owner alone read
        self.names.append(list(self.tensors))
        self.tensors, self.bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"unnamed-{number}.safetensors"  # until it is known how many there are

    def close(self) -> None:
        self._flush()
        count = len(self.names)
        if count == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.names):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text)
