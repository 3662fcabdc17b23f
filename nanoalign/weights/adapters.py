"""The folder of an adapter as a model to evaluate: the weights of its base, with it merged.

    adapter_config.json, adapter_model.safetensors      as peft writes and reads them
    settings/                                           config and tokenizer of the merged model

The settings are in a folder of their own, because transformers takes a folder that has a
config.json and an adapter for a whole model, and looks for its weights there.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn

from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line, read_json
from nanoalign.model import Fill, Read
from nanoalign.weights.folders import ADAPTER_CONFIG, local_folder, read_config
from nanoalign.weights.slices import copy_rows, places_of, read_generation_config
from nanoalign.weights.tensor_files import open_safetensors

WEIGHTS, SETTINGS, PREFIX = "adapter_model.safetensors", "settings", "base_model.model."
# Settings of peft with which an update is not alpha / r * B A for all layers.
OTHERS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")


def model_folder(name: str) -> Path:
    """Returns the folder of a model to evaluate: of an adapter its settings, else local_folder."""
    settings = Path(name).expanduser() / SETTINGS
    is_adapter = settings.with_name(ADAPTER_CONFIG).is_file() and settings.is_dir()
    return local_folder(settings if is_adapter else name)


def adapter_of(folder: Path) -> Path | None:
    """Returns the folder of the adapter to which a model_folder belongs; None if to none."""
    has_adapter = folder.name == SETTINGS and folder.with_name(ADAPTER_CONFIG).is_file()
    return folder.parent if has_adapter else None


def run_of(folder: Path) -> Path:
    """Returns the folder of the run that wrote a model_folder."""
    return folder if adapter_of(folder) is None else folder.parents[1]


def base_of(folder: Path) -> Path:
    """Returns the folder that stores the weights of a model_folder: of an adapter its base.

    Raises RunError if there is no such base, and as update_of does.
    """
    if (adapter := adapter_of(folder)) is None:
        return folder
    try:
        return local_folder(update_of(adapter).base)
    except RunError as error:
        raise RunError(f"the base of the adapter '{adapter}': {error}") from error


class Update(NamedTuple):
    """What an adapter_config.json says of the update of a weight."""

    base: str
    scale: float  # alpha / r
    transposed: bool  # GPT-2 has weights of the shape (in, out)


def update_of(adapter: Path) -> Update:
    """Reads the adapter_config.json of an adapter. Raises RunError for another kind of update."""
    path = adapter / ADAPTER_CONFIG
    about = read_json(path)
    try:
        if others := [name for name in OTHERS if about.get(name)]:
            raise RunError(f"{path} has {', '.join(others)}; give the model that peft merges")
        scale = about["lora_alpha"] / about["r"]
        return Update(str(about["base_model_name_or_path"]), scale, bool(about["fan_in_fan_out"]))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError(f"{path} is not of LoRA: {in_a_line(error)}; restore the file") from error


def reading(read: Read) -> Read:
    """The `read` of Policy.load and RewardModel.load for a model_folder that is evaluated.

    An adapter is added to the weights of its base in float32, and the sum is kept in their dtype.
    read: of base_of the folder. The result raises RunError as base_of and merge do.
    """

    def read_and_merge(
        auto: type, folder: Path, config: "transformers.PretrainedConfig", dtype: torch.dtype
    ) -> tuple[nn.Module, Fill]:
        base, adapter = base_of(folder), adapter_of(folder)
        if adapter is None:
            return read(auto, folder, config, dtype)
        of_base = read_config(base)
        of_base.get_text_config().pad_token_id = config.get_text_config().pad_token_id
        for name in ("id2label", "nanoalign"):  # outputs and rule of a reward model
            if hasattr(config, name):
                setattr(of_base, name, getattr(config, name))
        model, fill = read(auto, base, of_base, dtype)
        read_generation_config(model, folder)  # not of the base: it says what ends an answer

        def fill_and_merge(module: nn.Module, device: torch.device) -> None:
            fill(module, device)
            merge(model, adapter)

        return model, fill_and_merge

    return read_and_merge


@torch.no_grad()
def merge(model: nn.Module, adapter: Path) -> None:
    """Adds alpha / r * B A to weights of a model, in place, and copies the head of a reward model.

    Raises RunError if a file of the adapter is damaged, or if a tensor does not fit the model.
    """
    about, places, path = update_of(adapter), places_of(model), adapter / WEIGHTS
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            if ".lora_B." in name:
                continue  # with its A
            values, is_update = file.get_tensor(name), ".lora_A." in name
            if is_update:
                b = file.get_tensor(name.replace(".lora_A.", ".lora_B."))
                values = about.scale * (b @ values)
                values = values.T if about.transposed else values
            plain = name.removeprefix(PREFIX).replace(".lora_A.", ".")
            weight = getattr(*places[plain]) if plain in places else None
            if weight is None or weight.shape != values.shape:
                raise RunError(f"{path}: {plain} does not fit the base {about.base}; give its own")
            rows = torch.empty_like(weight, dtype=torch.float32)  # those of this rank
            copy_rows(rows, values)
            weight.copy_(weight.float() + rows if is_update else rows)
