"""The files of a model folder beside its weights, as other programs and older ones expect them."""

import copy
import json
import shutil
from pathlib import Path

import torch
import transformers

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
             "chat_template*")  # fmt: skip
STATE = ("special_tokens_map", "chat_template", "added_tokens_decoder")


def write_settings(model: "transformers.PreTrainedModel", tokenizer, folder: Path) -> None:
    """Writes config.json, generation_config.json and the files of the tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = torch.float32, [type(model).__name__]
    vars(config).pop("auto_map", None)  # names Python files that are not written
    # save_pretrained would refuse settings that from_pretrained accepts (a temperature without
    # sampling), and the trained model would be lost.
    values = json.loads(config.to_json_string())
    rope = values.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has two
    if "rope_theta" in rope:  # transformers 4 looks for it here, and else takes 10,000
        values["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        settings = copy.deepcopy(model.generation_config)
        ends, own = settings.eos_token_id, tokenizer.eos_token_id  # own: what training ended with
        ends = ends if isinstance(ends, list) else [own if ends is None else ends]
        settings.eos_token_id = ends[0] if ends == [own] else [*ends, own][: len({*ends, own})]
        settings.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    source = Path(tokenizer.name_or_path)
    if (source / "tokenizer_config.json").is_file() and is_unchanged(tokenizer, source):
        for pattern in TOKENIZER:  # as they were: transformers 4 does not read all that 5 writes
            for path in [*folder.glob(pattern), *source.glob(pattern)]:
                path.unlink() if path.parent == folder else shutil.copyfile(
                    path, folder / path.name
                )
    named = folder / "tokenizer_config.json"  # transformers 4 knows the class by its older name
    named.write_text(named.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def is_unchanged(tokenizer, source: Path) -> bool:
    """Whether a tokenizer is the one in the folder that it was loaded from."""
    own = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    same = all(getattr(own, name) == getattr(tokenizer, name) for name in STATE)
    return same and own.get_vocab() == tokenizer.get_vocab()
