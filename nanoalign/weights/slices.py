"""Safetensors files -> sharded parameters: each rank reads its own slices of the files.

A model is built with its parameters on the meta device, without memory, and sharded; then its
shards get memory, and each rank reads its rows of every tensor. convert.py reads files whose
tensors transformers must convert (mixture-of-experts).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from nanoalign.errors import RunError, in_a_line
from nanoalign.files.run_folder import advice
from nanoalign.model import Fill
from nanoalign.weights.heads import class_of

Place = tuple[nn.Module, str]  # a module, and the name that its parameter or buffer has in it


def read_slices(
    auto: type, folder: str | Path, config: "transformers.PretrainedConfig", dtype: torch.dtype
) -> tuple["transformers.PreTrainedModel", Fill]:
    """(a model on the meta device, a function that fills its shards): the `read` of Policy.load.

    A reward model that is made of a language model gets the body of that; its head is not filled.
    """
    folder = Path(folder)
    with parameters_on_meta():
        model = reader = build(auto, config, dtype, folder)
        if auto is not transformers.AutoModelForCausalLM:
            reader = reader_of(model, config, dtype, folder)
    if model.can_generate() and (path := folder / "generation_config.json").is_file():  # EOS ids
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise RunError(f"{path}: {in_a_line(error)}") from error
    # Adapters wrap these modules and sharding replaces their parameters, but the modules stay.
    places = places_of(reader)

    def fill(module: nn.Module, device: torch.device) -> None:
        # As Module.to_empty, except for buffers, which keep their values.
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        reader.tie_weights()
        load(reader, places, folder)

    return model, fill


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have their parameters on meta, and their buffers in memory.

    Buffers that are in no file (rotary tables) are computed while a module is built.
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
    auto: type, config: "transformers.PretrainedConfig", dtype: torch.dtype, path: Path
) -> "transformers.PreTrainedModel":
    """A model of this config without weights. path: its folder, whose tensors it must have."""
    # transformers' defaults: what a folder wants may be code that is fetched from the Hub.
    config._attn_implementation = config._experts_implementation = None
    if auto is transformers.AutoModelForSequenceClassification:
        auto = class_of(type(config)) or auto
    tensors = len(stored_tensors(path))
    try:
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > tensors:
            raise ValueError(f"{layers} layers, but {tensors} tensors")  # it would take hours
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # no such model of this architecture, inconsistent settings
        raise RunError(f"model '{path}' can't be built: {in_a_line(error)}") from error
    if model.base_model is model:
        name_body(model, path)
    return model


def places_of(model: "transformers.PreTrainedModel") -> dict[str, Place]:
    """Name -> place of every parameter and persistent buffer; a tied one has several names."""
    persistent = model.state_dict().keys()
    return {
        f"{prefix}{'.' * bool(prefix)}{name}": (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
        if f"{prefix}{'.' * bool(prefix)}{name}" in persistent
    }


def tensors_of(places: dict[str, Place]) -> dict[tuple[str, ...], Tensor]:
    """All names of a tensor -> the tensor."""
    names: dict[int, list[str]] = {}
    for name, (module, attribute) in places.items():
        names.setdefault(id(getattr(module, attribute)), []).append(name)
    return {tuple(each): getattr(*places[each[0]]) for each in names.values()}


@torch.no_grad()
def load(model: "transformers.PreTrainedModel", places: dict[str, Place], folder: Path) -> None:
    """Fills the tensors of a model from the safetensors files of a folder. A collective.

    Raises RunError if the files have other names or shapes than the model, after conversion too.
    """
    tensors, stored = tensors_of(places), stored_tensors(folder)
    same_layout = stored.keys() <= places.keys() and all(
        any(stored.get(name, (None, None))[1] == tuple(tensor.shape) for name in names)
        for names, tensor in tensors.items()
    )
    if not same_layout:
        return load_by_transformers(model, tensors, folder)
    if len(stored) > len(tensors):
        read = {name: partial(read_tensor, path, name) for name, (path, _) in stored.items()}
        check_tied(tensors, read, folder)
    by_file: dict[Path, dict[str, Tensor]] = {}
    for names, tensor in tensors.items():
        name = next(name for name in names if name in stored)
        by_file.setdefault(stored[name][0], {})[name] = tensor
    for path, targets in by_file.items():
        with open_safetensors(path) as file:
            for name, tensor in targets.items():
                rows = local_rows(tensor)
                if len(rows):
                    stored_tensor = file.get_slice(name)
                    if isinstance(tensor, DTensor):
                        tensor.to_local().copy_(stored_tensor[rows.start : rows.stop])
                    else:
                        tensor.copy_(stored_tensor[...])


def local_rows(tensor: Tensor) -> range:
    """The rows of dimension 0 that this rank has."""
    if not isinstance(tensor, DTensor):
        return range(len(tensor)) if tensor.ndim else range(1)

    return rows_of_rank(tensor)


def stored_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (its safetensors file, its shape). Raises RunError if a file is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = [single.name]
    if index.is_file() or not single.is_file():
        names = files_of(index)
    stored = {}
    for name in names:
        with open_safetensors(path := folder / name) as file:
            stored |= {key: (path, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return stored


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """An open file of tensors. Raises RunError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise RunError(f"{path}: not a readable safetensors file: {in_a_line(error)}") from error


