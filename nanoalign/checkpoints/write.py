"""Sharded parameters -> a model folder in Hugging Face format, which other programs read, too."""

import copy
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

from nanoalign.checkpoints.guards import OWN_TEMPLATE, load_tokenizer
from nanoalign.checkpoints.slices import places_of, tensors_of
from nanoalign.distributed import World
from nanoalign.errors import RunError
from nanoalign.model import RewardModel, Scorer

MAX_FILE_BYTES = 4 * 2**30  # rank 0 has the tensors of one file in host memory
PKU_CHAT = Path(__file__).parents[1] / "formats" / "pku.jinja"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                   "chat_template.jinja", "merges.txt", "*.model")  # fmt: skip

# Name in the files -> a function that returns the tensor, which may be sharded.
Tensors = dict[str, Callable[[], Tensor]]


def write_model(
    scorer: Scorer, tokenizer, folder: Path, world: World | None = None,
    tensors: Tensors | None = None, template: str = "", dtype: str = "fp32",
) -> None:  # fmt: skip
    """Writes a model and its tokenizer to a folder. A collective: tensors are gathered one by one.

    tensors: to write in place of those of the model (merged adapters).
    template: by which the data became text; pku is written as a chat template, if there is none.
    dtype: of floating-point tensors, fp32 or bf16, of which the losses are printed.
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
            write_settings(scorer.model, tokenizer, temporary, dtype)
            write_tokenizer(tokenizer, temporary, template)
        files = FileWriter(temporary)
        if dtype == "bf16":
            from nanoalign.checkpoints.rounding import RoundingWriter

            files = RoundingWriter(temporary, Path(scorer.model.config._name_or_path))
        for name, tensor in converted_for_files(scorer.model, tensors, is_main):
            if is_main:
                files.add(name, tensor)
        if is_main:
            files.close()
            move_into_place(temporary, folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise RunError(f"the model could not be written to '{folder}': {error}") from error


def write_settings(
    model: "transformers.PreTrainedModel", tokenizer, folder: Path, dtype: str
) -> None:
    """Writes config.json and generation_config.json.

    Not by save_pretrained, which refuses settings that from_pretrained accepts (a temperature
    without sampling): the trained model would be lost.
    """
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)  # names Python files that are not written
    settings = json.loads(config.to_json_string())
    add_older_names(settings)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        generation = copy.deepcopy(model.generation_config)
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
        if tokenizer.eos_token_id not in ends:  # with which every response ended
            generation.eos_token_id = [tokenizer.eos_token_id, *ends]
        generation.to_json_file(folder / "generation_config.json")


def add_older_names(settings: dict) -> None:
    """Adds the names by which transformers 4 reads the dtype and the rotary positions of a config.

    It knows no rope_parameters, and would compute with a base of 10000.
    """
    if isinstance(dtype := settings.get("dtype"), str):
        settings["torch_dtype"] = dtype
    if isinstance(rope := settings.get("rope_parameters"), dict):
        everywhere = rope.get("full_attention", rope)
        apart = {"rope_theta": everywhere.get("rope_theta"),
                 "partial_rotary_factor": everywhere.get("partial_rotary_factor"),
                 "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta")}  # fmt: skip
        settings |= {name: value for name, value in apart.items() if value is not None}
        if everywhere.get("rope_type", "default") != "default":
            settings["rope_scaling"] = {k: v for k, v in everywhere.items() if k not in apart}
    for part in settings.values():
        if isinstance(part, dict):  # text_config
            add_older_names(part)


def write_tokenizer(tokenizer, folder: Path, template: str) -> None:
    """Writes a tokenizer, and a chat template after a training by `template` pku without one.

    A tokenizer that is as it was read has its files copied: those that transformers 5 writes are
    others, which transformers 4 does not read.
    """
    source, path = Path(tokenizer.name_or_path), folder / "tokenizer_config.json"
    read = None
    if tokenizer.name_or_path and (source / path.name).is_file():
        read = load_tokenizer(source)
    if read is not None and summary(read) == summary(tokenizer):
        for old in (each for pattern in TOKENIZER_FILES for each in source.glob(pattern)):
            if not old.read_bytes().startswith(OWN_TEMPLATE.encode()):
                shutil.copyfile(old, folder / old.name)
    else:
        tokenizer.save_pretrained(folder)
    settings = json.loads(path.read_text())
    changed = dict(settings)
    if read is not None and read.pad_token != tokenizer.pad_token:  # that of a reward model
        changed["pad_token"] = tokenizer.pad_token
    if settings.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if changed != settings:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    if template == "pku" and not tokenizer.chat_template:
        text, first = PKU_CHAT.read_text(), tokenizer("x")["input_ids"][0]
        if first == tokenizer.bos_token_id:
            text = text.replace(OWN_TEMPLATE, OWN_TEMPLATE + "{{- bos_token -}}")
        (folder / "chat_template.jinja").write_text(text)


def summary(tokenizer) -> tuple:
    """What a program may have changed of a tokenizer, but for its pad token."""
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return special, tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.padding_side


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
