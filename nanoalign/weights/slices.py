"""Safetensors files -> sharded parameters: each rank reads its own rows of every tensor.

A model is built with its parameters on the meta device, where they take no memory, and sharded.
Then its shards get memory and are filled. Where transformers must convert the tensors of the files
(most mixtures of experts), rank 0 loads the whole model and sends its tensors to the other ranks.

torch.distributed.checkpoint's HuggingFaceStorageReader reads slices in as much memory. It is not
used because it reads every safetensors file of a folder, also one that the index does not name.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.model import Fill
from nanoalign.weights.heads import class_of
from nanoalign.weights.nf4 import is_packed, pack, shape_of
from nanoalign.weights.tensor_files import open_safetensors, read_tensor, stored_tensors

# Options of from_pretrained: it loads no pickles, and runs no code of the folder or of the Hub.
SAFE = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}

Place = tuple[nn.Module, str]  # a module, and the name of a parameter or buffer in it


def read_slices(
    auto: type, folder: Path, config: "transformers.PretrainedConfig", dtype: torch.dtype
) -> tuple["transformers.PreTrainedModel", Fill]:
    """The `read` of Policy.load: returns (a model on the meta device, a function that fills it).

    auto: the class that builds the model: AutoModelForCausalLM; AutoModelForSequenceClassification,
        whose head is not filled if the folder has none; or a subclass of heads.Headed.
    The function gives the model memory on a device and this rank's rows of the weights, after the
    model was sharded. It raises RunError, on all ranks, if the files are damaged or do not fit the
    model; read_slices does so if the model can't be built.
    """
    with parameters_on_meta():
        model = reader = build(auto, config, dtype, folder)
        has_head = any("ForSequence" in name for name in config.architectures or ())
        if auto is transformers.AutoModelForSequenceClassification and not has_head:
            # A language model reads the files; its body is that of the reward model.
            reader = build(transformers.AutoModelForCausalLM, config, dtype, folder)
            setattr(reader, reader.base_model_prefix, model.base_model)
    read_generation_config(model, folder)
    return model, filler(reader, places_of(reader), folder)


def read_generation_config(model: "transformers.PreTrainedModel", folder: Path) -> None:
    """Gives a model that generates the generation_config.json of a folder, if there is one.

    Raises RunError if it can't be used.
    """
    if model.can_generate() and (path := folder / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise RunError(f"{path}: {in_a_line(error)}; correct or remove it") from error


def filler(reader: "transformers.PreTrainedModel", places: dict[str, Place], folder: Path) -> Fill:
    """Returns the function that gives a module memory and fills it from the files of a folder.

    reader: a model whose names of tensors are those of the files. places: of these tensors.
    Adapters wrap the modules of the places and sharding replaces their parameters, but the modules
    stay.
    """

    def fill(module: nn.Module, device: torch.device) -> None:
        # As Module.to_empty, except for buffers, which keep their values.
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        reader.tie_weights()
        load(reader, tensors_of(places), folder)

    return fill


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """A context in which modules are built with parameters on meta, and with buffers in memory.

    Buffers that no file stores (rotary tables) are computed while a module is built.
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
    auto: type, config: "transformers.PretrainedConfig", dtype: torch.dtype, folder: Path
) -> "transformers.PreTrainedModel":
    """Builds a model of a config, without weights. folder: of the weights, for the checks.

    Raises RunError for an architecture or settings of which transformers can't build a model, for
    more layers than the folder has tensors, and for a model whose body (the transformer without its
    head) can't be found.
    """
    # None is the default of transformers. A config.json may ask for code that the Hub would send.
    config._attn_implementation = config._experts_implementation = None
    if auto is transformers.AutoModelForSequenceClassification:
        auto = class_of(type(config)) or auto
    tensors = len(stored_tensors(folder))
    try:
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > tensors:  # building them might take hours
            raise ValueError(
                f"config.json has {layers} layers, but the weights have only {tensors} tensors"
            )
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # of transformers, of any kind
        raise RunError(
            f"model '{folder}' can't be built: {in_a_line(error)}; give another model"
        ) from error
    if model.base_model is model:  # Llama 4 names its body in another way than transformers expects
        parts = dict(model.named_children())
        bodies = [n for n, part in parts.items() if isinstance(part, transformers.PreTrainedModel)]
        if len(bodies) != 1:
            raise RunError(
                f"model '{folder}': can't find the transformer without its head in "
                f"{type(model).__name__}, so this architecture can't be used; give another model"
            )
        model.base_model_prefix = bodies[0]
    return model


# --- names of tensors -----------------------------------------------------------------------------


def places_of(model: nn.Module) -> dict[str, Place]:
    """Maps every name of each parameter and persistent buffer to its place."""
    persistent = model.state_dict().keys()
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in (*module._parameters, *module._buffers):
            name = f"{path}.{attribute}" if path else attribute
            if name in persistent:
                places[name] = (module, attribute)
    return places


