"""Safetensors files -> sharded parameters: each rank reads its own slices of the files.

A model is built with its parameters on the meta device, without memory, and sharded; then its
shards get memory, and each rank reads its rows of every tensor. convert.py reads files whose
tensors transformers must convert (mixture-of-experts).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanoalign.errors import RunError, in_a_line
from nanoalign.model import Fill

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
            from nanoalign.checkpoints.heads import reader_of

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
        from nanoalign.rewards.own_head import class_of

        auto = class_of(type(config)) or auto
    tensors = len(stored_tensors(path))
    try:
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > tensors:
            raise ValueError(f"{layers} layers, but {tensors} tensors")  # it would take hours
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # no such model of this architecture, inconsistent settings
        raise RunError(f"model '{path}' can't be built: {in_a_line(error)}") from error
    if model.base_model is model:
        from nanoalign.checkpoints.body import name_body

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
        from nanoalign.checkpoints.convert import load_by_transformers

        return load_by_transformers(model, tensors, folder)
    if len(stored) > len(tensors):
        from nanoalign.checkpoints.tied import check_tied, read_tensor

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
    from nanoalign.checkpoints.shards import rows_of_rank

    return rows_of_rank(tensor)


def stored_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (its safetensors file, its shape). Raises RunError if a file is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = [single.name]
    if index.is_file() or not single.is_file():
        from nanoalign.checkpoints.index import files_of

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
