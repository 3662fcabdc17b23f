"""What older programs (transformers 4, vLLM) read of a model, and know by other names."""

import copy
import json
from pathlib import Path

import transformers

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