def tensors_of(places: dict[str, Place]) -> dict[tuple[str, ...], Tensor]:
    """Maps all names of each tensor (several if tied) to the current parameter or buffer.

    places: of places_of. A tensor is a DTensor if the model is sharded; nothing is gathered.
    """
    names: dict[int, list[str]] = {}
    for name, (module, attribute) in places.items():
        names.setdefault(id(getattr(module, attribute)), []).append(name)
    return {tuple(aliases): getattr(*places[aliases[0]]) for aliases in names.values()}


def check_tied(tied: Iterable[tuple[str, ...]], values: dict[str, Tensor], folder: Path) -> None:
    """Raises RunError where the files store two names of one tensor with different values.

    tied: all names of each tensor of the model. values: what the files store, by name.
    """
    for names in tied:
        first, *others = [name for name in names if name in values] or [""]
        for other in others:
            if not torch.equal(values[first], values[other]):
                raise RunError(
                    f"model folder '{folder}': {first} and {other} are one tensor of the model, by "
                    'config.json, but differ in the files; write "tie_word_embeddings": false '
                    "into config.json, or remove the wrong one"
                )


# --- values of tensors ----------------------------------------------------------------------------


@torch.no_grad()
def load(
    model: "transformers.PreTrainedModel", tensors: dict[tuple[str, ...], Tensor], folder: Path
) -> None:
    """Fills the tensors of a model from the files of a folder. A collective.

    tensors: of the model, by all the names of each.
    Raises RunError, on all ranks, if the files store other tensors than the model has.
    """
    stored = stored_tensors(folder)
    known = {name for names in tensors for name in names}
    same_layout = stored.keys() <= known and all(
        any(name in stored and stored[name].shape == shape_of(tensor) for name in names)
        for names, tensor in tensors.items()
    )
    if not same_layout:
        return load_on_rank_0(model, tensors, folder)
    if len(stored) > len(tensors):
        several = (name for names in tensors if len(names) > 1 for name in names if name in stored)
        check_tied(tensors, {name: read_tensor(stored, name) for name in several}, folder)
    targets: dict[Path, dict[str, Tensor]] = {}
    for names, tensor in tensors.items():
        name = next(name for name in names if name in stored)
        targets.setdefault(stored[name].file, {})[name] = tensor
    for path, tensors_of_file in targets.items():
        with open_safetensors(path) as file:
            for name, tensor in tensors_of_file.items():
                copy_rows(tensor, file.get_slice(name))


@torch.no_grad()
def copy_rows(target: Tensor, whole: Tensor) -> None:
    """Copies this rank's rows of a whole tensor into a parameter or buffer, in place.

    target: sharded on dimension 0, or not sharded; one of weights/nf4.py gets these rows packed.
        whole: a tensor of the global shape of target, or a slice of safetensors, of which only
        those rows are read.
    """
    local, own = target, ...
    if isinstance(target, DTensor):
        local, mesh = target.to_local(), target.device_mesh
        rows = math.ceil(len(target) / mesh.shape[-1])  # FSDP2 divides them as torch.chunk does
        start = min(mesh.get_coordinate()[-1] * rows, len(target))
        stop = min(start + rows, len(target))
        assert len(local) == stop - start, "FSDP2 shards as torch.chunk does"
        own = slice(start, stop)
    local.copy_(pack(whole[own].to(local.device)) if is_packed(target) else whole[own])


def load_on_rank_0(
    model: "transformers.PreTrainedModel", tensors: dict[tuple[str, ...], Tensor], folder: Path
) -> None:
    """As `load`, by transformers' own loader on rank 0, which sends every tensor to all ranks."""
    loaded, message = {}, [None]
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if is_main:
        try:
            loaded = load_whole(model, folder)
            check_tied(tensors, loaded, folder)
        except RunError as error:
            message = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise RunError(message[0])
    for names, tensor in tensors.items():
        dtype = torch.float32 if is_packed(tensor) else tensor.dtype
        whole = torch.empty(shape_of(tensor), dtype=dtype, device=tensor.device)
        if is_main:
            whole.copy_(next(loaded[name] for name in names if name in loaded))
        if dist.is_initialized():
            dist.broadcast(whole, src=0)
        copy_rows(tensor, whole)


def load_whole(model: "transformers.PreTrainedModel", folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder by name, as transformers loads them into a model.

    model: one of the class into which they are loaded; it is not changed.
    Raises RunError if the files lack a tensor of the model, have one that the model lacks, or store
    one in another shape.
    """
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the RunError below replaces its report
    logging.disable_progress_bar()
    try:
        loaded, info = type(model).from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **SAFE
        )
    except Exception as error:  # of transformers, of any kind
        raise RunError(
            f"model folder '{folder}' can't be loaded: {in_a_line(error)}; give another model"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind.replace("_", " "): sorted(map(str, info[kind])) for kind in kinds}
    problems = [f"{kind}: {', '.join(names[:3])}" for kind, names in found.items() if names]
    if problems:
        raise RunError(
            f"model folder '{folder}': its weights are not those of the {type(loaded).__name__} in "
            f"config.json: {'; '.join(problems)}; restore its files, or give another model"
        )
    return loaded.state_dict()
