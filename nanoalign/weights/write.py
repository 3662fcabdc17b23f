"""Sharded parameters -> a model folder in Hugging Face format, which other programs read, too."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from nanoalign.distributed import World, full, print0
from nanoalign.errors import RunError
from nanoalign.files.run_folder import ARGS, FILES, METRICS
from nanoalign.files.text import read_json
from nanoalign.files.writing import sync, sync_tree
from nanoalign.model import Policy, Scorer
from nanoalign.ranks.collectives import on_every
from nanoalign.weights.folders import OWN_TEMPLATE, leads_out, load_tokenizer
from nanoalign.weights.slices import places_of, tensors_of
from nanoalign.weights.tensor_files import INDEX, read_tensor, stored_tensors, write_tensors

# Names of files beside the weights, by which --overwrite finds them in the folder of a run.
BESIDE_WEIGHTS = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "chat_template.*")
BESIDE_WEIGHTS += ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
BESIDE_WEIGHTS += ("*processor_config.json",)
# Files of a model's folder that do not go along with its result: weights in any format and what is
# about them, what is written anew, code, the model's card, and what a run has written.
NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.npz")
NOT_COPIED += ("*.msgpack", "*.onnx", "*.gguf", "config.json", "generation_config.json", "*.py")
NOT_COPIED += ("adapter_config.json", "*.md", ".*", "*.png", ARGS, METRICS)
NOT_COPIED += ("*.ot", "*.tflite", "*.onnx_data", "*.zip", "*.jsonl", "*.parquet", "*.log")
# What a program may have changed of a tokenizer. The pad token is changed in copies of the files.
CHANGEABLE = ("bos_token", "eos_token", "added_tokens_decoder", "chat_template", "padding_side")

# Those of transformers 4. An architecture with another type (Gemma 4) is none of transformers 4.
OLDER_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

# Name in the files -> a function that returns the tensor, which may be sharded.
Tensors = dict[str, Callable[[], Tensor]]


def write_model(
    scorer: Scorer,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    folder: Path,
    world: World | None = None,
    tensors: Tensors | None = None,
    template: str = "",
    dtype: str = "fp32",
) -> None:
    """Writes a model and its tokenizer to a folder. A collective: tensors are gathered one by one.

    tensors: what is written in place of the model's own tensors (merged adapters).
    template: by which the data became text; pku becomes the chat template of a tokenizer that has
        none.
    dtype: of floating-point tensors, fp32 or bf16; with bf16 the share of changed weights that
        still differ after rounding is printed.
    Sets the pad token of a reward model's config and tokenizer, in place (set_pad_token).
    The files are written to a hidden folder in `folder` and moved when all are complete, so that a
    failure leaves the files that were there. Raises RunError, on all ranks, if the files can't be
    written.
    """
    is_main, temporary = world is None or world.is_main, folder / ".model.partial"
    if world is not None and world.size > 1:
        scorer.reshard()  # a forward without a backward pass leaves parameters gathered
    if tensors is None:
        named = tensors_of(places_of(scorer.model))
        tensors = {names[0]: lambda tensor=tensor: tensor for names, tensor in named.items()}
    is_reward_model = not isinstance(scorer, Policy)
    if is_reward_model:
        set_pad_token(scorer.model, tokenizer)
    gathered = gather_for_files(scorer.model, tensors, is_main)

    def write_on_main() -> None:
        try:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                write_settings(scorer.model, tokenizer.eos_token_id, temporary, dtype)
                write_tokenizer(tokenizer, temporary, template, is_reward_model)
                start = Path(scorer.model.config._name_or_path)
                write_tensors(rounded(gathered, start) if dtype == "bf16" else gathered, temporary)
                note_files(temporary, folder)
                move_into_place(temporary, folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"the model could not be written to '{folder}': {error}") from error
        finally:  # other ranks, and a rank 0 that failed, gather the tensors that are left
            for _ in gathered:
                pass

    on_every(world, write_on_main) if world else write_on_main()


# --- settings and tokenizer -----------------------------------------------------------------------


def write_settings(
    model: "transformers.PreTrainedModel", eos: int, folder: Path, dtype: str
) -> None:
    """Writes config.json, and generation_config.json of a model that generates.

    eos: the id of the token that ended every response; it is put first in the generation config's
        EOS tokens, unless it is one of them. dtype: as in write_model.
    save_pretrained would refuse some settings that from_pretrained accepts (a temperature without
    sampling), and the trained model would be lost.
    """
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)  # names Python files that are not written
    settings = json.loads(config.to_json_string())
    settings["torch_dtype"] = settings["dtype"]  # its name in transformers 4
    add_older_names(settings)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        generation = copy.deepcopy(model.generation_config)
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if eos not in ends:
            generation.eos_token_id = [eos, *ends] if ends else eos
        generation.to_json_file(folder / "generation_config.json")


def add_older_names(settings: dict) -> None:
    """Adds to the settings of a config.json, in place, the names that transformers 4 reads.

    Other programs (vLLM) build on transformers 4, which does not know `rope_parameters`. Without
    `rope_theta` and `rope_scaling` it would compute other rotary positions (a base of 10000, no
    scaling), without an error.
    """
    rope = settings.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}  # Gemma 3 has them for each type of layer
    rope = rope.get("full_attention", rope) or {}
    apart = {"rope_theta", "partial_rotary_factor"}
    kind = rope.get("rope_type", "default")
    if kind in OLDER_ROPE_TYPES:
        settings |= {name: rope[name] for name in rope.keys() & apart}
        if "rope_theta" in local:
            settings["rope_local_base_freq"] = local["rope_theta"]
        if kind != "default":
            settings["rope_scaling"] = {name: rope[name] for name in rope.keys() - apart}
    if isinstance(settings.get("text_config"), dict):
        add_older_names(settings["text_config"])


def write_tokenizer(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    folder: Path,
    template: str,
    is_reward_model: bool,
) -> None:
    """Writes a tokenizer and the other files of its folder: copies, unless it was changed.

    Older programs read these copies; they may not read what this transformers would write.
    template: pku writes a chat_template.jinja for a tokenizer that has none.
    is_reward_model: whether the pad token is written to the copies, too.
    """
    source = Path(tokenizer.name_or_path)
    has_files = tokenizer.name_or_path and (source / "tokenizer_config.json").is_file()
    read = load_tokenizer(source) if has_files else None
    if read is not None:
        copy_others(source, folder)
    if read is None or any(getattr(read, k) != getattr(tokenizer, k) for k in CHANGEABLE):
        (folder / "special_tokens_map.json").unlink(missing_ok=True)  # of the tokenizer before
        tokenizer.save_pretrained(folder)
    if "TokenizersBackend" in (path := folder / "tokenizer_config.json").read_text():
        change_json(path, {"tokenizer_class": "PreTrainedTokenizerFast"})  # as in transformers 4
    if is_reward_model and tokenizer.pad_token is not None:  # by set_pad_token, not by the files
        for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
            if path.is_file():
                change_json(path, {"pad_token": tokenizer.pad_token})
    if template == "pku" and not tokenizer.chat_template:
        text = Path(__file__).with_name("pku.jinja").read_text()
        if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:  # as encode.py writes it
            text = text.replace(OWN_TEMPLATE, OWN_TEMPLATE + "{{- bos_token -}}")
        (folder / "chat_template.jinja").write_text(text)


def copy_others(source: Path, folder: Path) -> None:
    """Copies the files of a model folder that are not of NOT_COPIED, also of tokenizer and images.

    A link that leads out of the folder is not followed; a line names it.
    """
    for path in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
        if not path.is_file() or any(path.match(pattern) for pattern in NOT_COPIED):
            continue
        if leads_out(path, source):
            print0(f"{'saved':<11} without {path.name}, a link that leads out of {source}")
        elif not path.read_bytes().startswith(OWN_TEMPLATE.encode()):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def change_json(path: Path, changes: dict) -> None:
    """Writes a JSON file again with other values of some keys, unless it has these values."""
    settings = json.loads(path.read_bytes())
    if settings != settings | changes:
        path.write_text(
            json.dumps(settings | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def set_pad_token(
    model: "transformers.PreTrainedModel", tokenizer: "transformers.PreTrainedTokenizerBase"
) -> None:
    """Sets the pad token of a reward model's config and of its tokenizer to one that is not EOS.

    If there is none, sets the config's pad_token_id to None and leaves the tokenizer unchanged.
    transformers reads a reward at the last token that is not the pad token: this must be EOS.
    """
    ids = model.get_input_embeddings().num_embeddings
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    usable = [i for i in special if i not in (None, tokenizer.eos_token_id) and i < ids]
    pad = model.config.get_text_config().pad_token_id = usable[0] if usable else None
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


# --- tensors --------------------------------------------------------------------------------------


def gather_for_files(
    model: "transformers.PreTrainedModel", tensors: Tensors, is_main: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name in the files, full tensor on the CPU), gathered one at a time if possible.

    Floating-point tensors are float32. Each step is a collective. Where the files join or split
    tensors, rank 0 gathers all of them first, and the other ranks get none.
    """
    revert = transformers.core_model_loading.revert_weight_conversion
    on_meta = {name: torch.empty(get().shape, device="meta") for name, get in tensors.items()}
    in_turn = ((name, gather_tensor(get())) for name, get in tensors.items())
    if revert(model, on_meta).keys() == on_meta.keys():
        yield from in_turn
    else:  # mixtures of experts
        on_rank_0 = {name: tensor for name, tensor in in_turn if is_main}
        if is_main:
            yield from revert(model, on_rank_0).items()