def name_body(model: PreTrainedModel, path: Path) -> None:
    """Names the one part that is a model as the body: Llama 4 gives it another name.

    path: names the model in errors. Raises RunError if there is no such part.
    """
    parts = dict(model.named_children())
    bodies = [name for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    if len(bodies) != 1:
        raise RunError(f"model '{path}': {type(model).__name__} has no body apart from its head")
    model.base_model_prefix = bodies[0]


def files_of(index: Path) -> list[str]:
    """The names of the files of an index. Raises RunError if it or one of them is
    damaged or not there."""
    if not index.is_file():
        raise RunError(
            advice(index.parent)
            or f"model folder '{index.parent}' has no weights: neither model.safetensors nor "
            f"{index.name} (other formats are not read; convert them with transformers' "
            "save_pretrained)"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index}: not an index of files: {in_a_line(error)}") from error
    if missing:
        raise RunError(f"{index}: names the file {missing[0]}, which is missing")
    return names


def rows_of_rank(tensor: DTensor) -> range:
    """The rows of dimension 0 that this rank has: FSDP2 divides them as torch.chunk does."""
    mesh = tensor.device_mesh  # parameters are sharded over its last dimension
    size = tensor.shape[0]
    chunk = math.ceil(size / mesh.shape[-1])
    start = min(mesh.get_coordinate()[-1] * chunk, size)
    rows = range(start, min(start + chunk, size))
    assert len(rows) == tensor.to_local().shape[0], "FSDP2 shards as torch.chunk does"
    return rows


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


def reader_of(
    model: "transformers.PreTrainedModel", config: "transformers.PretrainedConfig",
    dtype: torch.dtype, folder: Path,
) -> "transformers.PreTrainedModel":  # fmt: skip
    """What reads the files of a folder into a reward model: itself, if they have a reward head.

    Those of a language model are read by one, into the body of the reward model.
    """
    if any("ForSequence" in name for name in config.architectures or ()):
        return model
    reader = build(transformers.AutoModelForCausalLM, config, dtype, folder)
    setattr(reader, reader.base_model_prefix, model.base_model)
    return reader


# Nothing pickled, no code of the folder, and no attention whose code is fetched from the Hub.
SAFE = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}


def load_by_transformers(
    model: PreTrainedModel, tensors: dict[tuple[str, ...], Tensor], folder: Path
) -> None:
    """Fills tensors, by all their names, with those that rank 0 loads and sends. A collective.

    Raises RunError on all ranks if the files do not fit the model.
    """
    loaded, message = {}, [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            loaded = from_pretrained(model, folder)
            if lost := [names[0] for names in tensors if loaded.keys().isdisjoint(names)]:
                raise RunError(
                    f"model folder '{folder}' has no weights for {', '.join(sorted(lost)[:3])} of "
                    f"{type(model).__name__}"
                )
            check_tied(tensors, {name: partial(loaded.get, name) for name in loaded}, folder)
        except RunError as error:
            message = [str(error)]
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise RunError(message[0])
    for names, tensor in tensors.items():
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if found := [name for name in names if name in loaded]:  # on rank 0
            full.copy_(loaded[found[0]])
        if several:
            dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            rows = local_rows(tensor)
            tensor.to_local().copy_(full[rows.start : rows.stop])
        else:
            tensor.copy_(full)


def from_pretrained(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The tensors by name, as transformers loads them.

    Raises RunError if the files lack a tensor of the model, or have one that the model lacks.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the RunError below replaces its report
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = type(model).from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **SAFE
        )
    except Exception as error:
        raise RunError(f"model folder '{folder}' can't be loaded: {in_a_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            more = f" and {len(found) - 3} more" * (len(found) > 3)
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(found[:3])}{more}")
    if problems:
        raise RunError(
            f"model folder '{folder}': its weights are not those of the {type(loaded).__name__} in "
            f"config.json: {'; '.join(problems)}"
        )
    return loaded.state_dict()
