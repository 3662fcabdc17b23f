"""Sharded parameters -> a model folder in Hugging Face format, which other programs read, too."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanoalign.distributed import World, print0
from nanoalign.errors import RunError
from nanoalign.model import Policy, Scorer
from nanoalign.ranks.collectives import on_every
from nanoalign.weights.folders import OWN_TEMPLATE, load_tokenizer
from nanoalign.weights.slices import places_of, stored_tensors, tensors_of

MAX_FILE_BYTES = 4 * 2**30  # rank 0 has the tensors of one file in host memory
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                   "chat_template.jinja", "merges.txt", "*.model")  # fmt: skip
INDEX = "model.safetensors.index.json"
# What a program may have changed of a tokenizer, but for the pad token, which portable.py writes.
CHANGEABLE = ("bos_token", "eos_token", "added_tokens_decoder", "chat_template", "padding_side")

# Name in the files -> a function that returns the tensor, which may be sharded.
Tensors = dict[str, Callable[[], Tensor]]


def write_model(
    scorer: Scorer, tokenizer, folder: Path, world: World | None = None,
    tensors: Tensors | None = None, template: str = "", dtype: str = "fp32",
) -> None:  # fmt: skip
    """Writes a model and its tokenizer to a folder. A collective: tensors are gathered one by one.

    tensors: to write in place of those of the model (merged adapters).
    template: by which the data became text; pku is written as a chat template, if there is none.
    dtype: of floating-point tensors; with bf16, prints how many changes survive it.
    The files are written to a hidden folder in `folder` and moved when all are complete, so that a
    failure leaves the files that were there. Raises RunError, on all ranks, if the disk is full.
    """
    is_main, temporary = world is None or world.is_main, folder / ".model.partial"
    if world is not None and world.size > 1:
        scorer.reshard()  # a forward without a backward pass leaves parameters gathered
    if tensors is None:
        named = tensors_of(places_of(scorer.model))
        tensors = {names[0]: lambda tensor=tensor: tensor for names, tensor in named.items()}
    if not isinstance(scorer, Policy):
        set_pad_token(scorer.model, tokenizer)
    gathered = converted_for_files(scorer.model, tensors, is_main)

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_settings(scorer.model, tokenizer.eos_token_id, temporary, dtype)
        write_tokenizer(tokenizer, temporary, template)
        if not isinstance(scorer, Policy):
            set_pad_token_of_files(tokenizer, temporary)
        files = FileWriter(temporary)
        if dtype == "bf16":
            files = RoundingWriter(temporary, Path(scorer.model.config._name_or_path))
        for name, tensor in gathered:
            files.add(name, tensor)
        files.close()
        move_into_place(temporary, folder)

    def write_on_main() -> None:
        try:
            if is_main:
                write()
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports it
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"the model could not be written to '{folder}': {error}") from error
        finally:  # other ranks, and a rank 0 that failed, gather the tensors that are left
            for _ in gathered:
                pass

    on_every(world, write_on_main) if world else write_on_main()


def write_settings(
    model: "transformers.PreTrainedModel", eos: int, folder: Path, dtype: str
) -> None:
    """Writes config.json and generation_config.json. eos: the token that ended every response.

    Not by save_pretrained, which refuses settings that from_pretrained accepts (a temperature
    without sampling): the trained model would be lost.
    """
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)  # names Python files that are not written
    settings = json.loads(config.to_json_string())
    settings["torch_dtype"] = settings["dtype"]  # its name in transformers 4
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 4 would compute with a base of 10000
        settings["rope_theta"] = rope["rope_theta"]
    if "text_config" in settings or rope.keys() - {"rope_theta", "rope_type"}:
        add_older_names(settings)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        generation, ends = model.generation_config, model.generation_config.eos_token_id
        if eos not in (ends if isinstance(ends, list) else [ends]):
            generation = with_end(generation, eos)
        generation.to_json_file(folder / "generation_config.json")


def write_tokenizer(tokenizer, folder: Path, template: str) -> None:
    """Writes a tokenizer: copies of the files that it was read from, unless it was changed.

    After a training by `template` pku it gets that as a chat template, if it has none.
    """
    source = Path(tokenizer.name_or_path)
    is_read = tokenizer.name_or_path and (source / "tokenizer_config.json").is_file()
    read = load_tokenizer(source) if is_read else None
    if read is not None and all(getattr(read, k) == getattr(tokenizer, k) for k in CHANGEABLE):
        for path in (each for pattern in TOKENIZER_FILES for each in source.glob(pattern)):
            if not path.read_bytes().startswith(OWN_TEMPLATE.encode()):
                shutil.copyfile(path, folder / path.name)
    else:
        tokenizer.save_pretrained(folder)
    if "TokenizersBackend" in (path := folder / "tokenizer_config.json").read_text():
        change_json(path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    if template == "pku" and not tokenizer.chat_template:
        text = Path(__file__).with_name("pku.jinja").read_text()
        if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:  # as encode.py writes it
            text = text.replace(OWN_TEMPLATE, OWN_TEMPLATE + "{{- bos_token -}}")
        (folder / "chat_template.jinja").write_text(text)


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
    """Moves all files to `folder`, and removes the files of tensors of an older model there.

    The index of several files goes first and comes last, so that it never names two models' files.
    """
    names = {path.name for path in temporary.iterdir()}
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):  # of a model with another number of files
        if old.name not in names:
            old.unlink()
    for name in sorted(names, key=lambda name: (name == INDEX, name)):
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
        if len(self.names) > 1:
            return write_index(self.folder, self.names, self.total)
        (self.folder / "unnamed-0.safetensors").rename(self.folder / "model.safetensors")


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of transformers 4
APART = ("rope_theta", "partial_rotary_factor")  # keys beside rope_scaling in transformers 4


def add_older_names(settings: dict) -> None:
    """Adds to a config.json the names of rotary positions in transformers 4.

    It knows no rope_parameters, and takes a base of 10000 and no scaling where these names are not.
    """
    if isinstance(rope := settings.get("rope_parameters"), dict):
        everywhere = rope.get("full_attention", rope) or {}
        if everywhere.get("rope_type", "default") not in ROPE_TYPES:
            return
        settings |= {name: everywhere[name] for name in APART if name in everywhere}
        if "sliding_attention" in rope:  # Gemma 3
            settings["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        if everywhere.get("rope_type", "default") != "default":
            settings["rope_scaling"] = {k: v for k, v in everywhere.items() if k not in APART}
    for part in settings.values():
        if isinstance(part, dict) and "rope_parameters" in part:  # text_config
            add_older_names(part)


def with_end(
    generation: "transformers.GenerationConfig", eos: int
) -> "transformers.GenerationConfig":
    """A copy that also ends a response at the token `eos`."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    changed = copy.deepcopy(generation)
    changed.eos_token_id = [eos, *ends] if ends else eos
    return changed