def gather_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, in float32 if it has a floating-point type. A collective."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return full(tensor).detach().to("cpu", dtype)


def rounded(tensors: Iterator[tuple[str, Tensor]], start: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors with floating-point ones in bfloat16.

    At the end prints the share of changed weights that still differ after rounding from those of
    the start. start: the folder of the model from which the training began; a tensor that it does
        not have (the head of a reward model) is not counted.
    """
    stored = stored_tensors(start)
    changed = left = 0
    for name, tensor in tensors:
        if tensor.is_floating_point():
            new = tensor.bfloat16()
            if name in stored and stored[name].shape == tensor.shape:
                old = read_tensor(stored, name)
                changed += int((tensor != old).sum())
                left += int((new != old.bfloat16()).sum())
            tensor = new
        yield name, tensor
    if changed:
        print0(
            f"{'bfloat16':<11} {left / changed:.1%} of {changed:,} changed weights differ from "
            "those of the start after rounding"
        )


def note_files(temporary: Path, folder: Path) -> None:
    """Adds the names of the files of a result to the args.json of its run, if there is one.

    By these names --overwrite removes the result, also what went along with the model. The changed
    args.json is one of the files to be moved.
    """
    if (folder / ARGS).is_file():
        settings = read_json(folder / ARGS)
        names = {path.name for path in temporary.iterdir()}
        settings[FILES] = sorted(names.union(settings.get(FILES, ())))
        (temporary / ARGS).write_text(json.dumps(settings, indent=2) + "\n")


def move_into_place(temporary: Path, folder: Path) -> None:
    """Moves all files to `folder`, and removes the files of tensors of an older model there.

    The index of several files goes first and comes last, so that it never names two models' files.
    """
    names = {path.name for path in temporary.iterdir()}
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):  # of a model with another number of files
        if old.name not in names:
            old.unlink()
    sync_tree(temporary)
    for name in sorted(names, key=lambda name: (name == INDEX, name)):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        os.replace(temporary / name, folder / name)
    sync(folder)
    temporary.rmdir()