def set_pad_token_of_files(tokenizer, folder: Path) -> None:
    """Writes the pad token of a tokenizer into its files, if they have another."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file() and json.loads(path.read_text()).get("pad_token") != tokenizer.pad_token:
            change_json(path, {"pad_token": tokenizer.pad_token})


def change_json(path: Path, changes: dict) -> None:
    """Writes a JSON file again, with other values of some keys."""
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_index(folder: Path, names: list[list[str]], total: int) -> None:
    """Names the files unnamed-N.safetensors by their number, and writes their index.

    names: of the tensors of each file. total: their bytes.
    """
    count, weight_map = len(names), {}
    for n, each in enumerate(names):
        name = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"unnamed-{n}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(each, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def set_pad_token(model: "transformers.PreTrainedModel", tokenizer) -> None:
    """Gives a reward model a pad token that is not EOS, or none.

    transformers reads a reward at the last token that is not the pad token: this must be EOS.
    """
    ids = model.get_input_embeddings().num_embeddings
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    usable = [i for i in special if i not in (None, tokenizer.eos_token_id) and i < ids]
    pad = model.config.get_text_config().pad_token_id = usable[0] if usable else None
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


CHUNK = 2**24  # values that are compared at a time


class RoundingWriter(FileWriter):
    """A FileWriter of tensors in bfloat16, which counts the changes that survive. On rank 0.

    start: the folder of the model that was trained. Tensors that it does not have under the same
        name (the head of a new reward model) are not counted.
    """

    def __init__(self, folder: Path, start: Path):
        super().__init__(folder)
        self.stored = stored_tensors(start)
        self.changed = self.survived = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: float32."""
        if tensor.is_floating_point():
            path, shape = self.stored.get(name, (None, None))
            if shape == tuple(tensor.shape):
                with safe_open(path, framework="pt") as file:
                    self.count(tensor, file.get_tensor(name))
            tensor = tensor.bfloat16()
        super().add(name, tensor)

    def count(self, tensor: Tensor, before: Tensor) -> None:
        """Adds the values that were changed by the training, and those that rounding keeps so."""
        both = zip(tensor.flatten().split(CHUNK), before.flatten().split(CHUNK), strict=True)
        for new, old in both:
            self.changed += int((new != old.float()).sum())
            self.survived += int((new.bfloat16() != old.bfloat16()).sum())

    def close(self) -> None:
        super().close()
        if self.changed:
            print0(
                f"{'bfloat16':<11} {self.survived / self.changed:.1%} of {self.changed:,} changed "
                "weights differ from those of the start after rounding"
            )
